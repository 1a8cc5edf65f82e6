"""What the eager statistics do per logit, counted instead of timed: the same on any machine."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wapo_analysis.stats import token_stats

ROWS, VOCABULARY = 64, 8192


class _Elements(TorchDispatchMode):
    """Adds up the elements that operations read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = [*tree_leaves(args), *tree_leaves(kwargs or {}), *tree_leaves(made)]
            self.count += sum(t.numel() for t in touched if isinstance(t, torch.Tensor))
        return made


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, 26.9), (torch.bfloat16, 32.9)])
def test_elements_touched_per_logit(dtype: torch.dtype, stored: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator).to(dtype)
    best = logits.argmax(-1)
    with _Elements() as seen:
        token_stats(logits, best, backend="eager")
    assert seen.count / logits.numel() <= 1.1 * stored
