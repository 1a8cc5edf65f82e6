"""From a run to a verdict, the classes that drive it, and findings with advice.

>>> from wapo_analysis import open_run
>>> from wapo_analysis.diagnose import diagnose
>>> print(diagnose(open_run("runs/demo/grpo-0")).to_text())  # doctest: +SKIP
"""

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.detectors import DETECTORS, Detector
from wapo_analysis.diagnose.judge import diagnose
from wapo_analysis.diagnose.result import (
    SEVERITIES,
    VERDICT_WORDS,
    Culprits,
    Diagnosis,
    Driver,
    Finding,
    Skipped,
)

__all__ = [
    "DETECTORS",
    "SEVERITIES",
    "VERDICT_WORDS",
    "Advice",
    "Culprits",
    "Detector",
    "Diagnosis",
    "Driver",
    "Finding",
    "Skipped",
    "diagnose",
]
