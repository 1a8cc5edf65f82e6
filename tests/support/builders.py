"""Seeded fake runs: statistics come from real softmaxes, so the columns agree with each other.

``write_fake_run`` writes a run folder as the trainer would, in well under a second, with one of a
few known courses (``DRIFTS``). Logits are random walks sharpened or flattened over the steps, the
measured columns are computed from them exactly, and the update that is re-scored is the
first-order step plus noise. Nothing is trained.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import wapo_taxonomy as tax

from tests.support.fake_columns import (
    advantages,
    coefficients,
    sample,
    softmax,
    softmax_stats,
    step_row,
)
from wapo_analysis.derive import class_totals, derive
from wapo_analysis.probes.rows import Change, PartSize, ProbedTokens, probe_rows
from wapo_analysis.schema import GRADIENT, MOMENTUM, ROLLOUTS, TOKENS, TOPK, UPDATE, WEIGHT_DECAY
from wapo_analysis.store import MANIFEST, RunWriter
from wapo_analysis.store.files import renamed_when_whole
from wapo_analysis.store.manifest import Manifest, write_manifest
from wapo_analysis.store.parquet import arrow_table, parquet_writer, seal
from wapo_analysis.store.parts import STEPS_KEY, merged_name
from wapo_analysis.table import Array, Records

START_SHARPNESS = 6.0


@dataclass(frozen=True)
class Drift:
    """How sharpness of the policy and success rate move; ``u`` runs from 0 to 1 over the steps."""

    sharpness: Callable[[float], float]
    success: Callable[[float], float]
    broken_loss: bool = False


def _late(u: float, onset: float = 0.4) -> float:
    """0 before the onset, then rising to 1 within a fifth of the run."""
    return float(np.clip((u - onset) / 0.2, 0.0, 1.0))


DRIFTS: Mapping[str, Drift] = {
    "healthy": Drift(lambda u: START_SHARPNESS * (1 + 0.6 * u), lambda u: 0.45 + 0.45 * u),
    "noise": Drift(lambda u: START_SHARPNESS, lambda u: 0.5),
    "explosion": Drift(
        lambda u: START_SHARPNESS * (1 - 0.95 * _late(u)), lambda u: 0.5 * (1 - _late(u))
    ),
    "collapse": Drift(
        lambda u: START_SHARPNESS * (1 + 9 * _late(u)), lambda u: 0.5 - 0.3 * _late(u)
    ),
    "reward_collapse": Drift(lambda u: START_SHARPNESS, lambda u: 0.5 * (1 - _late(u))),
    "stalled": Drift(lambda u: START_SHARPNESS, lambda u: 0.0),
    "diverged": Drift(lambda u: START_SHARPNESS, lambda u: 0.5, broken_loss=True),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Size of a fake run; ``tokens`` is the number of completion tokens of one step."""

    steps: int
    prompts: int
    rollouts: int
    length: int
    vocab: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.rollouts * self.length


_MADE: dict[str, Path] = {}


