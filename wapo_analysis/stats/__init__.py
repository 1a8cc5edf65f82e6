"""Logits to token statistics: logp, entropy and the collision sums, exact on near-certain tokens.

Shapes: N rows (tokens), V vocabulary, D hidden width. Everything is in nats and at temperature T.

The sampled token and the mode are left out of the sums. For a near-certain token the textbook
forms ``1 - 2p + sum p^2`` and ``p ln p + H`` subtract almost equal numbers; without these two terms
nothing is left to cancel (taxonomy/README.md, section on stable forms).

`rows` says which logits are read, `eager`, `compiled` and `triton_kernel` reduce each row to seven
numbers, `formulas` makes the statistics of them, `topk` finds the largest columns, `logits` and
`head` are the two ways in.
"""

from wapo_analysis.stats.formulas import TokenStats
from wapo_analysis.stats.head import fused_head_stats
from wapo_analysis.stats.logits import token_stats

__all__ = ["TokenStats", "fused_head_stats", "token_stats"]
