"""Probes: what the parts of an optimizer update do, as rows and as findings; torch-free."""

from wapo_analysis.probes.reading import (
    MEANINGS,
    agreement,
    closure,
    closure_error,
    complete,
    judge,
    part_name,
    set_name,
    three_numbers,
    trust,
)

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
]
