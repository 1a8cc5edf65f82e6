"""Runs to one self-contained HTML page; :func:`wapo_analysis.report.build.build_report`."""
