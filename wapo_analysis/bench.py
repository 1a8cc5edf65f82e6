"""What watching costs on this machine: the trainer's own update with and without a recorder.

All arms share one model, one optimizer and one batch, and take turns, so a slow minute of the
machine hits all of them alike; a ratio is taken within a round, the median over rounds is shown.
The unwatched arm makes the log-probability as trainers do (selected logit minus logsumexp) and no
statistic. The watched ones read all statistics beside it, as `wapo_analysis.attach` and the hooks
of a torch loop do. `wapo train` pays less: there the statistics supply the log-probability.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.errors import UserError, counted
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.topk import ReadRows
from wapo_analysis.results import Grid, Result, Say, Section
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.store import open_run
from wapo_analysis.train.batch import Batch, draw_batch
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import Trainer
from wapo_analysis.train.models import configured_policy, pick_device
from wapo_analysis.train.policy import Policy, PromptFormat, PromptStyle
from wapo_analysis.train.rollout import Rollouts, completion_logits

_HEAD_WIDTH = 64
_RECORDERS: dict[str, dict[str, Any]] = {
    "totals": {"token_every": 0, "rescore_every": 0},
    "rows": {"token_every": 1, "rescore_every": 0},
    "rescored": {"token_every": 1, "rescore_every": 1},
    "probed": {"token_every": 0, "rescore_every": 0, "probe_every": 1},
}
_OFTEN, _SELDOM = ("plain", "totals", "rows", "rescored"), ("plain", "totals", "probed")


class Share(NamedTuple):
    """Cost in unwatched steps: median over rounds, least and greatest round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.value >= 1:
            return f"{self.value:.1f} steps ({self.low:.1f} to {self.high:.1f})"
        return f"{self.value:+.1%} ({self.low:+.1%} to {self.high:+.1%})"

    def every(self, setting: str) -> str:
        """How seldom it must be done to cost one percent of training."""
        return f"{setting}={max(1, math.ceil(100 * self.value))} makes it 1% of training"


@dataclass(frozen=True)
class Costs(Result):
    """What watching adds to a training step (sampling not counted).

    Attributes
    ----------
    what : str
        Model, batch and machine in words.
    step_seconds : float
        An unwatched step: CPU time of all threads on a CPU, wall time on a GPU.
    class_totals, token_rows : Share
        Exact totals of every class; token rows on disk beside them.
    rescore, probe : Share
        Scoring the tokens again after an update, decomposing an update by class; of a step on
        which it is done.
    bytes_per_token : float
        On disk, without the scores after the update.
    """

    what: str
    step_seconds: float
    class_totals: Share
    token_rows: Share
    rescore: Share
    probe: Share
    bytes_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            name: share._asdict() for name, share in vars(self).items() if isinstance(share, Share)
        }

    def page(self) -> Section:
        """A table of what each adds, and the setting that changes it."""
        stored = f"token rows, {self.bytes_per_token:.1f} bytes each"
        rows = [
            ("what", "adds to a step", "setting"),
            ("class totals", str(self.class_totals), "always on"),
            (stored, str(self.token_rows), "token_every, token_fraction, store_bits"),
            ("tokens scored again", str(self.rescore), self.rescore.every("rescore_every")),
            ("update decomposed by class", str(self.probe), self.probe.every("probe_every")),
        ]
        plainly = (
            f"A step without watching takes {self.step_seconds:.2f} s (forward, backward, "
            "optimizer). Median (least to greatest round):"
        )
        return Section(self.what, [Say(plainly), Grid(rows, left=3)])


