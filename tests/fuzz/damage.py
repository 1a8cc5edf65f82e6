"""Damage to one file of a source or a run: to its bytes, or to what it says."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.draws import Draws

Damage = Callable[[Path, Draws], None]

ODD: tuple[Any, ...] = (
    None, True, "", "x", "NaN", "1e999", -1, 0, 2**31, 2**63, 2**64, -(2**70), 10**30, 1.5, 1e308,
    -0.0, float("nan"), float("inf"), [], {}, [[]], [None], {"a": 1}, [1, "x", None], "\0",
    "\x1b[31m", "\u202e", "\ud800", "\ufeffstep", "a" * 5000, list(range(300)), {"step": [1]},
)  # fmt: skip
"""Values that stand where another kind of value is expected."""
DEEP = "[" * 3000 + "]" * 3000


def files_of(folder: Path) -> list[Path]:
    """Regular files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(folder: Path, draws: Draws) -> str:
    """Damage one or two files of a folder; says what was done."""
    done = []
    for _ in range(1 + draws.chance(20)):
        files = files_of(folder)
        if not files:
            break
        file = draws.pick(files)
        kinds = _KINDS.get(file.suffix, ())
        how = draws.pick(kinds) if kinds and draws.chance(65) else draws.pick(_ANY)
        try:
            how(file, draws)
        except Exception:  # a second damage may not find what it needs
            continue
        done.append(f"{how.__name__} {file.relative_to(folder)}")
    return ", ".join(done) or "nothing"


# ---- any file ------------------------------------------------------------------------------------


def flipped_bits(file: Path, draws: Draws) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(1 + draws.number(3)):
        if content:
            content[draws.number(len(content))] ^= 1 << draws.number(8)
    file.write_bytes(content)


def cut_short(file: Path, draws: Draws) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draws.number(len(content) + 1)])


def piece_lost(file: Path, draws: Draws) -> None:
    content = file.read_bytes()
    start = draws.number(len(content) + 1)
    file.write_bytes(content[:start] + content[start + 1 + draws.number(200) :])


def piece_twice(file: Path, draws: Draws) -> None:
    content = file.read_bytes()
    start = draws.number(len(content) + 1)
    end = start + 1 + draws.number(500)
    file.write_bytes(content[:end] + content[start:end] + content[end:])


def bytes_put_in(file: Path, draws: Draws) -> None:
    content = file.read_bytes()
    start = draws.number(len(content) + 1)
    file.write_bytes(content[:start] + draws.bytes(1 + draws.number(40)) + content[start:])


def emptied(file: Path, draws: Draws) -> None:
    file.write_bytes(b"")


def zeroed(file: Path, draws: Draws) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def deleted(file: Path, draws: Draws) -> None:
    file.unlink()


def folder_instead(file: Path, draws: Draws) -> None:
    file.unlink()
    file.mkdir()


def pipe_instead(file: Path, draws: Draws) -> None:
    file.unlink()
    os.mkfifo(file)


def link_to_itself(file: Path, draws: Draws) -> None:
    file.unlink()
    file.symlink_to(file.name)


def device_instead(file: Path, draws: Draws) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def copied_beside(file: Path, draws: Draws) -> None:
    name = draws.pick((f"{file.stem} (1){file.suffix}", f"{file.name}~", f".{file.name}", "x y.z"))
    shutil.copy(file, file.with_name(name))


def copied_over_another(file: Path, draws: Draws) -> None:
    shutil.copy(file, draws.pick(files_of(file.parent)).with_name("copied" + file.suffix))


# ---- JSON ----------------------------------------------------------------------------------------


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        found += [p for k in list(value)[:40] for p in _places(value[k], (*path, k))]
    elif isinstance(value, list):
        found += [p for k in range(min(len(value), 12)) for p in _places(value[k], (*path, k))]
    return found


