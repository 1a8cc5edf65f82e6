"""Reading golden folders: plain JSON and npz, no pickle; every mistake names its file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wapo_analysis.errors import UserError

Array = NDArray[Any]

SMALL = Path(__file__).parents[1] / "data" / "gold"
"""Six cases, all rows and all hazards of a larger set."""

ADVANTAGES_FILE = "advantages.json"
HAZARDS_FILE = "hazards.json"

INPUT_ARRAYS = (
    "input_ids",
    "seq_len",
    "prompt_len",
    "loss_mask",
    "inference_logprobs",
    "logits",
    "rewards",
    "group_ids",
    "microbatch_index",
    "minibatch_index",
    "process_index",
)
"""Arrays a case cannot be replayed without."""

_SETTING_KEYS = (
    "loss_type",
    "clip_eps",
    "mask_ratio_low",
    "mask_ratio_high",
    "use_importance_sampling",
    "token_bin_counting",
    "normalize_by_kept_tokens",
    "mask_negative_advantages",
    "mask_positive_advantages",
    "max_seq_len",
    "num_processes",
    "train_temperature",
    "rollouts_per_example",
    "num_mini_batches",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One golden case: its description and its arrays."""

    name: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings the official code ran with."""
        settings: Mapping[str, Any] = self.meta["settings"]
        return settings

    @property
    def counts_bins(self) -> bool:
        """Whether the official run looked at classes at all."""
        return bool(self.settings["token_bin_counting"])


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises
    ------
    UserError
        If the file cannot be read or is not strict JSON.
    """

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not strict JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read golden file {path}: {error}") from error


def read_arrays(path: Path) -> dict[str, Array]:
    """Read every array of an npz file without unpickling anything.

    Raises
    ------
    UserError
        If the file is missing, damaged or holds pickled objects.
    """
    try:
        # An own handle is closed for certain; numpy leaves one open when the archive is damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, TypeError) as error:
        raise UserError(f"cannot read golden file {path}: {error}") from error


def rows_of(path: Path) -> list[Mapping[str, Any]]:
    """Rows of advantages.json or hazards.json.

    Raises
    ------
    UserError
        If the file is broken or holds no list ``rows``.
    """
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"golden file {path} holds no list 'rows'")
    return rows


def _check_case(path: Path, meta: Any, arrays: Mapping[str, Array]) -> None:
    if not isinstance(meta, dict) or not isinstance(meta.get("settings"), dict):
        raise UserError(f"golden file {path} holds no 'settings'")
    lacking = [key for key in _SETTING_KEYS if key not in meta["settings"]]
    if lacking:
        raise UserError(f"golden file {path} lacks the settings {', '.join(lacking)}")
    lacking = [key for key in INPUT_ARRAYS if key not in arrays]
    if lacking:
        raise UserError(f"golden file {path.with_suffix('.npz')} lacks {', '.join(lacking)}")
    shape = arrays["input_ids"].shape
    fits = (
        len(shape) == 2
        and arrays["logits"].ndim == 3
        and all(arrays[name].shape == shape for name in ("loss_mask", "inference_logprobs"))
        and arrays["logits"].shape[:2] == shape
        and all(arrays[name].shape[:1] == shape[:1] for name in INPUT_ARRAYS)
    )
    if not fits:
        raise UserError(f"golden file {path.with_suffix('.npz')}: array shapes do not agree")


def read_case(path: Path) -> Case:
    """Read the case ``path`` (JSON) and the npz of the same name beside it.

    Raises
    ------
    UserError
        If a file is missing or damaged, or an input is not there.
    """
    meta, arrays = read_json(path), read_arrays(path.with_suffix(".npz"))
    _check_case(path, meta, arrays)
    return Case(path.stem, meta, arrays)


def case_paths(folder: Path) -> list[Path]:
    """JSON files of a folder's cases, sorted; each must have its npz, each npz its JSON.

    Raises
    ------
    UserError
        If the folder does not exist, holds nothing to check, or half of a case.
    """
    if not folder.is_dir():
        raise UserError(f"golden folder {folder} does not exist or is not a folder")
    special = {ADVANTAGES_FILE, HAZARDS_FILE}
    described = {p.stem for p in folder.glob("*.json") if p.name not in special}
    stored = {p.stem for p in folder.glob("*.npz")}
    halves = sorted(stored - described) + sorted(described - stored)
    if halves:
        missing = ".json" if halves[0] in stored else ".npz"
        raise UserError(f"golden case {halves[0]!r} in {folder} has no {missing} file")
    if not described and not any((folder / name).is_file() for name in special):
        raise UserError(f"golden folder {folder} holds no case (*.json with *.npz beside it)")
    return [folder / f"{stem}.json" for stem in sorted(described)]
