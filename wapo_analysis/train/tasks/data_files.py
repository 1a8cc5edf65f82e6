"""Rows of a data file or of a hub data set: read, counted, and split into training and held-out.

Reading and judging are apart: this module says what stands where, ``base`` what can be used.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wapo_analysis.errors import UserError, counted, few, first_line
from wapo_analysis.store.files import open_regular

if TYPE_CHECKING:
    from wapo_analysis.train.tasks.base import Problem

LINES: Final = (".jsonl", ".ndjson")
SUFFIXES: Final = (*LINES, ".json", ".parquet")
ALLOWED: Final = (
    f"allowed: a file ({', '.join(SUFFIXES)}), a folder of them, "
    "or a hub name NAME[:CONFIG[:SPLIT]]"
)
_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_DATA_BYTES = 1 << 36  # most bytes of a data file, which is read whole


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data."""

    #: ``"line 4"`` of a file of lines, ``"row 4"`` elsewhere; counted from 1.
    where: str
    #: The fields, or None if the row cannot be read.
    values: dict[str, Any] | None
    #: Why it cannot be read.
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """All rows of one source."""

    #: As the user gave it.
    name: str
    #: Of the file's bytes; of the rows as sorted JSON for a folder or a hub name.
    sha256: str
    rows: list[Row]


def read_rows(name: str) -> Source:
    """Read every row of a file, a folder or a hub data set.

    Broken rows are marked, not raised. Raises UserError if there is no such file, the whole of it
    cannot be read, or it holds no row. ``name``: a ``.jsonl``, ``.ndjson``, ``.json`` or
    ``.parquet`` file, a folder of such files, or a hub name ``NAME[:CONFIG[:SPLIT]]``. The split is
    ``train`` unless given. The last two are read by the package ``datasets``.
    """
    path = Path(name)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        source = _read_file(name, path)
    else:
        source = _read_hub(name)
    if not source.rows:
        raise UserError(f"{name} holds no row")
    return source


