"""Detectors, one file a family; a function of any file here that registers itself is one."""

from importlib import import_module
from pkgutil import iter_modules

from wapo_analysis.diagnose.detectors.registry import DETECTORS, Detector, run_detectors

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")

__all__ = ["DETECTORS", "Detector", "run_detectors"]