def watching_costs(
    model: str | None = None,
    *,
    layers: int = 4,
    width: int = 256,
    vocabulary: int = 32_000,
    rollouts: int = 4,
    tokens: int = 64,
    device: str = "auto",
    seconds: float = 40.0,
    threads: int | None = None,
) -> Costs:
    """Measure what watching adds to a training step.

    Raises UserError on a setting out of range or a model that cannot be loaded; RuntimeError if
    recording failed.

    Parameters
    ----------
    model : str, optional
        As in `TrainConfig.model`; None takes a Llama model of random weights.
    layers, width, vocabulary : int
        Its shape; the width is a multiple of 64.
    rollouts, tokens : int
        Size of the batch: rollouts (an even number) and completion tokens of each.
    device : str
        auto, cpu or cuda.
    seconds : float
        Rounds go on until this time is over; three of each arm are made in any case, one of
        the probe.

    threads : int, optional
        CPU threads; None leaves torch's own choice.
    """
    if rollouts < 2 or rollouts % 2:
        raise UserError(f"rollouts must be an even number of at least 2, got {rollouts}")
    config = TrainConfig(
        model=model or "base",
        device=device,
        prompts_per_step=2,
        rollouts_per_prompt=rollouts // 2,
        minibatches=1,
        max_new_tokens=tokens,
        lr=1e-9,  # the same step again and again
        probe_every=1,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    end = perf_counter() + seconds
    trainer = _Trainer(
        configured_policy(config) if model else _random(layers, width, vocabulary, device), config
    )
    with tempfile.TemporaryDirectory() as folder:
        recorders = {arm: Recorder(Path(folder) / arm, {}, **k) for arm, k in _RECORDERS.items()}
        trainer.interleaved(("plain", "rescored"), recorders, rounds=1)  # warms up
        often = trainer.interleaved(_OFTEN, recorders, rounds=3, until=end - seconds / 2)
        seldom = trainer.interleaved(_SELDOM, recorders, rounds=1, until=end)
        for recorder in recorders.values():
            recorder.close("finished")
        run = Path(folder) / "rows"
        size = sum(file.stat().st_size for file in (run / "tokens").iterdir())
        bytes_per_token = size / len(open_run(run).table("tokens"))
    return Costs(
        what=_described(trainer.policy, model or "random weights", trainer.batch),
        step_seconds=median(often["plain"]),
        class_totals=_added(often, "totals", "plain"),
        token_rows=_added(often, "rows", "totals"),
        rescore=_added(often, "rescored", "rows"),
        probe=_added(seldom, "probed", "totals"),
        bytes_per_token=bytes_per_token,
    )


def _added(times: Mapping[str, Sequence[float]], arm: str, base: str) -> Share:
    rounds = zip(times[arm], times[base], times["plain"], strict=True)
    shares = [(own - other) / plain for own, other, plain in rounds]
    return Share(median(shares), min(shares), max(shares))


class _Trainer(Trainer):
    """The trainer on one batch, drawn once, its statistics read beside the log-probability."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        super().__init__(policy, config)
        batch = draw_batch(policy, self.task, config, 1)
        signs = np.resize([1.0, -1.0], len(batch.rewards))  # a flat group has nothing to learn from
        self.batch: Batch = replace(batch, advantages=signs)
        self._watched, self._number = False, 0

    def draw(self, step: int) -> Batch:
        return self.batch

    def interleaved(
        self,
        arms: Sequence[str],
        recorders: Mapping[str, Recorder],
        rounds: int,
        until: float = -math.inf,
    ) -> dict[str, list[float]]:
        """Seconds of each arm in each round: as many rounds as asked for, and on until a time."""
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        while len(times[arms[0]]) < rounds or perf_counter() < until:
            for arm in arms:
                times[arm].append(self._timed(recorders.get(arm)))
        return times

    def _timed(self, recorder: Recorder | None) -> float:
        """Seconds of one step, its files written."""
        self._watched, self._number = recorder is not None, self._number + 1
        clock = _clock(self.policy.device)
        started = clock()
        self.step(self._number, recorder or Recorder(None))
        if recorder is not None:
            recorder.flush()
            if recorder.failure is not None or self.prober.failed:
                raise RuntimeError(f"watching failed: {recorder.failure or 'the probe did'}")
        return clock() - started

    def _score(
        self, rollouts: Rollouts, grad: bool, look: Callable[[ReadRows], None] | None = None
    ) -> TokenStats:
        ids, mask = rollouts.completion_ids, rollouts.mask
        with torch.set_grad_enabled(grad):
            logits = completion_logits(self.policy, rollouts)
            logp = _selected(logits, ids)[mask]
        if look is not None:
            look(logits.__getitem__)
        if self._watched:
            with torch.no_grad():
                return token_stats(logits, ids, mask=mask)._replace(logp=logp)
        nothing = torch.zeros_like(logp, requires_grad=False)
        return TokenStats(logp, nothing, nothing, nothing, nothing.bool())


def _selected(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of the ids as trainers make it, row by row; shape (B, T)."""
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen.float() - torch.stack([row.float().logsumexp(-1) for row in logits])


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU time of the process, or wall time once the GPU has done its work."""
    if device.type != "cuda":
        return process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return perf_counter()

    return wall


def _random(layers: int, width: int, vocabulary: int, device: str) -> Policy:
    """Random weights under the shipped tokenizer; completions hardly end by themselves."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if layers < 1 or vocabulary < 64:
        raise UserError(
            f"layers must be at least 1 and vocab at least 64, got {layers} and {vocabulary}"
        )
    if width < _HEAD_WIDTH or width % _HEAD_WIDTH:
        raise UserError(f"width must be a multiple of {_HEAD_WIDTH}, got {width}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_HEAD_WIDTH * round(width * 8 / 3 / _HEAD_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD_WIDTH,
        num_key_value_heads=width // _HEAD_WIDTH,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    where = pick_device(device)
    tokenizer = AutoTokenizer.from_pretrained(str(files("wapo_analysis") / "assets" / "base"))
    prompts, end = PromptFormat(tokenizer, PromptStyle()), vocabulary - 1
    return Policy(LlamaForCausalLM(config).to(where).eval(), tokenizer, where, (end,), end, prompts)


def _described(policy: Policy, name: str, batch: Batch) -> str:
    config = policy.model.config.get_text_config()
    million = sum(p.numel() for p in policy.module.parameters()) / 1e6
    where = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    return (
        f"{counted(config.num_hidden_layers, 'layer')}, width {config.hidden_size}, vocabulary "
        f"{config.vocab_size} ({million:.1f} M parameters, {name}); {len(batch.rewards)} rollouts, "
        f"{int(batch.lengths.sum())} completion tokens; "
        f"{torch.cuda.get_device_name() if policy.device.type == 'cuda' else where}"
    )
