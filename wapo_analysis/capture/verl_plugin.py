"""Import this module in verl's actor processes to watch them; the run folder is ``WAPO_RUN``.

    WAPO_RUN=/shared/runs/mine VERL_USE_EXTERNAL_MODULES=wapo_analysis.capture.verl_plugin ...
        actor_rollout_ref.actor.policy_loss.loss_mode=wapo_vanilla

``actor_rollout_ref.model.external_lib=wapo_analysis.capture.verl_plugin`` does the same. Further
settings: ``WAPO_TOKEN_EVERY`` (default 10), ``WAPO_TOKEN_FRACTION`` (default 1), ``WAPO_LABEL``.
"""

import os
from collections.abc import Mapping

from wapo_analysis.capture.verl import VerlWatch, watch_verl
from wapo_analysis.errors import UserError
from wapo_analysis.record import close_at_exit


def from_environment(environment: Mapping[str, str]) -> VerlWatch:
    """Watch verl with the settings of environment variables.

    Raises
    ------
    UserError
        Without ``WAPO_RUN``, or on a setting that is no number.
    """
    path = environment.get("WAPO_RUN")
    if not path:
        raise UserError("set WAPO_RUN to the run folder that verl's actors write")
    try:
        every = int(environment.get("WAPO_TOKEN_EVERY", "10"))
        fraction = float(environment.get("WAPO_TOKEN_FRACTION", "1"))
    except ValueError as error:
        raise UserError(
            f"WAPO_TOKEN_EVERY and WAPO_TOKEN_FRACTION must be numbers: {error}"
        ) from error
    label = environment.get("WAPO_LABEL")
    described = {"label": label} if label else {}
    return watch_verl(path, described, token_every=every, token_fraction=fraction)


WATCH = from_environment(os.environ)
close_at_exit(WATCH.close)
