"""From a recorded run to causes: who holds a step's gradient, what a class did to the path."""

from wapo_analysis.attribute.spikes import StepAttribution, attribute_step
from wapo_analysis.attribute.whatif import WhatIf, what_if

__all__ = ["StepAttribution", "WhatIf", "attribute_step", "what_if"]
