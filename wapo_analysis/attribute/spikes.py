"""Which tokens, rollouts and prompts hold a step's gradient and its predicted entropy flow."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.errors import UserError
from wapo_analysis.probes import three_numbers
from wapo_analysis.store import Run
from wapo_analysis.table import Array

CONTEXT = 12
_TOKEN_KEYS = ["group", "rollout", "position"]
_SUMS = {"grad_norm": "sum", "pred_dentropy": "sum"}
_MISSING_TEXT = "?"


@dataclass(frozen=True, kw_only=True)
class StepAttribution:
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
        ``context`` as text and the class; rollouts the reward; prompts their text.
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
        return {
            "run": self.run,
            "step": self.step,
            "grad_mass": _plain(self.grad_mass),
            "flow": _plain(self.flow),
            "fraction": self.fraction,
            **{name: _records(getattr(self, name)) for name in tables},
        }


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
    texts = known.drop_duplicates("group").set_index("group")["prompt"]
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
        prompts=prompts.assign(prompt=prompts["group"].map(texts)),
        three_numbers=three_numbers(probes) if len(probes) else pd.DataFrame(),
        fraction=float(run.manifest.get("token_fraction", 1.0)),
    )


def _rows(run: Run, step: int) -> pd.DataFrame:
    """Token rows of the step with finite gradient norms."""
    rows = run.tokens([step])
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
        cls=tokens["cls"].map(tax.CLASS_NAMES),
        token=[vocab.get(int(token), _MISSING_TEXT) for token in tokens["token_id"]],
        context=texts,
    ).reset_index(drop=True)


def _context(positions: Array, ids: Array, position: int, vocab: dict[int, str]) -> str:
    """Text around a position, the token itself in brackets."""
    place = int(np.searchsorted(positions, position))
    spelled = [vocab.get(int(token), _MISSING_TEXT) for token in ids]
    before, after = spelled[max(0, place - CONTEXT) : place], spelled[place + 1 :][: CONTEXT // 2]
    return one_line(f"{''.join(before)}[{spelled[place]}]{''.join(after)}")


def one_line(text: str) -> str:
    """Text without line breaks and control characters, which are written as they are spelled."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): _plain(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]
