"""Which tokens, rollouts and prompts hold a step's gradient and its predicted dH."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.completions import distinguishing
from wapo_analysis.errors import UserError, printable
from wapo_analysis.probes import MEANINGS, set_name, three_numbers
from wapo_analysis.results import Block, Grid, Items, Result, Section, plain
from wapo_analysis.store import Run
from wapo_analysis.table import Array

CONTEXT = 12
_TOKEN_KEYS = ["group", "rollout", "position"]
_SUMS = {"grad_norm": "sum", "pred_dentropy": "sum"}
_MISSING_TEXT = "?"
_SHOWN_TEXT = 60
"""Characters of a prompt or completion in a table."""


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
    flow : float
        Sum of their first-order dH, nats per unit learning rate; NaN if not available.
    tokens, rollouts, prompts : DataFrame
        Largest holders of gradient mass first: keys, ``mass_share`` (of ``grad_mass``), ``flow``
        and ``flow_share`` (of the sum of |flow| over tokens, signed). Tokens have ``token`` and
        ``context`` as text and the class; rollouts the reward; prompts their text and, as
        ``question``, what sets it apart from the step's other prompts.
    by_flow : DataFrame
        Tokens again, largest |flow| first.
    three_numbers : DataFrame
        Predicted, counterfactual, measured per class if an update of the step was probed.
    fraction : float
        Share of the rollouts that has token rows.
    """

    run: str
    step: int
    grad_mass: float
    flow: float
    tokens: pd.DataFrame
    by_flow: pd.DataFrame
    rollouts: pd.DataFrame
    prompts: pd.DataFrame
    three_numbers: pd.DataFrame
    fraction: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        tables = ("tokens", "by_flow", "rollouts", "prompts", "three_numbers")
        numbers = {"grad_mass": self.grad_mass, "flow": self.flow, "fraction": self.fraction}
        records = {name: getattr(self, name).to_dict("records") for name in tables}
        found: dict[str, Any] = plain({"run": self.run, "step": self.step, **numbers, **records})
        return found

    @property
    def headline(self) -> str:
        """One sentence with the totals."""
        text = f"{self.run}, step {self.step}: gradient mass {self.grad_mass:.3g}"
        if isfinite(self.flow):
            way = "a rise" if self.flow > 0 else "a fall"
            text += f", predicted dH {self.flow:+.3g} nats per unit learning rate ({way})"
        if self.fraction < 1:
            text += f"; from {self.fraction:.0%} of the rollouts"
        return text + "."

    def page(self) -> Section:
        """Tokens, rollouts and prompts by share, then predicted, class alone and measured."""
        tables: list[tuple[str, Grid]] = [
            ("Tokens by share of the gradient", _token_grid(self.tokens)),
            ("Tokens by share of the predicted dH", _token_grid(self.by_flow)),
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
    it; flow is its exact first-order dH (taxonomy/README.md, sections 2 and 4).

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
    rows = _rows(run, step)
    keys = [*_TOKEN_KEYS, "token_id", "cls"]
    tokens = rows.groupby(keys, as_index=False, sort=False).agg({"prob": "first", **_SUMS})
    tokens = _with_shares(tokens, rows)
    known = run.rollouts[run.rollouts["step"] == step].set_index("rollout")
    rollouts = _grouped(tokens, ["group", "rollout"]).head(top)
    prompts = _grouped(tokens, ["group"]).head(top)
    texts = known.drop_duplicates("group").set_index("group")["prompt"].dropna().astype(str)
    apart = pd.Series(distinguishing(texts.to_list()), index=texts.index, dtype=object)
    largest = tokens.sort_values("mass_share", ascending=False, kind="stable").head(top)
    pushing = tokens.loc[tokens["flow"].abs().sort_values(ascending=False).index].head(top)
    pushing = pushing[pushing["flow"].notna()]
    probes = run.probes[run.probes["step"] == step]
    return StepAttribution(
        run=run.name,
        step=step,
        grad_mass=float(tokens["mass"].sum()),
        flow=float(tokens["flow"].sum(min_count=1)),
        tokens=_with_text(largest, rows, run.vocab),
        by_flow=_with_text(pushing, rows, run.vocab),
        rollouts=rollouts.assign(
            reward=rollouts["rollout"].map(known["reward"]),
            completion=rollouts["rollout"].map(known["completion"]),
        ),
        prompts=prompts.assign(
            prompt=prompts["group"].map(texts), question=prompts["group"].map(apart)
        ),
        three_numbers=three_numbers(probes) if len(probes) else pd.DataFrame(),
        fraction=float(run.manifest.get("token_fraction", 1.0)),
    )


def _rows(run: Run, step: int) -> pd.DataFrame:
    """Token rows of the step with finite gradient norms."""
    rows = run.tokens([step]).astype({"cls": str})
    known: pd.DataFrame = rows[np.isfinite(rows["grad_norm"].to_numpy(np.float64))]
    if known.empty:
        raise UserError(
            f"step {step} of {run.name} has no gradient per token: its source gives no coef or "
            "no collision_rest"
        )
    return known


def _with_shares(tokens: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Columns mass, flow and their shares; flow is NaN where no pass gave it."""
    known = rows.groupby(_TOKEN_KEYS)["pred_dentropy"].count() > 0
    places = pd.MultiIndex.from_frame(tokens[_TOKEN_KEYS])
    flow = tokens["pred_dentropy"].where(known.reindex(places).to_numpy())
    named = tokens.rename(columns={"grad_norm": "mass"}).drop(columns="pred_dentropy")
    return named.assign(
        flow=flow,
        mass_share=_share(named["mass"], float(named["mass"].sum())),
        flow_share=_share(flow, float(flow.abs().sum())),
    )


def _share(values: pd.Series, total: float) -> pd.Series:
    return values / total if total > 0 else values * 0.0


def _grouped(tokens: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Sums over tokens, the largest holder of gradient mass first."""
    sums = tokens.groupby(keys)[["mass", "flow", "mass_share", "flow_share"]].sum(min_count=1)
    sums = sums.assign(tokens=tokens.groupby(keys).size())
    return sums.sort_values("mass", ascending=False, kind="stable").reset_index()


def _with_text(tokens: pd.DataFrame, rows: pd.DataFrame, vocab: dict[int, str]) -> pd.DataFrame:
    """Add the token's text, its context with the token in brackets, and its class name."""
    first = rows.drop_duplicates(_TOKEN_KEYS).sort_values(_TOKEN_KEYS)
    lines = {
        key: (part["position"].to_numpy(), part["token_id"].to_numpy())
        for key, part in first.groupby("rollout")
        if key in set(tokens["rollout"])
    }
    texts = [
        _context(*lines[rollout], position, vocab)
        for rollout, position in zip(tokens["rollout"], tokens["position"], strict=True)
    ]
    return tokens.assign(
        token=[vocab.get(int(token), _MISSING_TEXT) for token in tokens["token_id"]],
        context=texts,
    ).reset_index(drop=True)


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
    """Table of :func:`wapo_analysis.probes.three_numbers`."""
    rows = [["tokens of", "verdict", "tokens", "predicted", "class alone", "measured"]]
    for row in numbers.to_dict("records"):
        change = [_signed(row[name]) for name in ("predicted", "counterfactual", "measured")]
        named = [set_name(int(row["tokens_of"])), str(row["verdict"])]
        rows.append([*named, str(int(row["tokens"])), *change])
    return Grid(rows, left=2)


def _shares(row: Mapping[Any, Any]) -> list[str]:
    return [
        f"{100 * row[name]:.1f}%" if isfinite(row[name]) else "-"
        for name in ("mass_share", "flow_share")
    ]


def _signed(value: float) -> str:
    return f"{value:+.2e}" if isfinite(value) else "-"


def _one_line(text: object) -> str:
    """One line of a text; a dash where there is none."""
    if not isinstance(text, str):
        return "-"
    line = printable(text)
    return line if len(line) <= _SHOWN_TEXT else f"{line[: _SHOWN_TEXT - 3]}..."