def write_fake_run(path: Path, **options: Any) -> Path:
    """`made_run`, made once for every set of options and copied from then on."""
    options = {name: list(v) if isinstance(v, set | tuple) else v for name, v in options.items()}
    key = json.dumps(options, sort_keys=True, default=str)
    if key not in _MADE:
        held = Path(tempfile.mkdtemp(prefix="fake-runs-"))
        atexit.register(shutil.rmtree, held, ignore_errors=True)
        _MADE[key] = made_run(held / path.name, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(_MADE[key], path)
    if "name" not in (options.get("manifest") or {}):
        described = json.loads((path / MANIFEST).read_bytes())
        write_manifest(path, Manifest.of(described | {"name": path.name}))
    return path


def made_run(
    path: Path,
    *,
    objective: str = "grpo",
    seed: int = 0,
    steps: int = 40,
    drift: str = "healthy",
    label: str | None = None,
    include_bins: Iterable[str] = (),
    prompts: int = 4,
    rollouts: int = 4,
    length: int = 6,
    vocab: int = 16,
    temperature: float = 1.0,
    token_every: int = 1,
    rescore_every: int = 1,
    probe_every: int = 0,
    missing: Iterable[str] = (),
    texts: Mapping[str, str] | None = None,
    manifest: Mapping[str, Any] | None = None,
    status: str = "finished",
    loose: bool = False,
) -> Path:
    """Write one fake run folder, its tables merged as ``wapo compact`` leaves them.

    Parameters
    ----------
    path : Path
        Folder to make.
    objective : str
        ``wapo`` gives a gradient to tokens with A > 0 alone and centres the reward; every other
        name is treated as GRPO with a clip of 0.2.
    drift : str
        A name in ``DRIFTS``.
    include_bins : iterable of str
        Classes that get a gradient; empty means all.
    token_every, rescore_every, probe_every : int
        Schedule of token rows, of the second scoring and of probes; 0 means never.
    missing : iterable of str
        Statistics the source could not give: token columns are NaN, step columns are left out.
    texts : mapping, optional
        ``prompt``, ``completion``, ``answer`` and ``vocab`` text that replaces the plain ones.
    manifest : mapping, optional
        Entries that replace the manifest's own.
    loose : bool
        One part a step instead, as the trainer writes them: four times as slow.

    Returns
    -------
    Path
        The folder.
    """
    if drift not in DRIFTS:
        raise ValueError(f"unknown drift {drift!r}; allowed: {', '.join(DRIFTS)}")
    described = {
        "name": path.name,
        "source": "built-in",
        "objective": {
            "name": objective,
            "clip_eps": 9.0 if objective == "wapo" else 0.2,
            "include_bins": list(include_bins),
            "exclude_bins": [],
        },
        "label": label or objective.upper(),
        "model": "fake",
        "task": "fake-task",
        "temperature": temperature,
        "seed": seed,
        "device": "cpu",
        "versions": {"wapo-analysis": "test"},
        "config": {"steps": steps, "minibatches": 2, "beta1": 0.9, "max_grad_norm": 1.0},
        "token_fraction": 1.0,
        "token_every": token_every,
        "rescore_every": rescore_every,
    }
    writer = RunWriter(path, described | dict(manifest or {}))
    tables = _Merged(path)
    fake = _Fake(
        write_part=writer.write_part if loose else tables.add,
        rng=np.random.default_rng([seed, sum(map(ord, objective + drift))]),
        sizes=Sizes(steps=steps, prompts=prompts, rollouts=rollouts, length=length, vocab=vocab),
        drift=DRIFTS[drift],
        objective=objective,
        bins=tax.expand_bins(tuple(include_bins)),
        temperature=temperature,
        missing=frozenset(missing),
        texts=texts or {},
    )
    walk = fake.rng.normal(size=(fake.sizes.tokens, vocab))
    for step in range(1, steps + 1):
        walk = 0.95 * walk + np.sqrt(1 - 0.95**2) * fake.rng.normal(size=walk.shape)
        rescore = rescore_every > 0 and step % rescore_every == 0
        keep_rows = token_every > 0 and (step - 1) % token_every == 0
        if probe_every > 0 and step % probe_every == 0:
            fake.write_part(probe(step, seed), step)
        _write_step(writer, fake, step, walk, rescore, keep_rows)
    tables.write()
    spelled = fake.texts.get("vocab", "")
    writer.add_vocab({token: spelled or chr(97 + token % 26) for token in range(vocab)})
    writer.close(status)
    return path


@dataclass(frozen=True, kw_only=True)
class _Fake:
    """What the steps of one fake run share."""

    write_part: Callable[[Records, int], None]
    rng: np.random.Generator
    sizes: Sizes
    drift: Drift
    objective: str
    bins: tuple[str, ...]
    temperature: float
    missing: frozenset[str]
    texts: Mapping[str, str]


class _Merged:
    """Rows of the steps of a run, written at its end: one file for each table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[int, pa.Table]] = {}

    def add(self, records: Records, step: int) -> None:
        self.steps.setdefault(records.table.name, {})[step] = arrow_table(records)

    def write(self) -> None:
        for name, steps in self.steps.items():
            described = [(step, len(rows)) for step, rows in steps.items()]
            rows = pa.concat_tables(steps.values())
            with renamed_when_whole(self.path / name / merged_name(min(steps), max(steps), 0)) as f:
                with parquet_writer(f, rows.schema) as writer:
                    writer.write_table(rows, row_group_size=len(rows))
                    writer.add_key_value_metadata({STEPS_KEY: json.dumps([described]).encode()})
                seal(f)


def _write_step(
    writer: RunWriter, fake: _Fake, step: int, walk: Array, rescore: bool, keep_rows: bool
) -> None:
    sizes = fake.sizes
    progress = (step - 1) / max(sizes.steps - 1, 1)
    rewards = _rewards(fake.rng, sizes, fake.drift.success(progress))
    advantage = advantages(rewards, standardize=fake.objective != "wapo")
    columns = _token_columns(fake, walk * fake.drift.sharpness(progress), advantage)
    absent = fake.missing | (frozenset() if rescore else _LATER)
    columns |= {name: np.full(sizes.tokens, np.nan) for name in absent if name in TOKENS}
    tokens = derive(
        Records.build(TOKENS, columns | {"step": np.full(sizes.tokens, step)}), fake.temperature
    )
    fake.write_part(class_totals(tokens), step)
    if keep_rows:
        fake.write_part(tokens, step)
        if rescore and "collision_rest" not in fake.missing:
            fake.write_part(_top_rows(tokens), step)
    fake.write_part(_rollout_rows(step, sizes, rewards, advantage, fake.texts), step)
    row = step_row(step, tokens, rewards, fake.drift.broken_loss and _late(progress) > 0)
    writer.append_step({name: value for name, value in row.items() if name not in fake.missing})


def _top_rows(tokens: Records) -> Records:
    """The sampled token and half of what it leaves, at the positions of the first two rollouts."""
    own = tokens.select(np.isin(tokens["rollout"], (0, 1)))
    keys = {name: np.repeat(own[name], 2) for name in ("step", "minibatch", "rank", "rollout",
                                                       "position")}  # fmt: skip
    prob, after = np.exp(own["logp"].astype(float)), np.exp(own["logp_after"].astype(float))
    rest, rest_after = (np.maximum(1 - p, 1e-12) / 2 for p in (prob, after))
    ids = np.stack([own["token_id"], (own["token_id"] + 1) % 10], 1).ravel()
    place = np.stack([(prob < rest), (prob >= rest)], 1).ravel().astype(np.int8)
    return Records.build(TOPK, {
        **keys, "place": place, "token_id": ids,
        "logp": np.log(np.stack([prob, rest], 1)).ravel(),
        "logp_after": np.log(np.stack([after, rest_after], 1)).ravel(),
    })  # fmt: skip


def probe(step: int, seed: int = 0, tokens: int = 60) -> Records:
    """Rows of one made-up probe in which every class moves its own tokens as the rule says."""
    rng = np.random.default_rng([seed, step])
    cls = np.arange(tokens) % 6  # the four classes, A = 0, and tokens of the step before
    prob = rng.uniform(0.2, 0.8, tokens)
    rest = prob * (1 - prob) * np.where(cls % 2 == 0, 0.4, 1.6)
    coef = np.select([cls < 2, cls < 4], [1.0, -1.0], 0.0) * rng.uniform(0.5, 1.5, tokens)
    stats = ProbedTokens(
        cls=cls,
        coef=coef,
        logp=np.log(prob),
        entropy=rng.uniform(0.5, 1.0, tokens),
        collision_rest=rest,
        collision_logp_rest=-0.5 * rest,
    )
    rule = np.asarray(tax.rule_dentropy_sign(np.where(cls < 4, cls, 4)))

    def change(parts: Iterable[int], shared: float) -> Change:
        own = np.isin(cls, list(parts)) * rule * 2e-3
        return Change(1e-3 * stats.dlogp, own + shared * rng.uniform(0.9, 1.1, tokens))

    changes = {code: change([code], 1e-4) for code in range(4)}
    changes |= {GRADIENT: change(range(4), 4e-4), MOMENTUM: change([], -3e-4)}
    changes |= {WEIGHT_DECAY: change([], 0.0), UPDATE: change(range(4), 1e-4)}
    classes = rng.normal(size=(4, 7))
    gradients = np.vstack([classes, classes.sum(axis=0)])
    sizes = {
        code: PartSize(grad_norm=1.0, step_norm=0.1, dots=tuple(classes @ gradients[place]))
        for place, code in enumerate((0, 1, 2, 3, GRADIENT))
    }
    return probe_rows(step, step % 2, stats, changes, change(range(4), 5e-5), sizes, 1e-6)


_LATER = frozenset({"logp_after", "entropy_after"})


def _rewards(rng: np.random.Generator, sizes: Sizes, success: float) -> Array:
    """Zero or one per rollout, shape (prompts, rollouts); prompts differ in difficulty."""
    rate = np.clip(success + rng.normal(0, 0.15, (sizes.prompts, 1)), 0, 1) * (success > 0)
    return (rng.random((sizes.prompts, sizes.rollouts)) < rate).astype(np.float64)


def _token_columns(fake: _Fake, logits: Array, advantage: Array) -> dict[str, Any]:
    """Measured columns of one step; logits (tokens, V), advantage (prompts, rollouts)."""
    rng, sizes, temperature = fake.rng, fake.sizes, fake.temperature
    behaviour = logits + 0.08 * rng.normal(size=logits.shape)
    chosen = sample(rng, behaviour, temperature)
    now = softmax_stats(logits, chosen, temperature)
    old = softmax_stats(behaviour, chosen, temperature)
    prob, complement = np.exp(now["logp"]), -np.expm1(now["logp"])
    rollout = np.repeat(np.arange(sizes.prompts * sizes.rollouts), sizes.length)
    per_token = advantage.reshape(-1)[rollout]
    classes = tax.class_code(per_token, prob, complement, now["collision_rest"])
    ratio = np.exp(now["logp"] - old["logp"])
    update = coefficients(per_token, ratio, fake.objective, np.asarray(classes), fake.bins)
    pull = np.eye(sizes.vocab)[chosen] - softmax(logits / temperature)
    strength = 0.05 * sizes.tokens * update["coef"][:, None] / temperature
    moved = logits + strength * pull + 0.02 * rng.normal(size=logits.shape)
    after = softmax_stats(moved, chosen, temperature)
    return {
        **now,
        **update,
        "minibatch": (rollout // sizes.rollouts) % 2,
        "rank": np.zeros(sizes.tokens),
        "group": rollout // sizes.rollouts,
        "rollout": rollout,
        "position": np.tile(np.arange(sizes.length), sizes.prompts * sizes.rollouts),
        "token_id": chosen,
        "advantage": per_token,
        "logp_old": old["logp"],
        "logp_after": after["logp"],
        "entropy_after": after["entropy"],
    }


def _rollout_rows(
    step: int, sizes: Sizes, rewards: Array, advantage: Array, texts: Mapping[str, str]
) -> Records:
    n = sizes.prompts * sizes.rollouts
    return Records.build(
        ROLLOUTS,
        {
            "step": np.full(n, step),
            "rank": np.zeros(n),
            "group": np.arange(n) // sizes.rollouts,
            "rollout": np.arange(n),
            "prompt": [texts.get("prompt", f"{i // sizes.rollouts}+1=") for i in range(n)],
            "completion": [texts.get("completion", f"{i};{i + 1}") for i in range(n)],
            "answer": [texts.get("answer", str(i // sizes.rollouts + 1)) for i in range(n)],
            "reward": rewards.reshape(-1),
            "advantage": advantage.reshape(-1),
            "length": np.full(n, sizes.length),
            "finish_reason": ["stop" if i % 7 else "length" for i in range(n)],
        },
    )
