"""One training step of a random language model, captured in one of several ways, for timing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from experiments.bench.reference import chunked_entropy, trl_selective
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import policy_loss
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.stats import TokenStats, fused_head_stats, token_stats

_PROMPT, _LENGTH, _BATCH = 16, 127, 4


@dataclass(frozen=True)
class Shape:
    """Size of a Llama model."""

    vocabulary: int = 49_152
    width: int = 576
    inner: int = 1536
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    name: str = "SmolLM2-135M"


@dataclass
class Watcher:
    """A recorder, and the CPU time spent on its behalf in ``running`` blocks.

    Attributes
    ----------
    recorder : Recorder
        Recorder of one step.
    closes : bool
        Close it with the step and wait for its writer thread, so that all work is counted.
    seconds : float
    """

    recorder: Recorder
    closes: bool = True
    seconds: float = 0.0

    @classmethod
    def into(cls, folder: Path, **settings: Any) -> Self:
        """Recorder of a new run in a folder."""
        return cls(Recorder(folder, {}, rescore_every=0, **settings))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        started = process_time()
        yield
        self.seconds += process_time() - started


Scored = list[tuple[Watcher, TokenStats]]


def llama(shape: Shape, device: str = "cpu") -> Any:
    """Randomly initialised Llama model in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


@dataclass
class MicroStep:
    """One training step of a model on one micro-batch, with capture in one of several ways.

    Attributes
    ----------
    shape : Shape
        Of the model.
    batch, length : int
        Rollouts and completion tokens of each.
    device : str
    dtype : torch.dtype
        Of the weights.
    """

    shape: Shape = field(default_factory=Shape)
    batch: int = _BATCH
    length: int = _LENGTH
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.model = llama(self.shape, self.device).to(self.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        draw = torch.Generator().manual_seed(0)
        size = (self.batch, _PROMPT + self.length)
        self.ids = torch.randint(self.shape.vocabulary, size, generator=draw).to(self.device)
        self.targets = self.ids[:, _PROMPT:]
        self.mask = torch.ones_like(self.targets, dtype=torch.bool)
        self.logp_old = self.targets.float().fill_(-math.log(self.shape.vocabulary))
        signs = torch.tensor([1.0, -1.0], device=self.device)
        self.advantage = signs.repeat((self.batch + 1) // 2)[: self.batch]
        self.objective = ObjectiveConfig(name="grpo", max_seq_len=self.length)
        self.number = 0

    @property
    def tokens(self) -> int:
        """Completion tokens of a step."""
        return self.batch * self.length

    def plain(self) -> None:
        """Capture nothing."""
        self._update(lambda: (self._selective(self._logits()), []))

    def official(self) -> None:
        """The official entropy and sum of p^2 beside the trainer's log-probability."""

        def score() -> tuple[Tensor, Scored]:
            logits = self._logits()
            with torch.no_grad():
                chunked_entropy(logits)
                logits.softmax(dim=-1).pow(2).sum(dim=-1)
            return self._selective(logits), []

        self._update(score)

    def beside(self, *watchers: Watcher) -> None:
        """Statistics beside the trainer's log-probability; the strict passive figure.

        Several watchers watch the same step, each with statistics of its own.
        """

        def score() -> tuple[Tensor, Scored]:
            logits = self._logits()
            logp, scored = self._selective(logits), []
            for watcher in watchers:
                with watcher.running(), torch.no_grad():
                    scored.append((watcher, self._stats(logits)))
            return logp, scored

        self._update(score)

    def trainer(self, watcher: Watcher) -> None:
        """Statistics that supply the log-probability too, as in `wapo train`."""

        def score() -> tuple[Tensor, Scored]:
            stats = self._stats(self._logits())
            return stats.logp, [(watcher, stats)]

        self._update(score)

    def fused(self, watcher: Watcher) -> None:
        """Replace mode: log-probability and statistics from hidden states, no logits."""

        def score() -> tuple[Tensor, Scored]:
            hidden = self.model.model(input_ids=self.ids, use_cache=False).last_hidden_state
            states = hidden[:, -self.length - 1 : -1]
            stats = fused_head_stats(
                states, self.model.lm_head.weight, self.targets, mask=self.mask
            )
            return stats.logp, [(watcher, stats)]

        self._update(score)

    def _logits(self) -> Tensor:
        """Logits that predict each completion token, shape (B, T, V)."""
        logits: Tensor = self.model(
            input_ids=self.ids, use_cache=False, logits_to_keep=self.length + 1
        ).logits
        return logits[:, :-1]

    def _selective(self, logits: Tensor) -> Tensor:
        """Log-probability of the N tokens without any capture."""
        return trl_selective(logits, self.targets)[self.mask]

    def _stats(self, logits: Tensor) -> TokenStats:
        return token_stats(logits, self.targets, mask=self.mask)

    def _update(self, score: Callable[[], tuple[Tensor, Scored]]) -> None:
        """Forward, loss, backward, optimizer; watchers see the pass where trainers show it."""
        flat, scored = score()
        logp = torch.zeros_like(self.logp_old).masked_scatter(self.mask, flat.float())
        out = policy_loss(
            self.objective,
            logp,
            self.logp_old,
            self.advantage,
            self.mask,
            self.mask,
            torch.full_like(self.advantage, 1.0 / self.tokens),
        )
        for watcher, stats in scored:
            with watcher.running():
                watcher.recorder.watch_pass(self._token_pass(stats, out.kept, out.clipped), flat)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1
        for watcher, _ in scored:
            with watcher.running():
                self._end_step(watcher)

    def _token_pass(self, stats: TokenStats, kept: Tensor, clipped: Tensor) -> TokenPass:
        rollouts = torch.arange(len(self.mask), device=self.mask.device)
        return TokenPass.of_rollouts(
            stats,
            group=torch.zeros_like(rollouts),
            rollout=rollouts,
            advantage=self.advantage,
            token_id=self.targets,
            logp_old=self.logp_old,
            clipped=clipped,
            kept=kept,
            minibatch=0,
            at=self.mask.reshape(-1).nonzero().squeeze(1),
        )

    def _end_step(self, watcher: Watcher) -> None:
        """Hand over the step, as trainers do."""
        rollouts: dict[str, Any] = {
            "group": np.zeros(self.batch),
            "rollout": np.arange(self.batch),
            "prompt": ["What is 3 + 4 - 5?" for _ in range(self.batch)],
            "completion": ["a completion of some length " * 15 for _ in range(self.batch)],
            "reward": np.arange(self.batch) % 2,
            "advantage": self.advantage.cpu().numpy(),
            "length": np.full(self.batch, self.length),
        }
        recorder = watcher.recorder
        recorder.finish_step(
            self.number,
            reward=0.5,
            rollouts=rollouts,
            texts=lambda ids: [f"token {i}" for i in ids],
            entropy=1.0,
            tokens=self.tokens,
        )
        if watcher.closes:
            recorder.close("finished")
        if recorder.failure is not None:
            raise RuntimeError(f"recording failed: {recorder.failure}")
