"""What the flat trainer does: right in many ways, or wrong in one.

`RECIPES` are right trainers of many kinds; `BUGS` are faults as public reports tell them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a right trainer does; the defaults are GRPO with a token mean over the batch."""

    prompts: int = 8
    size: int = 8
    epochs: int = 2
    micro: int = 2
    temperature: float = 1.0
    lr: float = 1e-2
    mean: str = "token"
    advantage: str = "group"
    beta: float = 0.0
    entropy: float = 0.0
    sequence: bool = False
    engine: float = 0.0
    filtered: bool = False
    picked: int = 0
    tools: bool = False
    uneven: bool = False
    cut: bool = False
    length_penalty: float = 0.0
    binary: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    bounds: tuple[float, float] = (0.8, 1.2)
    declared: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "token mean": Recipe(),
    "rollout mean": Recipe(mean="rollout"),
    "KL": Recipe(beta=0.1, declared={"beta": 0.1, "kl": "k3"}),
    "KL, large": Recipe(beta=2.0, mean="rollout", declared={"beta": 2.0, "kl": "k3"}),
    "bf16": Recipe(dtype=torch.bfloat16),
    "bf16, one pass": Recipe(dtype=torch.bfloat16, epochs=1, micro=1),
    "GAE": Recipe(advantage="gae", declared={"name": "ppo"}),
    "process rewards": Recipe(advantage="process"),
    "dynamic sampling": Recipe(filtered=True, binary=True),
    "rollouts picked by reward": Recipe(picked=4),
    "rollouts picked by reward, leave one out": Recipe(picked=2, size=16, advantage="loo"),
    "tool text": Recipe(tools=True),
    "temperature 0.6": Recipe(temperature=0.6),
    "temperature 1.5": Recipe(temperature=1.5),
    "engine with correction": Recipe(engine=0.1),
    "sequence ratio": Recipe(sequence=True, mean="rollout", declared={"name": "gspo"}),
    "entropy bonus": Recipe(entropy=0.01, declared={"entropy_coef": 0.01}),
    "length penalty": Recipe(length_penalty=0.05),
    "dropout": Recipe(dropout=0.1, declared={"dropout": 0.1}),
    "uneven groups": Recipe(uneven=True),
    "truncated rollouts left out": Recipe(cut=True),
    "two prompts, four rollouts": Recipe(prompts=2, size=4, micro=1),
    "binary rewards, flat groups": Recipe(prompts=4, size=4, binary=True),
    "one update": Recipe(epochs=1, micro=1),
    "many passes": Recipe(epochs=4, micro=4, lr=3e-3),
}  # fmt: skip
"""Right trainers: nothing may be said against one of them."""

BUGS = {
    "masked positions in the numerator": "gradient on masked tokens",
    "mask of tools inverted": "gradient on masked tokens",
    "masked rollouts in the denominator": "another mean",
    "truncated tokens in the denominator": "another mean",
    "divided by accumulation once more": "loss divided twice by accumulation",
    "means of micro-batches summed": "micro-batches are summed",
    "means of micro-batches averaged": "another mean",
    "prompt counted in the length": "another mean",
    "advantages normalised twice": "another advantage",
    "groups cut at a fixed stride": "advantages of other rollouts",
    "uneven groups taken as one": "another advantage",
    "no std": "another advantage",
    "temperature only in the sampler": "tokens are no samples of the policy",
    "sampler's logps without temperature": "old log-probabilities at another temperature",
    "ratio to its own detached value": "another ratio",
    "old log-probabilities of the updated policy": "ratio never leaves 1",
    "log-probabilities after top-k": "old log-probabilities of a cut distribution",
    "old log-probabilities one position late": "first pass is off",
    "sampler gets weights late": "stale sampler",
    "loss negated twice": "pushed against the advantage",
    "KL subtracted": "KL with the wrong sign",
    "ratio of the summed log-probabilities": "another ratio",
    "clip bounds swapped": "clip does not act",
    "end token dropped from the mask": "end token left out",
    "first action dropped from the mask": "first token left out",
    "one advantage for all": "constant push on every token",
}
"""Bug -> name of the deviation that says so."""

REPORTED = {
    "masked positions in the numerator": "ROLL #444",
    "mask of tools inverted": "RAGEN #71",
    "masked rollouts in the denominator": "miles #2796",
    "truncated tokens in the denominator": "trl #6369",
    "divided by accumulation once more": "ms-swift #10117",
    "means of micro-batches summed": "nanoGPT #206",
    "means of micro-batches averaged": "open-instruct #1161",
    "prompt counted in the length": "compose-rl #51",
    "advantages normalised twice": "gem #113",
    "groups cut at a fixed stride": "AReaL #1419",
    "uneven groups taken as one": "slime #1414",
    "no std": "tinker-cookbook #579",
    "temperature only in the sampler": "OpenRLHF #853",
    "sampler's logps without temperature": "trl #4159",
    "ratio to its own detached value": "minimind #775",
    "old log-probabilities of the updated policy": "tianshou #745",
    "log-probabilities after top-k": "ms-swift #8442",
    "old log-probabilities one position late": "ms-swift #8196",
    "sampler gets weights late": "trl #5312",
    "loss negated twice": "flash-linear-attention #1073",
    "KL subtracted": "ToolRL #52",
    "ratio of the summed log-probabilities": "hands-on-modern-rl #75",
    "end token dropped from the mask": "transformers-CFG #108",
    "first action dropped from the mask": "self-critical #102",
    "one advantage for all": "trl #6095",
}
"""Where something like it was reported."""

HOMES = {
    "masked positions in the numerator": Recipe(tools=True),
    "mask of tools inverted": Recipe(tools=True),
    "masked rollouts in the denominator": Recipe(cut=True),
    "truncated tokens in the denominator": Recipe(cut=True),
    "means of micro-batches summed": Recipe(mean="rollout"),
    "prompt counted in the length": Recipe(mean="rollout"),
    "groups cut at a fixed stride": Recipe(uneven=True),
    "uneven groups taken as one": Recipe(uneven=True),
    "temperature only in the sampler": Recipe(size=24, temperature=0.6),
    "sampler's logps without temperature": Recipe(temperature=0.6),
    "KL subtracted": Recipe(beta=2.0, declared={"beta": 2.0, "kl": "k3"}),
    "ratio of the summed log-probabilities": Recipe(lr=0.002),
    "clip bounds swapped": Recipe(bounds=(0.8, 1.5)),
}
"""What the trainer of a bug does otherwise, where it is not the usual one."""
