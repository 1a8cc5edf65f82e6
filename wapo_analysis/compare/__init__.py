"""Settings side by side: one table of reward, entropy, gradient and classes, with intervals.

Runs that share a label are seeds of one setting. Numbers are means over seeds with the 95% interval
of Student's t; two settings are also compared seed by seed, which takes out what the seed decides
(the prompts) for both alike, and the step is named at which they part.
"""

from wapo_analysis.compare.divergence import Divergence, Parting
from wapo_analysis.compare.table import METRICS, Comparison, Interval, Metric, compare

__all__ = ["METRICS", "Comparison", "Divergence", "Interval", "Metric", "Parting", "compare"]
