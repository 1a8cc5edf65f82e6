"""From a recorded run to causes: which tokens, rollouts and prompts hold a step's gradient and dH.

What a class did to the path is :mod:`wapo_analysis.attribute.whatif`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.attribute.whatif import WhatIf, what_if
from wapo_analysis.derive import UPDATE_STATISTICS, class_names, run_sums, update_columns
from wapo_analysis.errors import UserError, printable
from wapo_analysis.probes import MEANINGS, set_name, three_numbers
from wapo_analysis.results import Block, Grid, Items, Result, Section, distinguishing, plain
from wapo_analysis.store import Run
from wapo_analysis.table import Array

__all__ = ["StepAttribution", "WhatIf", "attribute_step", "what_if"]

CONTEXT = 12
_TOKEN_KEYS = ["group", "rollout", "position"]
_SUMMED = ("mass", "pred_dentropy")
_MISSING_TEXT = "?"
#: Characters of a prompt or completion in a table.
_SHOWN_TEXT = 60


@dataclass(frozen=True, kw_only=True)
class StepAttribution(Result):
    """Where a step's update came from.

    Attributes
    ----------
    run : str
        Name of the run.
    step : int
        The step.
    grad_mass : float
        Sum of the exact norms of the logit gradients over the recorded tokens.
    pred_dentropy : float
        Sum of their first-order dH, nats per unit learning rate; NaN if not available.
    tokens, rollouts, prompts : DataFrame
        Largest holders of gradient mass first: keys, ``mass_share`` (of ``grad_mass``),
        ``pred_dentropy`` and ``pred_dentropy_share`` (of the sum of its sizes over tokens, signed).
        Tokens have ``token`` and
        ``context`` as text and the class; rollouts the reward; prompts their text and, as
        ``question``, what sets it apart from the step's other prompts.
    by_pred_dentropy : DataFrame
        Tokens again, largest predicted dH first, of either sign.
    three_numbers : DataFrame
        Predicted, counterfactual, measured per class, in ``tokens_of`` by name, if an update of the
        step was probed.
    fraction : float
        Share of the rollouts that has token rows.
    """

    run: str
    step: int
    grad_mass: float
    pred_dentropy: float
    tokens: pd.DataFrame
    by_pred_dentropy: pd.DataFrame
    rollouts: pd.DataFrame
    prompts: pd.DataFrame
    three_numbers: pd.DataFrame
    fraction: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        tables = ("tokens", "by_pred_dentropy", "rollouts", "prompts", "three_numbers")
        numbers = {name: getattr(self, name) for name in ("grad_mass", "pred_dentropy", "fraction")}
        records = {name: getattr(self, name).to_dict("records") for name in tables}
        found: dict[str, Any] = plain({"run": self.run, "step": self.step, **numbers, **records})
        return found

    @property
    def headline(self) -> str:
        """One sentence with the totals."""
        text = f"{self.run}, step {self.step}: gradient mass {self.grad_mass:.3g}"
        if isfinite(self.pred_dentropy):
            way = "a rise" if self.pred_dentropy > 0 else "a fall"
            text += f", predicted dH {self.pred_dentropy:+.3g} nats per unit learning rate ({way})"
        if self.fraction < 1:
            text += f"; from {self.fraction:.0%} of the rollouts"
        return text + "."

    def page(self) -> Section:
        """Tokens, rollouts and prompts by share, then predicted, class alone and measured."""
        tables: list[tuple[str, Grid]] = [
            ("Tokens by share of the gradient", _token_grid(self.tokens)),
            ("Tokens by share of the predicted dH", _token_grid(self.by_pred_dentropy)),
            ("Rollouts by share of the gradient", _rollout_grid(self.rollouts)),
            ("Prompts by share of the gradient", _prompt_grid(self.prompts)),
        ]
        parts: list[Block] = [Section(title, [g]) for title, g in tables if len(g.rows) > 1]
        if len(self.three_numbers):
            seen = dict.fromkeys(self.three_numbers["verdict"])
            parts.append(
                Section(
                    "dH of one update, mean nats: predicted, class alone, measured",
                    [
                        _three_grid(self.three_numbers),
                        Items([f"{verdict}: {MEANINGS[verdict]}." for verdict in seen]),
                    ],
                )
            )
        return Section(self.headline, parts)


def attribute_step(run: Run, step: int, top: int = 10) -> StepAttribution:
    """Attribute one step's update to its tokens, rollouts and prompts.

    Gradient mass of a token is |dL/dz| = |c|/T sqrt((1-p)^2 + C_o), summed over the passes that saw
    it; its predicted dH is the exact first-order one (taxonomy/README.md, sections 2 and 4).

    Parameters
    ----------
    run : Run
        The run.
    step : int
        A step with token rows.
    top : int
        Rows kept of each table, at least 1.

    Returns
    -------
    StepAttribution

    Raises
    ------
    UserError
        If the step has no token rows or its tokens have no gradient statistics.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    tokens = _tokens(run, step)
    known = run.table("rollouts", [step]).set_index("rollout")
    rollouts = _held(tokens, ["group", "rollout"])
    prompts = _summed(rollouts, ["group"]).head(top)
    rollouts = rollouts.head(top)
    texts = known.drop_duplicates("group").set_index("group")["prompt"].dropna().astype(str)
    apart = pd.Series(distinguishing(texts.to_list()), index=texts.index, dtype=object)
    mass, predicted = tokens["mass"], tokens["pred_dentropy"]
    largest = _largest(np.abs(predicted), top)
    probes = run.table("probes", [step])
    return StepAttribution(
        run=run.name,
        step=step,
        grad_mass=float(mass.sum()),
        pred_dentropy=float(np.nansum(predicted)) if np.isfinite(predicted).any() else float("nan"),
        tokens=_with_text(tokens, _largest(mass, top), run.vocab),
        by_pred_dentropy=_with_text(tokens, largest, run.vocab),
        rollouts=rollouts.assign(
            reward=rollouts["rollout"].map(known["reward"]),
            completion=rollouts["rollout"].map(known["completion"]),
        ),
        prompts=prompts.assign(
            prompt=prompts["group"].map(texts), question=prompts["group"].map(apart)
        ),
        three_numbers=_named(probes) if len(probes) else pd.DataFrame(),
        fraction=float(run.manifest.get("token_fraction", 1.0)),
    )


