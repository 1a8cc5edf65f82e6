"""What detectors of shares and sizes have in common: a condition that lasts to the end."""

from collections.abc import Mapping

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.result import Finding, Number, Severity
from wapo_analysis.series import Series, episodes
from wapo_analysis.table import Array

LEVEL_SIGMAS = 6.0
MOST_RISE = 0.5


def lasting(series: Series, mask: Array) -> int | None:
    """Index at which a condition that lasts to the end of the series began, None if none does.

    Parameters
    ----------
    series : Series
        The series; its ``persist`` says how many steps count as lasting.
    mask : ndarray of bool, shape (n,)
        The condition per step.
    """
    found = episodes(mask, series.persist)
    return found[-1][0] if found and found[-1][1] == len(series) else None


def risen(series: Series, least: float, absolute: float) -> int | None:
    """Index from which a share is above its own baseline, or high in itself, to the end.

    Parameters
    ----------
    series : Series
        A share in [0, 1].
    least : float
        Rise above the baseline that counts; six times the noise if that is more, half at most: a
        jump is noise to itself.
    absolute : float
        Level that counts wherever it began, if it is more than twice the rise that counts.
    """
    rise = max(least, min(LEVEL_SIGMAS * series.smooth_noise, MOST_RISE))
    return lasting(series, series.smooth >= min(series.level + rise, max(absolute, 2 * rise)))


def level_finding(
    series: Series,
    begin: int | None,
    *,
    name: str,
    severity: Severity,
    what: str,
    advice: Advice,
    reference: str,
    share: bool = True,
    evidence: Mapping[str, Number] | None = None,
) -> list[Finding]:
    """One finding on a level that lasts to the end; none if it never began.

    Parameters
    ----------
    series : Series
        What is judged.
    begin : int or None
        Index it began at.
    what : str
        Beginning of the sentence, up to "from step".
    share : bool
        Show the level in percent.
    evidence : mapping, optional
        Numbers beside ``start`` and ``end``.
    """
    if begin is None:
        return []
    step, spec = series.step(begin), ".0%" if share else ".3g"
    return [
        Finding(
            name=name,
            severity=severity,
            step=step,
            message=f"{what} from step {step} on ({series.level:{spec}} at first, "
            f"{series.end:{spec}} at the end).",
            evidence={"start": series.level, "end": series.end, **(evidence or {})},
            advice=advice,
            reference=reference,
        )
    ]
