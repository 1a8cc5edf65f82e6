r"""Exact first-order effect of one token's update (README sections 2 to 6).

One position with raw logits z, temperature T and p = softmax(z/T); y is the sampled token and
$c = -\partial L / \partial \ln p_y$ the exact coefficient the loss puts on it. The update moves
z/T along $k(e_y - p)$ with $k = \eta c / T^2$, the ``step`` below.

All formulas use sums that leave the sampled token out, because the textbook forms subtract nearly
equal numbers where p is near 1, which is half of all tokens of a trained policy. Every argument may
have any shape; they broadcast. Entropy and logarithms are in nats.
"""

from dataclasses import dataclass

from wapo_taxonomy.classes import Array


@dataclass(frozen=True)
class ClassEffect:
    """What an update of one class does, in words and signs; first order, one independent softmax.

    Attributes
    ----------
    name : str
        Class name.
    sampled : int
        Direction of the sampled token's probability: +1 or -1; always true.
    others : str
        Direction of the other tokens; always true.
    entropy : int
        Direction of the entropy by the rule, +1 or -1 (:func:`wapo_taxonomy.rule_dentropy_sign`).
    """

    name: str
    sampled: int
    others: str
    entropy: int


#: Class name -> :class:`ClassEffect`, in the order of ``CLASSES``.
EFFECTS: dict[str, ClassEffect] = {
    effect.name: effect
    for effect in (
        ClassEffect(
            "pos_peak",
            sampled=1,
            others="all fall",
            entropy=-1,
        ),
        ClassEffect(
            "pos_valley",
            sampled=1,
            others="every peak falls; tokens below S - p rise",
            entropy=1,
        ),
        ClassEffect(
            "neg_peak",
            sampled=-1,
            others="all rise",
            entropy=1,
        ),
        ClassEffect(
            "neg_valley",
            sampled=-1,
            others="every peak rises; tokens below S - p fall",
            entropy=-1,
        ),
    )
}


def collision(prob: Array, collision_rest: Array) -> Array:
    r"""Collision probability $S = \sum_v p_v^2 = p^2 + C_o$.

    Parameters
    ----------
    prob : Array
        Probability p of the sampled token, in [0, 1].
    collision_rest : Array
        $C_o = \sum_{v \ne y} p_v^2$.

    Returns
    -------
    Array
        S in [1/V, 1]: the probability that two draws agree. Raises nothing.

    Examples
    --------
    >>> collision(0.5, 0.125)
    0.375
    """
    return prob * prob + collision_rest


def collision_logp(prob: Array, logp: Array, collision_logp_rest: Array) -> Array:
    r"""Collision-weighted log-probability $Q = \sum_v p_v^2 \ln p_v = p^2 \ln p + Q_o$, nats.

    Parameters
    ----------
    prob, logp : Array
        Probability of the sampled token and its logarithm (nats, finite).
    collision_logp_rest : Array
        $Q_o = \sum_{v \ne y} p_v^2 \ln p_v$, nats.

    Returns
    -------
    Array
        Q, nats, never positive. Raises nothing.

    Examples
    --------
    >>> collision_logp(1.0, 0.0, -0.0)
    0.0
    """
    return prob * prob * logp + collision_logp_rest


def logit_step(coef: Array, temperature: Array = 1.0, lr: Array = 1.0) -> Array:
    r"""Step size $k = \eta c / T^2$ of z/T along $e_y - p$ (README section 2).

    One 1/T comes from the gradient with respect to the raw logits, the other from measuring the
    move in z/T, where the probabilities live.

    Parameters
    ----------
    coef : Array
        $c = -\partial L / \partial \ln p_y$; positive pushes the sampled token up.
    temperature : Array
        T > 0 of the softmax whose log-probability enters the loss.
    lr : Array
        Step size of plain gradient descent on the logits.

    Returns
    -------
    Array
        k, to be passed as ``step``. Raises nothing.

    Examples
    --------
    >>> logit_step(2.0, temperature=0.5)
    8.0
    """
    return lr * coef / (temperature * temperature)


