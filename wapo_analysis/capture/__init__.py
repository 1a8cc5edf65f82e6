"""Watching a live trainer: the only place that touches one."""