def _changed(value: Any, draws: Draws) -> Any:
    """Change one place of a JSON value."""
    path = draws.pick(_places(value))
    if not path:
        return draws.pick(ODD)
    at = value
    for key in path[:-1]:
        at = at[key]
    act = draws.number(10)
    if act == 0:
        del at[path[-1]]
    elif act == 1 and isinstance(at, dict):
        at[draws.pick(("", "step", "a b", "\0", "__class__", "Step"))] = at[path[-1]]
    elif act == 2 and isinstance(at, list):
        at.insert(0, at[path[-1]])
    else:
        at[path[-1]] = draws.pick(ODD)
    return value


def _written(value: Any, draws: Draws) -> bytes:
    text = json.dumps(value, ensure_ascii=draws.chance(70))
    return text.encode("utf-8", "surrogatepass")


def json_value(file: Path, draws: Draws) -> None:
    file.write_bytes(_written(_changed(json.loads(file.read_bytes()), draws), draws))


def json_line(file: Path, draws: Draws) -> None:
    lines = file.read_bytes().splitlines()
    place = draws.number(len(lines))
    lines[place] = _written(_changed(json.loads(lines[place]), draws), draws)
    file.write_bytes(b"\n".join(lines) + b"\n")


def lines_mixed(file: Path, draws: Draws) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    first, second = draws.number(len(lines)), draws.number(len(lines))
    act = draws.number(4)
    if act == 0:
        lines[first], lines[second] = lines[second], lines[first]
    elif act == 1:
        lines.insert(first, lines[second])
    elif act == 2:
        lines.insert(
            first, draws.pick((b"\n", b"nonsense\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n"))
        )
    else:
        lines[first] = lines[first].strip() + lines[second]
    file.write_bytes(b"".join(lines))


def deep_json(file: Path, draws: Draws) -> None:
    content = file.read_bytes()
    place = draws.pick([i for i, c in enumerate(content) if c in b":,["] or [0])
    file.write_bytes(content[: place + 1] + DEEP.encode() + content[place + 1 :])


def other_encoding(file: Path, draws: Draws) -> None:
    text = file.read_text("utf-8", "replace")
    file.write_bytes(text.encode(draws.pick(("utf-16", "utf-8-sig", "utf-32", "cp037")), "replace"))


# ---- tables --------------------------------------------------------------------------------------