def grad_norm(
    coef: Array, complement: Array, collision_rest: Array, temperature: Array = 1.0
) -> Array:
    r"""Exact L2 norm of the loss gradient: $\|dL/dz\| = (|c|/T) \sqrt{(1-p)^2 + C_o}$.

    It lies between $|c|(1-p)/T$ and $\sqrt 2$ times that (README section 3).

    Parameters
    ----------
    coef : Array
        $c = -\partial L / \partial \ln p_y$.
    complement, collision_rest : Array
        1 - p and $C_o$ (both without cancellation).
    temperature : Array
        T > 0.

    Returns
    -------
    Array
        The norm over the raw logits, unit of the loss. Raises nothing.

    Examples
    --------
    >>> grad_norm(-2.0, 0.6, 0.64, temperature=2.0)
    1.0
    """
    return abs(coef) / temperature * (complement * complement + collision_rest) ** 0.5


def dprob_sampled(step: Array, prob: Array, complement: Array, collision_rest: Array) -> Array:
    r"""Change of the sampled token's probability: $dp_y = k\,p\,((1-p)^2 + C_o)$.

    Always has the sign of the step (README section 3).

    Parameters
    ----------
    step : Array
        k of :func:`logit_step`.
    prob, complement, collision_rest : Array
        p, 1 - p and $C_o$ of the sampled token.

    Returns
    -------
    Array
        Probability change, first order in the step. Raises nothing.

    Examples
    --------
    >>> dprob_sampled(0.1, 0.5, 0.5, 0.25)
    0.025
    """
    return step * prob * (complement * complement + collision_rest)


def dprob_other(step: Array, prob_other: Array, prob_sampled: Array, collision: Array) -> Array:
    r"""Change of another token's probability: $dp_v = k\,p_v\,(S - p_y - p_v)$.

    Parameters
    ----------
    step : Array
        k of :func:`logit_step`.
    prob_other, prob_sampled : Array
        $p_v$ and $p_y$, for v other than y.
    collision : Array
        S of :func:`collision`. Where $p_y$ or $p_v$ is near 1 the difference loses digits in
        float32; :func:`wapo_taxonomy.predict` forms it by :func:`wapo_taxonomy.valley_depth`.

    Returns
    -------
    Array
        Probability change, first order in the step. Raises nothing.

    Examples
    --------
    >>> dprob_other(1.0, 0.25, 0.5, 0.375)
    -0.09375
    """
    return step * prob_other * (collision - prob_sampled - prob_other)


def dentropy(
    step: Array,
    prob: Array,
    complement: Array,
    logp: Array,
    entropy: Array,
    collision_rest: Array,
    collision_logp_rest: Array,
) -> Array:
    r"""Change of the entropy: $dH = -k\,[\,p(1-p)(\ln p + H) - (Q_o + C_o H)\,]$.

    Equal to the textbook $-k\,[\,p(\ln p + H) - (Q + S H)\,]$, without its cancellation where p is
    near 1 (README sections 4 and 6).

    Parameters
    ----------
    step : Array
        k of :func:`logit_step`.
    prob, complement, logp : Array
        p, 1 - p and ln p (nats, finite) of the sampled token.
    entropy : Array
        H of the full distribution, nats.
    collision_rest, collision_logp_rest : Array
        $C_o$ and $Q_o$ (nats), the sums without the sampled token.

    Returns
    -------
    Array
        Entropy change in nats, first order in the step. Raises nothing.

    Examples
    --------
    Two equal tokens are a maximum of the entropy, so nothing changes at first order:

    >>> from math import log
    >>> abs(dentropy(1.0, 0.5, 0.5, log(0.5), log(2), 0.25, 0.25 * log(0.5))) < 1e-15
    True
    """
    sampled = prob * complement * (logp + entropy)
    rest = collision_logp_rest + collision_rest * entropy
    return -step * (sampled - rest)
