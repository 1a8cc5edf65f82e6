"""The token taxonomy of policy-gradient updates, as pure mathematics.

Every update of one token is labelled by the sign of its advantage and by the regime of its
probability (peak or valley), and its exact first-order effect on probabilities and entropy follows
from five numbers. The package is arrays in, arrays out: it uses operators only, imports nothing
beyond the standard library, and returns the type it is given (Python numbers, numpy arrays, torch
tensors on any device, pandas Series). ``taxonomy/README.md`` derives every formula.

Examples
--------
>>> import wapo_taxonomy as wt
>>> code = wt.class_code(advantage=1.0, prob=0.9, complement=0.1, collision_rest=0.0082)
>>> wt.CLASS_NAMES[code]
'pos_peak'
>>> wt.rule_dentropy_sign(code)
-1
"""

from wapo_taxonomy.classes import (
    BIN_NAMES,
    CLASS_CODES,
    CLASS_NAMES,
    CLASSES,
    NONE,
    TIE_TOLERANCE,
    UNKNOWN,
    class_code,
    expand_bins,
    is_peak,
    regime_code,
    rule_dentropy_sign,
    sign_code,
    valley_depth,
)
from wapo_taxonomy.effects import (
    EFFECTS,
    ClassEffect,
    collision,
    collision_logp,
    dentropy,
    dprob_other,
    dprob_sampled,
    grad_norm,
    logit_step,
)
from wapo_taxonomy.simulate import Trajectory, simulate, simulate_class
from wapo_taxonomy.vocabulary import VocabularyPrediction, predict

__all__ = [
    "BIN_NAMES",
    "CLASSES",
    "CLASS_CODES",
    "CLASS_NAMES",
    "EFFECTS",
    "NONE",
    "TIE_TOLERANCE",
    "UNKNOWN",
    "ClassEffect",
    "Trajectory",
    "VocabularyPrediction",
    "class_code",
    "collision",
    "collision_logp",
    "dentropy",
    "dprob_other",
    "dprob_sampled",
    "expand_bins",
    "grad_norm",
    "is_peak",
    "logit_step",
    "predict",
    "regime_code",
    "rule_dentropy_sign",
    "sign_code",
    "simulate",
    "simulate_class",
    "valley_depth",
]