def _odd_column(length: int, draws: Draws) -> pa.Array:
    ints = [draws.number(1000) - 500 for _ in range(min(length, 50))]
    ints = (ints * (length // max(len(ints), 1) + 1))[:length]
    makers: tuple[Callable[[], pa.Array], ...] = (
        lambda: pa.nulls(length),
        lambda: pa.array(ints, pa.int64()),
        lambda: pa.array([float(i) * 1e300 * 1e10 for i in ints]),
        lambda: pa.array([str(i) for i in ints]),
        lambda: pa.array([[i] for i in ints]),
        lambda: pa.array([{"a": i} for i in ints]),
        lambda: pa.array([i > 0 for i in ints]),
        lambda: pa.array([b"\xff" for _ in ints], pa.binary()),
        lambda: pa.array([2**64 - 1] * length, pa.uint64()),
        lambda: pa.array(ints, pa.timestamp("us")),
        lambda: pa.array(ints, pa.duration("s")),
        lambda: pa.array([str(i) for i in ints]).dictionary_encode(),
        lambda: pa.array([None if i % 3 else 1.0 for i in ints]),
        lambda: pa.array([float("nan")] * length),
    )
    return draws.pick(makers)()


def parquet_column(file: Path, draws: Draws) -> None:
    table = pq.ParquetFile(file).read()
    place, act = draws.number(table.num_columns), draws.number(10)
    name = table.schema.names[place]
    if act == 0:
        table = table.drop_columns([name])
    elif act == 1:
        table = table.append_column(name, _odd_column(len(table), draws))
    elif act == 2:
        names = [draws.pick(("", "Step", "step ", name + "\0", "x")) if n == name else n
                 for n in table.schema.names]  # fmt: skip
        table = table.rename_columns(names)
    elif act == 3:
        table = table.slice(0, draws.number(len(table) + 1))
    elif act == 4:
        table = pa.concat_tables([table, table])
    else:
        table = table.set_column(place, name, _odd_column(len(table), draws))
    pq.write_table(table, file)


def parquet_metadata(file: Path, draws: Draws) -> None:
    table = pq.ParquetFile(file).read()
    held = dict(table.schema.metadata or {})
    key = draws.pick(list(held) or [b"wapo_steps"])
    held[key] = _written(draws.pick(ODD), draws)
    if draws.chance(30):
        held[b"wapo_steps"] = _written([[draws.pick(ODD), draws.pick(ODD)]], draws)
    pq.write_table(table.replace_schema_metadata(held), file)


def csv_cell(file: Path, draws: Draws) -> None:
    lines = file.read_text().splitlines()
    mark = "\t" if file.suffix == ".tsv" else ","
    place = draws.number(len(lines)) if draws.chance(60) else 0
    cells = lines[place].split(mark)
    cell = draws.number(len(cells))
    act = draws.number(6)
    if act == 0:
        cells.append(cells[cell])
    elif act == 1:
        del cells[cell]
    elif act == 2:
        cells = [f" {c} " for c in cells]
    elif act == 3:
        cells[cell] = f'"{cells[cell]}'
    else:
        cells[cell] = str(draws.pick(ODD)).replace("\ud800", "?")
    lines[place] = mark.join(cells)
    file.write_text("\n".join(lines) + "\n")


def npz_array(file: Path, draws: Draws) -> None:
    if file.suffix == ".npy":
        np.save(file, _odd_array(np.load(file), draws), allow_pickle=draws.chance(20))
        return
    with np.load(file) as held:
        arrays = {name: held[name] for name in held.files}
    name = draws.pick(sorted(arrays))
    act = draws.number(6)
    if act == 0:
        del arrays[name]
    elif act == 1:
        arrays["extra"] = arrays[name]
    else:
        arrays[name] = _odd_array(arrays[name], draws)
    np.savez_compressed(file, **arrays)


def _odd_array(values: np.ndarray, draws: Draws) -> np.ndarray:
    makers: tuple[Callable[[], np.ndarray], ...] = (
        lambda: values[:0],
        lambda: values.reshape(-1)[: draws.number(values.size + 1)],
        lambda: np.zeros((2, 2, 2)),
        lambda: np.array(draws.number(9)),
        lambda: np.full(values.shape, np.nan),
        lambda: np.full(values.shape, np.inf),
        lambda: np.full(values.shape, -1.0),
        lambda: np.full(values.shape, "x"),
        lambda: np.full(values.shape, b"y"),
        lambda: np.full(values.shape, 1 + 2j),
        lambda: np.full(values.shape, np.datetime64("2020-01-01")),
        lambda: np.full(values.shape, True),
        lambda: np.full(values.shape, 2**64 - 1, np.uint64),
        lambda: np.zeros(values.shape, [("a", "i4"), ("b", "f8")]),
        lambda: np.zeros(30_000_000, np.int8),
        lambda: np.array([{"a": 1}], dtype=object),
    )
    return draws.pick(makers)()


_ANY: tuple[Damage, ...] = (
    flipped_bits, flipped_bits, cut_short, piece_lost, piece_twice, bytes_put_in, emptied, zeroed,
    deleted, folder_instead, pipe_instead, link_to_itself, device_instead, copied_beside,
    copied_over_another,
)  # fmt: skip
_TEXT: tuple[Damage, ...] = (lines_mixed, deep_json, other_encoding)
_KINDS: dict[str, tuple[Damage, ...]] = {
    ".json": (json_value, json_value, json_value, *_TEXT),
    ".jsonl": (json_line, json_line, json_line, *_TEXT),
    ".parquet": (parquet_column, parquet_column, parquet_metadata),
    ".csv": (csv_cell, csv_cell, lines_mixed, other_encoding),
    ".tsv": (csv_cell, csv_cell, lines_mixed, other_encoding),
    ".npz": (npz_array,),
    ".npy": (npz_array,),
    ".toml": (lines_mixed, other_encoding),
}
