"""Word problems written from templates, easy enough for a small model, and a reward for them."""

import json
import re
from pathlib import Path

import numpy as np

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
_THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")
_TEMPLATES = (
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", 1),
    ("{n} has {a} {t} and gives {b} away. How many {t} are left?", -1),
)


def write_word_problems(file: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` distinct problems with their answers, one JSON line each."""
    rng = np.random.default_rng(seed)
    rows: dict[str, int] = {}
    while len(rows) < count:
        text, sign = _TEMPLATES[rng.integers(len(_TEMPLATES))]
        b = int(rng.integers(1, 10))
        a = b + int(rng.integers(1, 10))
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        rows[text.format(n=name, t=thing, a=a, b=b)] = a + sign * b
    lines = (json.dumps({"prompt": p, "answer": str(a)}) + "\n" for p, a in rows.items())
    file.write_text("".join(lines))
    return file


def names_answer(completion: str, answer: str) -> float:
    """1 if the answer is among the numbers of the completion."""
    return float(answer in re.findall(r"\d+", completion))
