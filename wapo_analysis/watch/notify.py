"""Posting findings to a webhook: each once, never two within the cool-down, never an exception."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from wapo_analysis.diagnose import SEVERITIES, Diagnosis, Finding
from wapo_analysis.errors import UserError, unknown_name

log = logging.getLogger(__name__)
TIMEOUT = 5.0
"""Seconds after which a post is given up."""


class _NoRedirect(HTTPRedirectHandler):
    """A webhook that moves is an error: a finding is not sent where the user did not say."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    opener: OpenerDirector = build_opener(_NoRedirect)
    request = Request(url, body, {"Content-Type": "application/json"}, method="POST")
    with opener.open(request, timeout=TIMEOUT) as answer:
        answer.read(1024)


@dataclass
class Notifier:
    """Posts new findings of a run as JSON.

    Parameters
    ----------
    url : str
        Where to, http or https.
    cooldown : float
        Seconds between two posts. Findings that come up meanwhile wait, the worst goes first.
    least : {"info", "warning", "critical"}
        Least severity that is posted.
    send : callable
        Posts bytes to a URL.
    clock : callable
        Seconds that never go back.

    Raises
    ------
    UserError
        On a URL that is not http or https, a negative cool-down, or an unknown severity.
    """

    url: str
    cooldown: float = 300.0
    least: str = "warning"
    send: Callable[[str, bytes], None] = _post
    clock: Callable[[], float] = monotonic
    failure: str | None = None
    _posted: set[tuple[str, str]] = field(default_factory=set)
    _last: float | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"webhook must be an http or https address, got {self.url!r}")
        if not self.cooldown >= 0:
            raise UserError(f"cooldown must be 0 or more seconds, got {self.cooldown}")
        if self.least not in SEVERITIES:
            raise unknown_name("severity", self.least, SEVERITIES)

    def offer(self, diagnosis: Diagnosis) -> Finding | None:
        """Post the worst finding that was not posted yet, unless the cool-down lasts.

        Returns
        -------
        Finding or None
            What was posted. A post that failed is tried again after the cool-down; ``failure``
            holds the reason until one succeeds.
        """
        now = self.clock()
        if self._last is not None and now - self._last < self.cooldown:
            return None
        allowed = SEVERITIES[SEVERITIES.index(self.least) :]
        waiting = [f for f in diagnosis.findings if f.severity in allowed and self._new(f)]
        if not waiting:
            return None
        self._last = now
        try:
            self.send(self.url, payload(diagnosis, waiting[0]))
        except (OSError, URLError, ValueError) as error:
            self.failure = (
                f"webhook failed: {str(error) or type(error).__name__}; tried again later"
            )
            log.debug("post to %s failed", self.url, exc_info=True)
            return None
        self.failure = None
        self._posted.add(_key(waiting[0]))
        return waiting[0]

    def _new(self, finding: Finding) -> bool:
        return _key(finding) not in self._posted


def _key(finding: Finding) -> tuple[str, str]:
    """What makes a finding the same one: its onset may move a little as steps come in."""
    return finding.name, finding.severity


def payload(diagnosis: Diagnosis, finding: Finding) -> bytes:
    """JSON of one finding; ``text`` and ``content`` are what chat services show."""
    said = (
        f"{diagnosis.run}: {finding.severity} {finding.name} at step {finding.step}. "
        f"{finding.message} {finding.advice}"
    )
    body = {
        "text": said,
        "content": said[:2000],
        "run": diagnosis.run,
        "verdict": diagnosis.verdict,
        "onset_step": diagnosis.onset_step,
        "finding": finding.to_dict(),
    }
    return json.dumps(body, allow_nan=False).encode()
