"""wapo watch: what is posted to a webhook, when, and what happens if that fails."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from wapo_analysis.diagnose import Advice, Diagnosis, Finding
from wapo_analysis.errors import UserError
from wapo_analysis.watch import Notifier


def finding(name: str, severity: Any = "critical") -> Finding:
    return Finding(
        name=name,
        severity=severity,
        step=7,
        message="It happened.",
        evidence={"ratio": float("inf"), "share": 0.5},
        advice=Advice("Do this."),
        reference="there",
    )


def diagnosis(*findings: Finding) -> Diagnosis:
    return Diagnosis(
        run="mine",
        verdict="healthy",
        onset_step=None,
        first_warning_step=None,
        drivers=(),
        findings=findings,
        skipped=(),
        sentence="",
    )


class Post:
    """Takes the place of the network and of the clock."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.now = 0.0
        self.error: Exception | None = None

    def __call__(self, url: str, body: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(json.loads(body))

    def clock(self) -> float:
        return self.now

    def notifier(self, **given: Any) -> Notifier:
        return Notifier("https://x.example/h", send=self, clock=self.clock, **given)


def test_a_finding_is_posted_once_and_others_after_the_cooldown() -> None:
    post = Post()
    notifier = post.notifier(cooldown=60)
    both = diagnosis(finding("a"), finding("b", "warning"), finding("c", "info"))
    for now in (0, 1, 59, 60, 61, 500):
        post.now = now
        notifier.offer(both)
    assert [sent["finding"]["name"] for sent in post.sent] == ["a", "b"]
    post.now = 1000
    notifier.offer(diagnosis(finding("b", "critical")))
    assert post.sent[-1]["finding"]["severity"] == "critical", "worse than before is news"


def test_the_payload_is_json_with_the_finding() -> None:
    post = Post()
    assert post.notifier().offer(diagnosis(finding("a"))) is not None
    (sent,) = post.sent
    assert sent["run"] == "mine"
    assert sent["finding"]["evidence"] == {"ratio": None, "share": 0.5}
    assert "critical a at step 7. It happened. Do this." in sent["text"]


def test_a_failed_post_is_told_and_tried_again() -> None:
    post = Post()
    notifier = post.notifier(cooldown=10)
    post.error = TimeoutError()
    assert notifier.offer(diagnosis(finding("a"))) is None
    assert notifier.failure == "webhook failed: TimeoutError; tried again later"
    post.error, post.now = None, 11
    assert notifier.offer(diagnosis(finding("a"))) is not None
    assert notifier.failure is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "file:///etc/passwd"}, "http or https"),
        ({"url": "https://"}, "http or https"),
        ({"url": "https://x", "cooldown": -1.0}, "cooldown must be 0 or more"),
        ({"url": "https://x", "cooldown": float("nan")}, "cooldown must be 0 or more"),
        ({"url": "https://x", "least": "loud"}, "unknown severity 'loud'"),
    ],
)
def test_bad_webhook_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Notifier(**given)


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            answers = {"/ok": 204, "/moved": 302, "/full": 500}
            self.send_response(answers[self.path])
            self.send_header("Location", "/ok")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", received
    http.shutdown()
    thread.join()
    http.server_close()


def test_real_posts(server: tuple[str, list[bytes]]) -> None:
    address, received = server
    assert Notifier(f"{address}/ok").offer(diagnosis(finding("a"))) is not None
    assert json.loads(received[0])["finding"]["name"] == "a"
    for path in ("/moved", "/full"):
        notifier = Notifier(f"{address}{path}")
        assert notifier.offer(diagnosis(finding("a"))) is None
        assert notifier.failure is not None
    assert len(received) == 3, "a redirect is not followed"
