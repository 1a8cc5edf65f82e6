"""Passive or replace: whether logits are read beside the trainer or never made.

*passive*: the model makes its logits, the trainer uses them, statistics are read off them.
*replace*: log-probabilities and statistics come straight from hidden states and head.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wapo_analysis.errors import UserError

PASSIVE, REPLACE, AUTO = "passive", "replace", "auto"
MODES = (PASSIVE, REPLACE, AUTO)
LARGEST_SHARE = 0.10
"""Share of the free memory that the logits of a micro-batch may take under ``auto``."""


@dataclass(frozen=True)
class CaptureMode:
    """Mode of a run and why.

    Attributes
    ----------
    mode : {"passive", "replace"}
    rule : str
        One line: who decided, with the numbers.
    logits_bytes, free_bytes : int or None
        Size of the logits of one micro-batch, and the memory that was free when it was decided.
    microbatch_tokens : int or None
        Most tokens of a micro-batch, where the memory decides and not a setting.
    """

    mode: str
    rule: str
    logits_bytes: int | None = None
    free_bytes: int | None = None
    microbatch_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Entries of the manifest, under ``capture``."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def choose_mode(
    asked: str, logits_bytes: int, free_bytes: int | None, obstacle: str | None
) -> CaptureMode:
    """Decide the mode of a trainer that makes logits.

    Parameters
    ----------
    asked : {"passive", "replace", "auto"}
        "auto" replaces if the logits take more than a tenth of the free memory.
    logits_bytes : int
        Logits of one micro-batch.
    free_bytes : int or None
        Memory free now; None is unknown, then "auto" stays passive.
    obstacle : str or None
        Why this model cannot do without logits.

    Raises
    ------
    UserError
        If the mode does not exist, or "replace" was asked for and cannot be had.
    """
    if asked not in MODES:
        raise UserError(f"capture_mode must be one of {', '.join(MODES)}, got {asked!r}")
    numbers = logits_bytes, free_bytes
    if asked == REPLACE and obstacle is not None:
        raise UserError(f"capture_mode replace cannot be used with this model: {obstacle}")
    if asked != AUTO:
        return CaptureMode(asked, "as set", *numbers)
    if free_bytes is None:
        return CaptureMode(PASSIVE, "auto: free memory is not known here", *numbers)
    share = logits_bytes / max(free_bytes, 1)
    large = share > LARGEST_SHARE
    rule = (
        f"auto: logits of a micro-batch take {readable(logits_bytes)}, {share:.1%} of the "
        f"{readable(free_bytes)} free; the limit is {LARGEST_SHARE:.0%}"
    )
    if large and obstacle is not None:
        return CaptureMode(PASSIVE, f"{rule}, but {obstacle}", *numbers)
    return CaptureMode(REPLACE if large else PASSIVE, rule, *numbers)


def earlier_mode(asked: str, manifest: Mapping[str, Any]) -> CaptureMode | None:
    """Mode that "auto" chose when the run was started; None if it is to be chosen now.

    A resumed run continues bitwise, and free memory is not what it was.
    """
    entry = manifest.get("capture")
    if not entry or not asked == manifest["config"].get("capture_mode") == AUTO:
        return None
    return CaptureMode(**{name: entry.get(name) for name in CaptureMode.__dataclass_fields__})


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody says.

    Parameters
    ----------
    device : torch.device
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def readable(count: int) -> str:
    """Bytes in the unit that fits, e.g. ``1.5 GiB``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"
