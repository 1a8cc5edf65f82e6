"""What a source is, told by what its files hold; two tools in one source are an error."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from wapo_analysis.errors import UserError, few, printable, unknown_name
from wapo_analysis.importers import console
from wapo_analysis.importers.boards import DOWNLOAD, is_panel
from wapo_analysis.importers.jsonl import JsonLines
from wapo_analysis.importers.mapping import NameTable
from wapo_analysis.importers.packed import PAGES, head_of, plain_file
from wapo_analysis.importers.readers import csv_header, is_csv, is_json_lines
from wapo_analysis.importers.report import shown
from wapo_analysis.importers.shapes import holds_table, may_be_log, text_lines
from wapo_analysis.store import is_run
from wapo_analysis.store.files import open_regular

Format = Literal[
    "official", "prime-rl", "verl", "trl", "table", "tensorboard", "wandb", "mlflow", "console"
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)
MAX_FILES = 200_000
LOOKED_FOR = (
    "trainer states (log_history), metrics as JSON or JSON lines, CSV, Parquet, tables in a text, "
    "TensorBoard event files, .wandb files, MLflow metrics, printed dicts, and lines "
    "step:N - name:value, step=N name=value or Step N | name: value"
)
#: What files are that cannot hold a log for us, by suffix; said when one is named.
UNREAD = {
    ".pkl": "a pickle can run code", ".pickle": "a pickle can run code",
    ".pt": "a pickle can run code", ".xlsx": "a workbook", ".xls": "a workbook",
    ".ods": "a workbook", ".db": "a database", ".sqlite": "a database",
    ".duckdb": "a database", ".yaml": "YAML", ".yml": "YAML", ".npz": "arrays", ".npy": "arrays",
    ".h5": "arrays", ".feather": "Arrow", ".arrow": "Arrow", ".zip": "an archive",
    ".tar": "an archive", ".tgz": "an archive", ".zst": "compressed by zstandard",
    ".png": "a picture", ".pdf": "a document",
}  # fmt: skip
_SEARCHED = 16 << 20
# By kind of file: the format it belongs to.
_FORMAT_OF: Mapping[str, Format] = {
    "official": "official", "prime-rl": "prime-rl", "verl-metrics": "verl",
    "verl-rollouts": "verl", "state": "trl", "completions": "trl", "swift-log": "trl",
    "trainer-log": "trl", "table": "table", "panel": "wandb", "wandb": "wandb",
    "wandb-file": "wandb", "download": "tensorboard", "tensorboard": "tensorboard",
    "mlflow": "mlflow", "console": "console",
}  # fmt: skip
# One run may be logged to several of these; the first that is there is read.
_CONTAINERS = ("tensorboard", "wandb", "mlflow", "table", "console")
# Kinds whose records carry their step, so that a copy of a file would count it twice.
_ONCE = ("table", "completions", "panel")
_SKIPPED = (".png", ".svg", ".pdf", ".html", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".npy",
            ".gguf", ".model", ".so", ".zip", ".tar", ".py", ".md", ".yaml", ".yml", ".zst", ".sh",
            ".lock", ".h5", ".pkl", ".ipynb", ".htm")  # fmt: skip
# A bracket may as well open a time or a rank, as in [rank0]: or [2026-03-01 12:00:00].
_JSON = re.compile(r"""\{(?!')|\[\s*(?:[{\["\]]|null|$|[-+.\deE]+\s*(?:,|\](?!\s*\w)))""")
# A line of MLflow's file store: time in milliseconds, number, step.
_MLFLOW = re.compile(rb"\d{13} [-+.\deEinfaN]+ \d+\n")
# A scalar that TensorBoard lets one download as JSON: time, step, number.
_SCALARS = re.compile(r"\[\s*\[\s*\d{9,}[\d.eE+]*\s*,\s*\d+\s*,\s*[^,\]]+\]")
_DIGITS = re.compile(r"\d+")
_SCATTER = re.compile(r"scatter_step_\d+\.npz")
_OFFICIAL_FOLDERS = ("token_bins", "grad_mass", "token_count", "token_strength", "rewards")
_OFFICIAL_KEYS = (b"groups/with_correct", b"prob_train_mean", b"masking/neg_adv_seq_fraction")


@dataclass(frozen=True)
class Found:
    """What a source is.

    Attributes
    ----------
    format : str
        One of ``FORMATS``.
    files : tuple of Path
        The files to read.
    kinds : dict of Path to str
        What each of them is.
    left : tuple of Path
        Logs of another form beside them that are not read.
    told : tuple of str
        What was done with copies of a file and with damaged compressed ones.
    """

    format: Format
    files: tuple[Path, ...]
    kinds: Mapping[Path, str] = field(default_factory=dict)
    left: tuple[Path, ...] = ()
    told: tuple[str, ...] = ()

    def of(self, *kinds: str) -> tuple[Path, ...]:
        """Files of some kinds."""
        return tuple(file for file in self.files if self.kinds.get(file) in kinds)


def detect(
    source: Path, wanted: str = "auto", unpacked: Path | None = None,
    names: NameTable | None = None,
) -> Found:  # fmt: skip
    """Format of a file or folder.

    Raises UserError if there is nothing to import, the source is a run already, the format is
    unknown or not there, or files of two formats are mixed (the message names one of each).

    Parameters
    ----------
    source : Path
        What the user named.
    wanted : str
        ``"auto"``, or a format that overrides what is found.
    unpacked : Path, optional
        Folder for what has to be unpacked; without it compressed files are left out.
    names : NameTable, optional
        Names of the user's, by which a table is known as a log.
    """
    if wanted not in ("auto", *FORMATS):
        raise unknown_name("format", wanted, ("auto", *FORMATS))
    name = printable(shown(source))
    if not source.exists():
        raise UserError(f"nothing at {name}")
    if not source.is_file() and not source.is_dir():
        raise UserError(f"{name} is neither a file nor a folder")
    if is_run(source):
        raise UserError(f"{name} is a run already; it needs no import")
    files = [source] if source.is_file() else list(_files(source))
    told: list[str] = []
    plain = (plain_file(file, source, unpacked, told) for file in files)
    files = [file for file in plain if file is not None]
    if not any(file.stat().st_size for file in files):
        what = "is empty" if source.is_file() else "is not a run, and is empty"
        raise UserError(f"{name} {what}: there is nothing to import")
    kinds = _kinds(files, named=source.is_file())
    if source.is_dir() and wanted == "auto":
        printed = {file for file, kind in kinds.items() if kind == "console"}
        kinds = _without_data(kinds, names or NameTable({}), told)
        if "official" not in kinds.values():  # whose reader finds its files by their place
            told += _told_odd([file for file in files if file not in printed], kinds)
    copies = _copies([file for file, kind in kinds.items() if kind in _ONCE])
    kinds = {file: kind for file, kind in kinds.items() if file not in copies}
    told += _told_copies(copies)
    found = _by_format(kinds)
    if wanted != "auto":
        return _found(wanted, found, kinds, _wanted(found, wanted, files, name), told)
    if not found and source.is_file() and source.suffix.lower() in UNREAD:
        what = UNREAD[source.suffix.lower()]
        advice = "unpack it" if what == "an archive" else "save it as CSV, JSON or Parquet"
        raise UserError(f"{name} is not read ({what}): {advice}")
    if not found:
        why = console.end_in_error(source) if source.is_file() else ""
        why = f"; {printable(why)}" if why else ""
        raise UserError(f"no known file in {name}{why}; looked for {LOOKED_FOR}")
    tools = [format for format in found if format not in _CONTAINERS]
    if len(tools) > 1:
        first, second = tools[:2]
        one, two = found[first][0].name, found[second][0].name
        raise UserError(
            f"{name} mixes formats: {one} is {first}, {two} is {second}; "
            "name one of the two, or of their folders"
        )
    chosen = tools[0] if tools else next(f for f in _CONTAINERS if f in found)
    return _found(chosen, found, kinds, found[chosen], told)


def _found(
    format: str, found: Mapping[str, list[Path]], kinds: Mapping[Path, str], files: list[Path],
    told: list[str],
) -> Found:  # fmt: skip
    others = [f for name in _CONTAINERS if name != format for f in found.get(name, ())]
    # JSON beside a log is settings; an official run reads its own.
    logs = [f for f in others if f.suffix != ".json" and format != "official"]
    mine = {file: kinds.get(file, format) for file in files}
    return Found(cast(Format, format), tuple(files), mine, tuple(logs), tuple(told))


def _wanted(
    found: Mapping[str, list[Path]], wanted: str, files: list[Path], name: str
) -> list[Path]:
    if wanted in found:
        return found[wanted]
    tables = [file for file in files if file.stat().st_size and file.suffix in _TABLES]
    if wanted == "table" and tables:
        return tables
    told = f"; it looks like {', '.join(found)}" if found else f"; looked for {LOOKED_FOR}"
    raise UserError(f"nothing of format {wanted!r} in {name}{told}")


_TOLD_FILES = 4
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def _files(folder: Path) -> Iterator[Path]:
    """Files at or below a folder in the order of their names, hidden ones left out."""
    count = 0
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file():
            count += 1
            if count > MAX_FILES:
                raise UserError(f"{folder} holds more than {MAX_FILES} files; name a part of it")
            yield file


def _kinds(files: list[Path], named: bool) -> dict[Path, str]:
    """What each file is; files that are no log are left out, unless one is named by itself."""
    kinds = {file: _by_place(file) or _by_content(file, named) for file in files}
    return {file: kind for file, kind in kinds.items() if kind is not None}


def _without_data(kinds: dict[Path, str], names: NameTable, told: list[str]) -> dict[Path, str]:
    """Without tables that are no logs, and printed logs without reward beside some with one."""
    tables = [file for file, kind in kinds.items() if kind == "table"]
    data = {file for file in tables if not may_be_log(file, names)}
    data = data if len(data) < len(kinds) else set()
    printed = [file for file, kind in kinds.items() if kind == "console"]
    if len(kinds) - len(data) == len(printed):
        poor = {f for f in printed if not console.holds_reward(console.console_lines(f))}
        prime = {f for f in printed if console.of_prime_rl(console.console_lines(f))}
        if prime - poor:  # its trainer and its orchestrator print apart
            poor -= prime
        if 0 < len(poor) < len(printed):
            data |= poor
            left = few((shown(file.name) for file in sorted(poor)), _TOLD_FILES)
            told.append(f"also there, without a reward, not read: {left}")
    return {file: kind for file, kind in kinds.items() if file not in data}


def _told_copies(copies: set[Path]) -> list[str]:
    """Say which files are not read because another holds the same; of many only how many."""
    names = sorted(shown(file.name) for file in copies)
    if len(names) > _TOLD_FILES:
        what = f"{len(names)} files hold the same bytes as another file, read once"
        return [f"{what}: {few(names, _TOLD_FILES)}"]
    return [f"{name} holds the same bytes as another file: read once" for name in names]


def _told_odd(files: list[Path], kinds: Mapping[Path, str]) -> list[str]:
    """Say which files are not read though their names differ from read ones in digits alone."""
    read = {_DIGITS.sub("0", file.name) for file in kinds if _DIGITS.search(file.name)}
    odd = [file for file in files if file not in kinds and _DIGITS.sub("0", file.name) in read]
    names = [shown(file.name) for file in odd if file.stat().st_size]
    what = "named like the files that are read, but no log of that kind: not read"
    return [f"{few(names, _TOLD_FILES)}: {what}"] if names else []


def _copies(files: list[Path]) -> set[Path]:
    """Files that hold the same bytes as one before them."""
    sizes: dict[int, list[Path]] = {}
    for file in files:
        sizes.setdefault(file.stat().st_size, []).append(file)
    copies: set[Path] = set()
    for alike in sizes.values():
        seen: set[bytes] = set()
        for file in alike if len(alike) > 1 else ():
            with open_regular(file) as stream:
                digest = hashlib.file_digest(stream, "sha256").digest()
            if digest in seen:
                copies.add(file)
            seen.add(digest)
    return copies


def _by_format(kinds: Mapping[Path, str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file, kind in kinds.items():
        found.setdefault(_FORMAT_OF[kind], []).append(file)
    # A trainer's state is written by every trainer built on Transformers, the official one too.
    if {"official", "trl"} == set(found) - set(_CONTAINERS):
        if all(kinds[file] == "state" for file in found["trl"]):
            del found["trl"]
    states = [file for file in found.get("trl", ()) if kinds[file] == "state"]
    if states and states == found["trl"] and any(_is_official(file) for file in states):
        found["official"] = found.pop("trl")
    return found


def _is_official(state: Path) -> bool:
    with open_regular(state) as stream:
        text = stream.read()
    return any(key in text for key in _OFFICIAL_KEYS)


def _by_place(file: Path) -> str | None:
    """What files are whose format is known by where they lie: arrays and streams."""
    parents = [*(parent.name for parent in file.parents), "", ""]
    holder = parents[1] if file.parent.name in _OFFICIAL_FOLDERS else parents[0]
    telling = file.parent.name in _OFFICIAL_FOLDERS or _SCATTER.fullmatch(file.name)
    if telling and holder == "data":
        return "official"
    if file.name.endswith((".jsonl", ".jsonl.zst")) and _is_prime(file.name, parents):
        return "prime-rl"
    return None


def _is_prime(name: str, parents: list[str]) -> bool:
    if name.startswith("rank_"):
        return "token_exports" in parents[:2]
    if name == "metrics.jsonl":
        return parents[:2] == ["file", "monitors"]
    # traces/stream.jsonl, traces/annotations/trainer.jsonl, or folders of numbered parts.
    stream = name.startswith("stream.") or parents[0] == "stream"
    return "traces" in parents[:3] and (stream or "annotations" in parents[:2])


def _by_content(file: Path, named: bool) -> str | None:
    head = head_of(file)
    if not head:
        return None
    if head.startswith(b"PAR1"):
        return _parquet_kind(file)
    if head.startswith(b":W&B"):
        return "wandb"
    if b"brain.Event:" in head[:64]:
        return "tensorboard"
    page = file.suffix in PAGES  # by now what it shows, as text
    if file.suffix in _SKIPPED and not (named and (page or file.suffix == ".md")):
        return None
    if _MLFLOW.match(head):
        return "mlflow"
    text = head.decode("utf-8-sig", "replace").lstrip()
    if file.suffix in (".csv", ".tsv"):
        return _csv_kind(file)
    if _JSON.match(text) and not page:
        return _json_kind(file, text)
    if file.suffix == ".parquet":
        return "table"
    if file.parent.name == "files" and file.name == "output.log":
        return "wandb-file"
    if file.suffix in (".jsonl", ".ndjson", ".json"):
        return "table"
    if is_csv(text) and not page:
        return _csv_kind(file)
    if b"\0" in head:
        return None
    # What cells of a notebook print between the rows of its table may look like a log's lines.
    if page and holds_table(text_lines(file), least=8) and not _tells(file, named=False):
        return "table"
    return "console" if _tells(file) else "table" if holds_table(text_lines(file)) else None


def _tells(file: Path, named: bool = True) -> bool:
    lines = (line for _, line in console.console_lines(file))
    return console.tells(islice(lines, _SEARCHED >> 8), named)


def _csv_kind(file: Path) -> str:
    names, _ = csv_header(file)
    if [name.lower() for name in names] == [name.lower() for name in DOWNLOAD]:
        return "download"
    return "panel" if is_panel(names) else "table"


def _parquet_kind(file: Path) -> str:
    """TRL's completions have a step, a prompt, a completion and no column for the reward."""
    try:
        with open_regular(file) as stream:
            names = set(pq.ParquetFile(stream).schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return "completions" if re.fullmatch(r"completions_\d+\.parquet", file.name) else "table"
    rewarded = names & {"reward", "score", "rewards"}
    logged = {"step", "prompt", "completion"} <= names and not rewarded
    return "completions" if logged else "table"


def _json_kind(file: Path, head: str) -> str | None:
    first_line, feed, _ = head.partition("\n")
    lines = file.suffix == ".json" and is_json_lines(file)
    whole = not lines and (file.suffix == ".json" or not feed or first_line.strip() in "{[")
    if file.parent.name == "files" and file.name == "wandb-summary.json":
        return "wandb-file"
    if file.name == "trainer_state.json":
        return "state"
    if whole and head.startswith("{"):
        if b'"log_history"' in head_of(file, _SEARCHED):
            return "state"
    if whole and _SCALARS.match(head):
        return "download"
    if whole and (head.startswith("[") or file.suffix == ".json"):
        return "table"
    log = JsonLines(file)
    first = record.values if (record := next(log.records(), None)) else log.tail()[0] or {}
    if {"trainer_logprobs", "inference_logprobs", "loss_mask"} <= first.keys():
        return "prime-rl"
    if isinstance(first.get("data"), dict) and first["data"] and "step" in first:
        return "verl-metrics"
    if {"input", "output", "score"} <= first.keys():
        return "verl-rollouts"
    if isinstance(first.get("completion"), list) and isinstance(first.get("prompt"), list):
        return "completions"
    if "global_step/max_steps" in first:
        return "swift-log"
    if {"current_steps", "total_steps"} <= first.keys():
        return "trainer-log"
    return "table"