def _named(probes: pd.DataFrame) -> pd.DataFrame:
    """:func:`wapo_analysis.probes.three_numbers`, its sets of tokens by name."""
    numbers = three_numbers(probes)
    return numbers.assign(tokens_of=numbers["tokens_of"].map(set_name))


def _tokens(run: Run, step: int) -> dict[str, Array]:
    """Tokens of the step by group, rollout, position and class, shape (tokens,) each.

    ``mass`` and ``pred_dentropy`` are sums over the passes that saw the token, the latter NaN where
    none gave it.
    """

    def keep(block: dict[str, Array]) -> dict[str, Array]:
        update = update_columns(block, run.temperature)
        known = np.isfinite(update["grad_norm"])
        sums = {"mass": update["grad_norm"], "pred_dentropy": update["pred_dentropy"]}
        given = {name: block[name] for name in (*_TOKEN_KEYS, "token_id", "logp")}
        return {n: values[known] for n, values in {**given, "cls": update["cls"], **sums}.items()}

    rows = run.scan_tokens(step, [*_TOKEN_KEYS, "token_id", *UPDATE_STATISTICS], keep)
    if not rows or not len(rows["mass"]):
        raise UserError(
            f"step {step} of {run.name} has no gradient per token: its source gives no coef or "
            "no collision_rest"
        )
    keys = ("group", "rollout", "position", "cls")
    order = _order([rows[name] for name in keys])
    if order is not None:
        rows = {name: rows.pop(name)[order] for name in list(rows)}
    starts = _starts([rows[name] for name in (*keys, "token_id")])
    if len(starts) < len(rows["mass"]):
        sums = {name: run_sums(rows.pop(name), starts) for name in _SUMMED}
        rows = {name: rows.pop(name)[starts] for name in list(rows)} | sums
    return rows


def _order(keys: list[Array]) -> Array | None:
    """Stable order of the rows by several keys, the first one leading; None if they are in it."""
    code, span = np.zeros(len(keys[0]), np.int64), 1
    for key in keys:
        low, wide = int(key.min()), int(key.max()) - int(key.min()) + 1
        if (span := span * wide) >= 1 << 62:
            return np.lexsort(keys[::-1])
        code *= wide
        code += key
        code -= low
    return None if (code[1:] >= code[:-1]).all() else np.argsort(code, kind="stable")


