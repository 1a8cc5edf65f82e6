"""Posting findings to a webhook: each once, never two within the cool-down, never an exception."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Thread
from time import monotonic
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from wapo_analysis.diagnose import SEVERITIES, Diagnosis, Finding
from wapo_analysis.errors import UserError, unknown_name

log = logging.getLogger(__name__)
TIMEOUT = 5.0
"""Seconds after which a post is given up, however slowly its answer trickles in."""


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
        On an address that cannot be posted to, a negative cool-down, or an unknown severity.
    """

    url: str
    cooldown: float = 300.0
    least: str = "warning"
    send: Callable[[str, bytes], None] = _post
    clock: Callable[[], float] = monotonic
    failure: str | None = None
    _posted: set[tuple[str, str]] = field(default_factory=set)
    _last: float | None = None
    _post: Thread | None = None

    def __post_init__(self) -> None:
        _check_address(self.url)
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
        if self._post is not None and self._post.is_alive():
            return None
        if self._last is not None and now - self._last < self.cooldown:
            return None
        allowed = SEVERITIES[SEVERITIES.index(self.least) :]
        waiting = [f for f in diagnosis.findings if f.severity in allowed and self._new(f)]
        if not waiting:
            return None
        self._last = now
        # In a thread, as an address or an answer may take any time, and the watch goes on.
        self.failure = f"webhook failed: no answer within {TIMEOUT:g} s; tried again later"
        self._post = Thread(target=self._send, args=(diagnosis, waiting[0]), daemon=True)
        self._post.start()
        self._post.join(TIMEOUT)
        return None if self._new(waiting[0]) else waiting[0]

    def _send(self, diagnosis: Diagnosis, finding: Finding) -> None:
        try:
            self.send(self.url, payload(diagnosis, finding))
        except Exception as error:  # address, protocol and answer have exceptions of their own
            told = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, HTTPException):
                told = f"no answer of HTTP ({told})"
            self.failure = f"webhook failed: {told[:200]}; tried again later"
            log.debug("post to %s failed", self.url, exc_info=True)
            if isinstance(error, HTTPError):
                error.close()
            return
        self.failure = None
        self._posted.add(_key(finding))

    def _new(self, finding: Finding) -> bool:
        return _key(finding) not in self._posted


def _check_address(url: str) -> None:
    """Refuse what no post could go to, before the watch begins."""
    told = f"webhook must be an http or https address, got {url!r}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        printed = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not host or not printed:
            raise UserError(told)
        host.encode("idna")  # as the connection will: labels of 1 to 63 characters
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{told} ({error})") from error
    if parts.username is not None:
        raise UserError(f"webhook must be an address without user and password, got {url!r}")


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
