"""Sample completions with their tokens: what the policy wrote, and what the update did to it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.store import Run

MAX_TOKENS = 300
STRONGEST = 8
FULL_STRENGTH = 0.95
"""Quantile of the gradient norms of a step that is drawn at full strength."""
_KEY = ["rank", "group", "rollout"]


@dataclass(frozen=True)
class Token:
    """One token of a completion as the page shows it."""

    text: str
    cls: str
    strength: float
    title: str
    row: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One completion with its tokens, in order; no tokens if none were recorded."""

    step: int
    kind: str
    prompt: str
    completion: str
    answer: str
    reward: str
    advantage: str
    finish: str
    tokens: tuple[Token, ...]
    left_out: int

    @property
    def strongest(self) -> list[Token]:
        """Tokens with the largest gradient, largest first; those without any are left out."""
        ranked = sorted(self.tokens, key=lambda token: -token.strength)
        return [token for token in ranked if token.strength > 0][:STRONGEST]


def pick_samples(run: Run) -> list[Sample]:
    """Best and worst completion of the first and of the last recorded step.

    Parameters
    ----------
    run : Run
        An open run; steps that also have token rows are preferred.

    Returns
    -------
    list of Sample
        Up to four. Among equal rewards the one with the larger advantage, up or down, is taken,
        since only that one moved the policy.
    """
    rollouts = run.rollouts
    if rollouts.empty:
        return []
    with_text = sorted(set(rollouts["step"].astype(int)))
    shared = sorted(set(with_text) & set(run.token_steps())) or with_text
    ends = dict.fromkeys((shared[0], shared[-1]))
    tokens = _first_pass(run, list(ends))
    return [
        _sample(run, row, kind, tokens)
        for step in ends
        for kind, row in _best_and_worst(rollouts[rollouts["step"] == step])
    ]


def _best_and_worst(rollouts: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    ranked = rollouts.sort_values(["reward", "advantage"], kind="stable", na_position="first")
    if len(ranked) == 1:
        return [("only", ranked.iloc[0])]
    return [("best", ranked.iloc[-1]), ("worst", ranked.iloc[0])]


def _first_pass(run: Run, steps: list[int]) -> pd.DataFrame:
    """Token rows of some steps, each token as its first gradient pass saw it."""
    recorded = set(run.token_steps()) & set(steps)
    tokens = run.tokens(recorded).sort_values("minibatch", kind="stable")
    return tokens.drop_duplicates(["step", *_KEY, "position"])


def _sample(run: Run, row: pd.Series, kind: str, tokens: pd.DataFrame) -> Sample:
    of_step = tokens[tokens["step"] == row["step"]]
    mine = of_step[(of_step[_KEY] == row[_KEY].to_numpy()).all(axis=1)].sort_values("position")
    sizes = of_step["grad_norm"][of_step["grad_norm"] > 0]
    full = float(sizes.quantile(FULL_STRENGTH)) if len(sizes) else 1.0
    shown = mine.head(MAX_TOKENS)
    return Sample(
        step=int(row["step"]),
        kind=kind,
        prompt=_text(row["prompt"]),
        completion=_text(row["completion"]),
        answer=_text(row["answer"]),
        reward=_number(row["reward"]),
        advantage=_number(row["advantage"]),
        finish=_text(row["finish_reason"]),
        tokens=tuple(_token(run, token, full) for token in shown.to_dict("records")),
        left_out=len(mine) - len(shown),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _token(run: Run, row: dict[str, float], full: float) -> Token:
    token_id = int(row["token_id"])
    text = run.vocab.get(token_id) or f"[{token_id}]"
    cls = tax.CLASS_NAMES[int(row["cls"])]
    size = row["grad_norm"]
    strength = float(np.clip(size / full, 0, 1)) if np.isfinite(size) else 0.0
    cells = (
        visible(text),
        cls,
        _number(row["prob"]),
        _number(row["entropy"]),
        _number(row["advantage"]),
        _number(row["coef"]),
        _number(row["pred_dentropy"]),
    )
    title = (
        f"{cells[0]}: {cls}, p = {cells[2]}, H = {cells[3]} nats, A = {cells[4]}, "
        f"coef = {cells[5]}, predicted dH = {cells[6]}"
    )
    return Token(text, cls, strength, title, cells)


def visible(text: str) -> str:
    """Text with blanks and line breaks made visible."""
    marks = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}
    return "".join(marks.get(sign, sign) for sign in text)


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "n/a"