def _starts(keys: list[Array]) -> Array:
    """Where one of the keys changes."""
    change = np.zeros(len(keys[0]), bool)
    change[0] = True
    for key in keys:
        change[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(change)


def _largest(values: Array, top: int) -> Array:
    """Places of the largest values, largest first, of equal ones the first; NaN is left out."""
    least = -np.inf
    if top < len(values):
        sized = np.where(np.isnan(values), -np.inf, values)
        sized.partition(len(sized) - top)
        least = sized[len(sized) - top]
        del sized
    places = np.flatnonzero(values >= least)
    return np.asarray(places[np.argsort(-values[places], kind="stable")][:top])


def _held(tokens: dict[str, Array], keys: list[str]) -> pd.DataFrame:
    """Sums over tokens that stand together, and their shares, largest mass first."""
    starts = _starts([tokens[name] for name in keys])
    frame = pd.DataFrame({name: tokens[name][starts] for name in keys})
    sums = {name: run_sums(tokens[name], starts) for name in _SUMMED}
    shares = {f"{name}_share": sums[name] / _whole(tokens[name]) for name in sums}
    ends = np.append(starts[1:], len(tokens["mass"]))
    return _by_mass(frame.assign(**sums, **shares, tokens=ends - starts))


def _summed(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Sums of rollouts by prompt, the largest mass first."""
    sums = frame.drop(columns="rollout").groupby(keys, as_index=False).sum(min_count=1)
    return _by_mass(sums)


def _by_mass(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("mass", ascending=False, kind="stable", ignore_index=True)


def _whole(values: Array) -> float:
    """What shares are of: the sum of sizes; infinite where there is none, so that shares are 0."""
    total = float(np.add.reduce(np.abs(values), where=~np.isnan(values)))
    return total if total > 0 else float("inf")


def _with_text(tokens: dict[str, Array], places: Array, vocab: dict[int, str]) -> pd.DataFrame:
    """Rows of the tokens at some places: shares, text, context with the token in brackets."""
    names = (*_TOKEN_KEYS, "token_id")
    frame = pd.DataFrame({name: tokens[name][places] for name in names})
    shares = {f"{n}_share": tokens[n][places] / _whole(tokens[n]) for n in _SUMMED}
    lines = {
        rollout: _line(tokens, tokens["rollout"] == rollout)
        for rollout in frame["rollout"].unique()
    }
    spelled = zip(frame["rollout"], frame["position"], strict=True)
    return frame.assign(
        cls=np.asarray(class_names(tokens["cls"][places]), object),
        prob=np.exp(tokens["logp"][places].astype(np.float64)),
        mass=tokens["mass"][places],
        pred_dentropy=tokens["pred_dentropy"][places],
        **shares,
        token=[vocab.get(int(token), _MISSING_TEXT) for token in frame["token_id"]],
        context=[_context(*lines[rollout], position, vocab) for rollout, position in spelled],
    )


def _line(tokens: dict[str, Array], mine: Array) -> tuple[Array, Array]:
    """Positions of a rollout's tokens in order, each once, and their token ids."""
    positions, first = np.unique(tokens["position"][mine], return_index=True)
    return positions, tokens["token_id"][mine][first]


def _context(positions: Array, ids: Array, position: int, vocab: dict[int, str]) -> str:
    """Text around a position, the token itself in brackets."""
    place = int(np.searchsorted(positions, position))
    spelled = [vocab.get(int(token), _MISSING_TEXT) for token in ids]
    before, after = spelled[max(0, place - CONTEXT) : place], spelled[place + 1 :][: CONTEXT // 2]
    return printable(f"{''.join(before)}[{spelled[place]}]{''.join(after)}")


def _token_grid(frame: pd.DataFrame) -> Grid:
    rows = [["class", "in context", "gradient", "predicted dH", "p", "rollout", "position"]]
    for row in frame.to_dict("records"):
        places = [str(row["rollout"]), str(row["position"])]
        named = [str(row["cls"]), str(row["context"])]
        rows.append([*named, *_shares(row), f"{row['prob']:.3g}", *places])
    return Grid(rows, left=2)


def _rollout_grid(frame: pd.DataFrame) -> Grid:
    rows = [["completion", "gradient", "predicted dH", "rollout", "prompt", "tokens", "reward"]]
    for row in frame.to_dict("records"):
        numbers = [str(row[name]) for name in ("rollout", "group", "tokens")]
        text = _one_line(row["completion"])
        rows.append([text, *_shares(row), *numbers, f"{row['reward']:.3g}"])
    return Grid(rows)


def _prompt_grid(frame: pd.DataFrame) -> Grid:
    rows = [["text", "gradient", "predicted dH", "prompt", "tokens"]]
    for row in frame.to_dict("records"):
        text = _one_line(row["question"])
        rows.append([text, *_shares(row), str(row["group"]), str(row["tokens"])])
    return Grid(rows)


def _three_grid(numbers: pd.DataFrame) -> Grid:
    """Table of `StepAttribution.three_numbers`."""
    rows = [["tokens of", "verdict", "tokens", "predicted", "class alone", "measured"]]
    for row in numbers.to_dict("records"):
        change = [_signed(row[name]) for name in ("predicted", "counterfactual", "measured")]
        named = [str(row["tokens_of"]), str(row["verdict"])]
        rows.append([*named, str(int(row["tokens"])), *change])
    return Grid(rows, left=2)


def _shares(row: Mapping[Any, Any]) -> list[str]:
    return [
        f"{100 * row[name]:.1f}%" if isfinite(row[name]) else "-"
        for name in ("mass_share", "pred_dentropy_share")
    ]


def _signed(value: float) -> str:
    return f"{value:+.2e}" if isfinite(value) else "-"


def _one_line(text: object) -> str:
    """One line of a text; a dash where there is none."""
    if not isinstance(text, str):
        return "-"
    line = printable(text)
    return line if len(line) <= _SHOWN_TEXT else f"{line[: _SHOWN_TEXT - 3]}..."
