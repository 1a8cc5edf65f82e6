"""What detectors read of tokens and completions, from a bounded number of steps."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from wapo_analysis.derive import K3_LIMIT, k3
from wapo_analysis.diagnose.result import Culprits
from wapo_analysis.series import Series, evenly
from wapo_analysis.settings import fresh_steps
from wapo_analysis.store import Run
from wapo_analysis.table import Array

#: Steps whose token rows or completions are read, so that the cost does not grow with the run.
SAMPLED_STEPS = 40
GAP_COLUMNS = ("k3", "ess", "max_dp", "tokens")
#: Characters of a completion that are looked at.
READ_CHARACTERS = 2000
#: Completions of a step whose characters are looked at.
READ_COMPLETIONS = 64
#: Characters at the end of a completion in which the reference answer is looked for.
ANSWER_CHARACTERS = 100
#: Characters below which a completion is too short to be called noise.
SHORTEST = 16
#: Share of one character, spaces left out, at which a completion is that character repeated.
ONE_CHARACTER = 0.6
#: Scripts in one completion that no reader writes together.
SCRIPTS = 3
#: Letters of a script that count it in: a single one may be a symbol.
SCRIPT_LETTERS = 2


def first_pass_gap(run: Run) -> pd.DataFrame:
    """Distance of the first gradient pass of a step from the policy that sampled the tokens.

    With r = exp(logp - logp_old): ``k3`` is the mean of :func:`wapo_analysis.derive.k3`, which
    estimates KL(behaviour || policy) in nats; ``ess`` is (sum r)^2 / (n sum r^2), the effective
    sample size over the n tokens, in (0, 1]; ``max_dp`` is the largest |exp(logp) - exp(logp_old)|.
    Returns index step, columns ``GAP_COLUMNS``; a row per step of at most ``SAMPLED_STEPS`` that
    trains on fresh rollouts and has token rows with both log-probabilities, finite ones.
    """
    fresh = fresh_steps(run.manifest, run.token_steps())
    columns = ["step", "minibatch", "logp", "logp_old"]
    rows = run.table("tokens", evenly(fresh, SAMPLED_STEPS), columns)
    seen = rows.loc[rows["minibatch"] == 0, ["step", "logp", "logp_old"]].astype(np.float64)
    seen = seen.loc[np.isfinite(seen.to_numpy()).all(axis=1)]
    log_ratio = seen["logp"] - seen["logp_old"]
    ratio = np.exp(np.minimum(log_ratio, K3_LIMIT))
    terms = pd.DataFrame(
        {
            "k3": k3(log_ratio),
            "ratio": ratio,
            "square": ratio**2,
            "max_dp": (np.exp(seen["logp"]) - np.exp(seen["logp_old"])).abs(),
        }
    )
    by_step = terms.groupby(seen["step"].astype(np.int64))
    count, sums = by_step.size(), by_step.sum()
    gap = {
        "k3": sums["k3"] / count,
        "ess": sums["ratio"] ** 2 / (count * sums["square"]),
        "max_dp": by_step["max_dp"].max(),
        "tokens": count.astype(np.float64),
    }
    return pd.DataFrame(gap, columns=list(GAP_COLUMNS))


def completion_rows(run: Run) -> pd.DataFrame:
    """Rows of the rollouts table of at most ``SAMPLED_STEPS`` steps."""
    return run.table("rollouts", evenly(run.steps["step"].tolist(), SAMPLED_STEPS))


def shared_answers(rows: pd.DataFrame) -> Series:
    """Share of the completions of a step that a rollout of another prompt has word for word.

    Over the steps with completions of two prompts or more; empty if there are none.
    """
    known = rows[rows["completion"].notna()]
    if known.empty:
        return Series(np.empty(0, np.int64), np.empty(0))
    # Equal prompts are one prompt: a batch may hold the same problem in two groups.
    prompt = known["prompt"].where(known["prompt"].notna(), known["group"].astype(str))
    known = known.assign(asked=prompt)
    prompts = known.groupby("step")["asked"].nunique()
    owners = known.groupby(["step", "completion"])["asked"].transform("nunique")
    share = (owners > 1).groupby(known["step"]).mean()[prompts > 1]
    return Series(share.index.to_numpy(np.int64), share.to_numpy(np.float64))


def noise_share(rows: pd.DataFrame) -> Series:
    """Share of the completions of a step that are noise; see :func:`is_noise`.

    In [0, 1], over the steps with completions; of each at most ``READ_COMPLETIONS``.
    """
    known = rows.loc[rows["completion"].notna(), ["step", "completion"]]
    some = known[known.groupby("step").cumcount() < READ_COMPLETIONS]
    share = some["completion"].map(is_noise).astype(np.float64).groupby(some["step"]).mean()
    return Series(share.index.to_numpy(np.int64), share.to_numpy(np.float64))


def is_noise(text: str) -> bool:
    """Whether a completion is one character over and over, or mixes scripts as no text does.

    Greek letters are symbols here, Han and kana are one script. A second script is another
    language; three are noise.

    Examples
    --------
    >>> is_noise("!" * 20), is_noise("the answer is 42")
    (True, False)
    """
    marks = "".join(text[:READ_CHARACTERS].split())
    total = len(marks)
    if total < SHORTEST:
        return False
    counts = Counter(marks)
    if max(counts.values()) >= ONE_CHARACTER * total or counts["\ufffd"] >= total / 10:
        return True
    if marks.isascii():  # one script
        return False
    letters: Counter[str] = Counter()
    for mark, n in counts.items():
        letters[_script(mark)] += n
    return sum(n >= SCRIPT_LETTERS for name, n in letters.items() if name) >= SCRIPTS


@lru_cache(maxsize=1 << 16)
def _script(mark: str) -> str:
    """Script of a letter by the first word of its Unicode name; empty for symbols and Greek."""
    if not mark.isalpha():
        return ""
    name = unicodedata.name(mark, "").split(" ")[0]
    name = "CJK" if name in ("HIRAGANA", "KATAKANA") else name
    return "" if name in ("GREEK", "MATHEMATICAL", "MODIFIER", "FEMININE", "MASCULINE") else name


def answer_shares(rows: pd.DataFrame) -> tuple[Series, Series]:
    """How often completions end with the reference answer, and how often rewarded ones do not.

    A completion holds the answer if its last ``ANSWER_CHARACTERS`` have it as a word of its own.
    Rewarded means the highest reward of the rows. Returns the share of a step's completions that
    hold it; share of the rewarded ones that do not, over the steps with a rewarded one. Empty
    without answers.
    """
    columns = ["step", "completion", "answer", "reward"]
    known = rows.dropna(subset=columns)[columns]
    known = known[known["answer"].astype(str).str.strip() != ""]
    texts = zip(known["answer"], known["completion"], strict=True)
    held = np.array([_ends_with(str(answer), str(text)) for answer, text in texts], bool)
    earned = (known["reward"] >= known["reward"].max()).to_numpy(bool)
    return _share_by_step(known["step"], held), _share_by_step(known["step"][earned], ~held[earned])


def _share_by_step(steps: pd.Series, mask: Array) -> Series:
    share = pd.Series(mask.astype(np.float64), index=steps.index).groupby(steps).mean()
    return Series(share.index.to_numpy(np.int64), share.to_numpy(np.float64))


def _ends_with(answer: str, text: str) -> bool:
    word, end = answer.strip().casefold(), text[-ANSWER_CHARACTERS:].casefold()
    return word in end and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", end) is not None


def length_pay(rows: pd.DataFrame) -> Series:
    """Correlation of reward and completion length within the groups of a step.

    Pearson's, of what is left of both after the mean of the group is taken off, so that hard
    prompts that need long answers do not count. In [-1, 1], over the steps in which both
    vary within a group; empty without rewards or lengths.
    """
    known = rows[rows["reward"].notna() & rows["length"].notna()]
    groups = known.groupby(["step", "group"])
    values = {name: known[name].astype(np.float64) for name in ("reward", "length")}
    off = {name: x - groups[name].transform("mean").astype(float) for name, x in values.items()}
    terms = pd.DataFrame(
        {
            "both": off["reward"] * off["length"],
            "reward": off["reward"] ** 2,
            "length": off["length"] ** 2,
        }
    )
    sums = terms.groupby(known["step"]).sum()
    sums = sums[(sums["reward"] > 0) & (sums["length"] > 0)]
    pay: pd.Series = sums["both"] / np.sqrt(sums["reward"] * sums["length"])
    return Series(pay.index.to_numpy(np.int64), pay.to_numpy(np.float64))


#: Most steps whose token rows are read.
READ_STEPS = 3
#: Steps beyond the window at which token rows still speak for it.
NEAR = 10
SHOWN = 3


def find_culprits(
    run: Run, finding: str, cls: str, first: int, last: int, direction: int
) -> Culprits | None:
    """Split the predicted dH of a class over its tokens and rollouts.

    A token counts with its exact first-order dH (taxonomy/README.md) where that points in the
    direction, summed over the gradient passes that saw it. Returns None without token rows near the
    window, or with none that point there. Tokens and rollouts whose number the source could not
    give (-1) are not named.

    Parameters
    ----------
    finding : str
        Name of the finding the class is behind.
    cls : str
        Class name of the taxonomy.
    first, last : int
        Window of steps; of those in it that have token rows the earliest are read, else the nearest
        one at most ``NEAR`` steps away.
    direction : int
        1 for what raises the entropy, -1 for what lowers it.
    """
    steps = _steps(run.token_steps(), first, last)
    if not steps:
        return None
    rows = run.tokens(steps)
    toward = direction * rows["pred_dentropy"].astype(np.float64)
    mine = (rows["cls"] == cls) & (toward > 0)
    if not mine.any():
        return None
    toward, rows = toward[mine], rows[mine]
    total = float(toward.sum())
    vocab = run.vocab
    by_token = _largest(toward[rows["token_id"] >= 0].groupby(rows["token_id"]).sum())
    named = toward[rows["rollout"] >= 0].groupby([rows["step"], rows["rollout"]]).sum()
    by_rollout = _largest(named).reset_index()
    return Culprits(
        finding=finding,
        cls=cls,
        steps=tuple(steps),
        tokens=tuple(
            (vocab.get(int(token), f"#{token}"), value / total)
            for token, value in zip(by_token.index, by_token.to_list(), strict=True)
        ),
        rollouts=tuple(
            (int(step), int(number), float(value) / total)
            for step, number, value in by_rollout.itertuples(index=False)
        ),
    )


def _steps(recorded: Sequence[int], first: int, last: int) -> list[int]:
    inside = [step for step in recorded if first <= step <= last]
    if inside or not recorded:
        return inside[:READ_STEPS]
    away = {step: max(first - step, step - last) for step in recorded}
    nearest = min(recorded, key=away.__getitem__)
    return [nearest] if away[nearest] <= NEAR else []


def _largest(values: pd.Series) -> pd.Series:
    return values.sort_values(ascending=False, kind="stable").head(SHOWN)
