"""Does this trainer do what it says? Detected from the recorded tokens alone.

>>> from wapo_analysis.audit import audit
>>> audit(run)  # doctest: +SKIP
"""

from wapo_analysis.audit.evidence import Evidence
from wapo_analysis.audit.judge import STEPS, judge
from wapo_analysis.audit.result import Audit, Deviation
from wapo_analysis.errors import UserError
from wapo_analysis.store import Need, Run

__all__ = ["Audit", "Deviation", "audit", "first_audit"]


def audit(run: Run, steps: int = STEPS) -> Audit:
    """Say what objective is in force and where the trainer deviates from what it declares.

    Parameters
    ----------
    run : Run
    steps : int
        How many of the first steps with token rows are looked at.

    Raises
    ------
    UserError
        If a file of the run is broken; the message names it.
    """
    return judge(Evidence.of_run(run, steps), run.name)


def first_audit(run: Run, steps: int = 3) -> Audit | None:
    """Audit of the first steps, for what shows it beside other things.

    Returns
    -------
    Audit or None
        None if the run has no token rows with a gradient, or a file of it is broken.
    """
    try:
        known = run.token_steps() and run.lacks(Need("tokens", "coef")) is None
        return audit(run, steps) if known else None
    except UserError:
        return None
