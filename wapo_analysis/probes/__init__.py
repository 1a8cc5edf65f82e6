"""Probes: what the parts of an optimizer update do, as rows and, here, as findings; torch-free.

Probe rows to small tables: three numbers per class and their verdict, sums, agreement.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.probes.rows import ADDENDS, CLASS_CODES
from wapo_analysis.schema import (
    ALL_TOKENS,
    GRADIENT,
    INTERACTION,
    MOMENTUM,
    OTHER_TOKENS,
    PART_NAMES,
    UPDATE,
    WEIGHT_DECAY,
)
from wapo_analysis.table import Array

KEYS = ["step", "minibatch", "tokens_of"]
#: Nats; the rounding of float32 in a mean over some hundred tokens is about a tenth of this.
RESOLUTION = 1e-6
BEND = 0.5
FACTOR = 3.0
#: Verdict -> what it means, one clause; the order of the rules of `judge`.
MEANINGS = {
    "below resolution": "the change is too small to distinguish from rounding",
    "step too large": "half the update does not do half the change: the step is too large for a "
    "first-order law; lower lr",
    "momentum dominates": "the momentum of earlier batches, not this batch, decides the change",
    "sharing dominates": "other tokens' updates move these tokens through shared parameters more "
    "than their own do",
    "local law holds": "the tokens' own updates explain the change in sign and size",
}


def judge(predicted: Array, gradient: Array, carried: Array, measured: Array, half: Array) -> Array:
    """What it means when prediction, counterfactual and measurement of sets of tokens disagree.

    The first rule that holds is the verdict:

    1. ``below resolution``    neither |M| nor |G| nor |P| reaches RESOLUTION nats
    2. ``step too large``      the bent part of the change, 2 |M - 2 (M/2)|, exceeds BEND of the
       largest of its straight part |4 (M/2) - M| and the gross change |G| + |K|: no
       first-order law can hold
    3. ``momentum dominates``  |K| > |G|: earlier batches, not this one, decide where the set
       goes
    4. ``sharing dominates``   P and G differ in sign or by more than FACTOR: other tokens' updates
       move these through shared parameters
    5. ``local law holds``     P and G agree in sign and within FACTOR

    Returns verdicts, keys of ``MEANINGS``, shape (n,).

    Parameters
    ----------
    predicted : array_like, shape (n,)
        P, prediction of the taxonomy at the fitted scale, nats.
    gradient : array_like, shape (n,)
        G, change by all classes at once.
    carried : array_like, shape (n,)
        K, change by momentum plus that by weight decay.
    measured, half : array_like, shape (n,)
        M and M/2, change by the whole and by half of the update.

    Examples
    --------
    >>> str(judge([1e-3], [2e-3], [0.0], [2e-3], [1e-3])[0])
    'local law holds'
    >>> str(judge([-1e-3], [2e-3], [0.0], [2e-3], [1e-3])[0])
    'sharing dominates'
    """
    p, g, k, m, h = (
        np.asarray(values, np.float64) for values in (predicted, gradient, carried, measured, half)
    )
    bend, straight = 2 * np.abs(m - 2 * h), np.abs(4 * h - m)
    gross = np.maximum(straight, np.abs(g) + np.abs(k))
    near = (p * g > 0) & (np.abs(p) <= FACTOR * np.abs(g)) & (np.abs(g) <= FACTOR * np.abs(p))
    small = np.maximum(np.maximum(np.abs(m), np.abs(g)), np.nan_to_num(np.abs(p))) < RESOLUTION
    rules = [small, bend > BEND * gross, np.abs(k) > np.abs(g), ~near]
    *names, local = MEANINGS
    return np.asarray(np.select(rules, names, default=local))


def part_name(code: int) -> str:
    """Name of a part of an update: a class, or a word for what is no class.

    Examples
    --------
    >>> part_name(2), part_name(6)
    ('neg_peak', 'momentum')
    """
    return PART_NAMES[code] if code in PART_NAMES else tax.CLASS_NAMES[code]


def set_name(code: int) -> str:
    """Name of a set of tokens: a class, ``"all tokens"`` or ``"step before"``."""
    named = {ALL_TOKENS: "all tokens", OTHER_TOKENS: "step before"}
    return named[code] if code in named else tax.CLASS_NAMES[code]


def three_numbers(probes: pd.DataFrame) -> pd.DataFrame:
    """Predicted, counterfactual and measured change of the entropy, per probe and set of tokens.

    Returns one row per probed update and set of tokens (class codes 0..3, 4 all tokens, 5 tokens of
    the step before): ``tokens``; ``predicted`` by the taxonomy at the fitted scale (0 for tokens
    without a part in the update); ``counterfactual``, the set's own class applied alone (where it
    is no class: all classes at once); ``gradient``, all classes at once; ``carried``, momentum plus
    weight decay; ``measured``, the whole update; ``half``, half of it; all mean nats; ``verdict``,
    see `judge`. ``probes``: rows of the probes table.
    """
    whole = probes[probes["part"] == UPDATE].set_index(KEYS).sort_index()
    alone = probes.pivot_table(index=KEYS, columns="part", values="counterfactual_dentropy")
    # A pivot leaves out a probe, or a part, of which nothing was finite.
    parts = [*CLASS_CODES, GRADIENT, MOMENTUM, WEIGHT_DECAY]
    alone = alone.reindex(index=whole.index, columns=parts)
    sets = whole.index.get_level_values("tokens_of").to_numpy()
    own = np.where(sets >= ALL_TOKENS, len(CLASS_CODES), sets)
    table = pd.DataFrame(
        {
            "tokens": whole["tokens"],
            "predicted": whole["predicted_dentropy"],
            "counterfactual": alone.to_numpy()[np.arange(len(whole)), own],
            "gradient": alone[GRADIENT],
            "carried": alone[MOMENTUM] + alone[WEIGHT_DECAY],
            "measured": whole["measured_dentropy"],
            "half": whole["half_dentropy"],
        }
    )
    numbers = (table[name] for name in ("predicted", "gradient", "carried", "measured", "half"))
    return table.assign(verdict=judge(*(n.to_numpy(np.float64) for n in numbers))).reset_index()


def complete(probes: pd.DataFrame, parts: Sequence[int]) -> pd.DataFrame:
    """Rows of the parts, of the probes of one set of tokens that have each of them once."""
    rows = probes[probes["part"].isin(parts)]
    held = rows.groupby(["step", "minibatch"])["part"]
    whole = held.transform("size").eq(len(parts)) & held.transform("nunique").eq(len(parts))
    return rows[whole]


def closure(probes: pd.DataFrame) -> pd.DataFrame:
    """Entropy change of the probed updates, by part; the parts add up to what was measured.

    Index part (the classes, momentum, weight decay, interaction, update) and columns
    ``predicted`` (NaN where the taxonomy is silent) and ``dentropy``: sums over the probed updates
    of the mean change of all tokens, nats; ``share`` of the sum of the parts' sizes. ``probes``:
    rows of the probes table, of the updates to be explained.
    """
    rows = probes[probes["tokens_of"] == ALL_TOKENS]
    sums = rows.groupby("part")[["predicted_dentropy", "counterfactual_dentropy"]]
    totals = sums.sum(min_count=1).reindex([*ADDENDS, INTERACTION, UPDATE])
    table = totals.set_axis(["predicted", "dentropy"], axis=1)
    parts = table["dentropy"].iloc[:-1].abs()
    return table.assign(share=parts / parts.sum()).rename_axis("part")


def closure_error(probes: pd.DataFrame) -> float:
    """Largest relative gap between the sum of the parts and the measured change, over all rows.

    The interaction is defined as what is left, so this is rounding in storage: below 1e-6.
    """
    if probes.empty:
        return 0.0
    alone = probes.pivot_table(index=KEYS, columns="part", values="counterfactual_dentropy")
    alone = alone.reindex(columns=[*ADDENDS, INTERACTION, UPDATE])
    gap = (alone[[*ADDENDS, INTERACTION]].sum(axis=1) - alone[UPDATE]).abs()
    size = alone[[*ADDENDS, INTERACTION]].abs().sum(axis=1)
    moved = size > 0
    return float((gap[moved] / size[moved]).max()) if moved.any() else 0.0


def agreement(predicted: Array, measured: Array) -> dict[str, float]:
    """How well one series of changes foretells another.

    Returns ``rank_correlation`` (Spearman, NaN for fewer than three pairs), ``sign_agreement``
    (share of the pairs with one sign, NaN without pairs), ``pairs``. ``predicted``, ``measured``
    (n,): pairs; those with a zero or NaN are left out.
    """
    pairs = pd.DataFrame({"p": predicted, "m": measured}).astype(np.float64)
    pairs = pairs[(pairs * 0 == 0).all(axis=1) & (pairs != 0).all(axis=1)]
    ranks = pairs.rank()
    flat = len(pairs) < 3 or ranks.nunique().min() < 2
    same = np.sign(pairs["p"]) == np.sign(pairs["m"])
    return {
        "rank_correlation": float("nan") if flat else float(np.corrcoef(ranks.T)[0, 1]),
        "sign_agreement": float(same.mean()) if len(pairs) else float("nan"),
        "pairs": float(len(pairs)),
    }


def trust(probes: pd.DataFrame) -> pd.DataFrame:
    """How often the predicted dH of a class had the measured sign, over the probed updates.

    Returns a row per class with a prediction: ``cls``; ``updates``, how many; ``alone`` of
    ``alone_of`` had the sign of the class's own step applied alone; ``whole``, that of the whole
    update. Always of the class's own tokens. What is between is shared parameters, momentum and the
    interaction of classes. ``probes``: rows of the probes table.
    """
    if probes.empty:
        return pd.DataFrame(columns=["cls", "updates", "alone", "alone_of", "whole"])
    numbers = three_numbers(probes).dropna(subset=["predicted", "measured"])
    rows = []
    for code, name in enumerate(tax.CLASSES):
        mine = numbers[(numbers["tokens_of"] == code) & (numbers["predicted"] != 0)]
        alone = mine.dropna(subset=["counterfactual"])
        rows.append(
            {
                "cls": name,
                "updates": len(mine),
                "alone": int((alone["predicted"] * alone["counterfactual"] > 0).sum()),
                "alone_of": len(alone),
                "whole": int((mine["predicted"] * mine["measured"] > 0).sum()),
            }
        )
    return pd.DataFrame([row for row in rows if row["updates"]])