def _read_file(name: str, path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot read {name}: unknown suffix {suffix!r}; {ALLOWED}")
    try:
        with open_regular(path, _DATA_BYTES) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise UserError(f"no data file at {name}; {ALLOWED}") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    if suffix == ".parquet":
        return Source(name, digest, _parquet(name, data))
    data = data.removeprefix(_BYTE_ORDER_MARK)
    rows = list(_lines(data)) if suffix in LINES else _json(name, data)
    return Source(name, digest, rows)


def _lines(data: bytes) -> Iterator[Row]:
    """JSON objects, one a line; blank lines are no rows."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _line(f"line {number}", line)


def _line(where: str, line: bytes) -> Row:
    try:
        return _row(where, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(where, None, f"broken JSON ({first_line(error).split(':')[0]})")


def _row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        return Row(where, None, f"not a JSON object but {type(values).__name__}")
    return Row(where, values)


def _json(name: str, data: bytes) -> list[Row]:
    """Rows of a JSON list; a file of JSON lines under the name .json is read as such."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"{"):
            return list(_lines(data))
        raise UserError(f"{name} is not valid JSON: {first_line(error)}") from error
    if isinstance(whole, list):
        return [_row(f"row {number}", values) for number, values in enumerate(whole, start=1)]
    if isinstance(whole, dict) and b"\n" not in data.strip():
        return [_row("line 1", whole)]
    raise UserError(f"{name} must hold a list of rows or one JSON object a line")


def _parquet(name: str, data: bytes) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not valid Parquet: {first_line(error)}") from error
    return [Row(f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


def _read_hub(name: str) -> Source:
    """Rows of a folder or hub data set, through the package ``datasets``."""
    base, config, split = (*name.split(":"), "", "")[:3]
    if name.count(":") > 2 or not (base and (Path(base).is_dir() or _HUB_NAME.fullmatch(base))):
        raise UserError(f"no data at {name}; {ALLOWED}")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading {name} needs the package datasets: pip install 'wapo-analysis[data]'"
        ) from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(base, config or None, split=split or "train")
        rows = [Row(f"row {n}", dict(values)) for n, values in enumerate(found, start=1)]
    except Exception as error:  # each hub, builder and file reader has exceptions of its own
        raise UserError(f"cannot load data set {name}: {first_line(error).rstrip('.')}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return Source(name, digest.hexdigest(), rows)


def digest(question: str) -> int:
    """First 64 bits of a question's SHA-256."""
    return int.from_bytes(hashlib.sha256(question.encode("utf-8")).digest()[:8], "big")


def is_held_out(question: str, fraction: float) -> bool:
    """Whether the SHA-256 of a question, as a fraction of the largest, is below ``fraction``."""
    return digest(question) < fraction * 2.0**64


def split(
    problems: "list[tuple[str, Problem]]", fraction: float
) -> "tuple[list[Problem], list[Problem]]":
    """Split problems by their questions.

    Returns ``train`` (in the order given) and ``held_out`` (in the order of their digests).
    ``problems``: question and problem. ``fraction``: in [0, 1). If it is above 0 and there are two
    questions or more, neither side is empty.
    """
    values = sorted({digest(question) for question, _ in problems})
    count = sum(value < fraction * 2.0**64 for value in values)
    if fraction > 0:
        count = min(max(count, 1), len(values) - 1)
    held = set(values[:count])
    train = [problem for question, problem in problems if digest(question) not in held]
    chosen = [(digest(q), problem) for q, problem in problems if digest(q) in held]
    return train, [problem for _, problem in sorted(chosen, key=lambda pair: pair[0])]


#: Share of unusable rows above which a file is refused.
MAX_BAD_SHARE: Final = 0.05
_SHOWN: Final = 5
_RECORDED: Final = 100


class DataRefused(UserError):
    """Too much of a source is unusable; ``report`` says what."""

    def __init__(self, message: str, report: "DataReport") -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class DataReport:
    """Account of one source of rows."""

    task: str
    source: str
    sha256: str
    #: Rows found, usable or not.
    rows: int
    #: Every unusable row, as ``"line 4: no 'question'"``.
    skipped: tuple[str, ...] = ()
    #: Every row that says again what an earlier one says, used once.
    repeated: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Rows that became problems."""
        return self.rows - len(self.skipped) - len(self.repeated)

    def check(self, fields: str = "") -> None:
        """Refuse a source that is mostly not what it should be.

        Raises DataRefused if no row can be used, or more than 5 % of the rows cannot. ``fields``:
        fields that the rows do have, for the message.
        """
        if self.used and len(self.skipped) <= MAX_BAD_SHARE * self.rows:
            return
        found = f" (fields found: {fields})" if fields else ""
        raise DataRefused(
            f"{self.task}: {len(self.skipped)} of {self.rows} rows of {self.source} cannot be "
            f"used, more than {MAX_BAD_SHARE:.0%}: {few(self.skipped, _SHOWN)}{found}",
            self,
        )

    def to_line(self) -> str:
        """One line on what was left out, empty if nothing was."""
        parts = []
        if self.skipped:
            parts.append(
                f"{len(self.skipped)} of {self.rows} rows of {self.source} skipped: "
                + few(self.skipped, _SHOWN)
            )
        if self.repeated:
            many = counted(len(self.repeated), "repeated row")
            parts.append(f"{many} of {self.source} left out: {few(self.repeated, _SHOWN)}")
        return f"{self.task}: {'; and '.join(parts)}" if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest; the first hundred rows left out are named."""
        return {
            "file": self.source,
            "sha256": self.sha256,
            "rows": self.rows,
            "used": self.used,
            "skipped_rows": len(self.skipped),
            "skipped": list(self.skipped[:_RECORDED]),
            "repeated_rows": len(self.repeated),
            "repeated": list(self.repeated[:_RECORDED]),
        }
