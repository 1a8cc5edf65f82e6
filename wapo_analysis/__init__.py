"""Token-gradient dynamics of RLVR training: which tokens bent the curve.

Names are loaded on first use, so importing the package loads neither torch nor matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.capture.loss import watched_loss
    from wapo_analysis.capture.trl import attach
    from wapo_analysis.capture.trl.objective import use_objective, use_wapo
    from wapo_analysis.record.recorder import Recorder
    from wapo_analysis.run import Run, open_run
    from wapo_analysis.train.config import TrainConfig

#: The one place it is written.
__version__ = "0.2.0"

_LAZY = {
    "Recorder": "wapo_analysis.record.recorder",
    "Run": "wapo_analysis.run",
    "TrainConfig": "wapo_analysis.train.config",
    "attach": "wapo_analysis.capture.trl",
    "open_run": "wapo_analysis.run",
    "use_objective": "wapo_analysis.capture.trl.objective",
    "use_wapo": "wapo_analysis.capture.trl.objective",
    "watched_loss": "wapo_analysis.capture.loss",
}

__all__ = [
    "Recorder",
    "Run",
    "TrainConfig",
    "UserError",
    "__version__",
    "attach",
    "open_run",
    "use_objective",
    "use_wapo",
    "watched_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'wapo_analysis' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
