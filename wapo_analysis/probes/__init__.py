"""Probes: what the parts of an optimizer update do, as rows and as findings; torch-free."""

from wapo_analysis.probes.reading import (
    agreement,
    closure,
    closure_error,
    complete,
    part_name,
    set_name,
    three_numbers,
    trust,
    window,
)
from wapo_analysis.probes.verdict import MEANINGS, judge

__all__ = [
    "MEANINGS",
    "agreement",
    "closure",
    "closure_error",
    "complete",
    "judge",
    "part_name",
    "set_name",
    "three_numbers",
    "trust",
    "window",
]
