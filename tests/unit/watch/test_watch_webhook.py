"""wapo watch: what is posted to a webhook, when, and what happens if that fails."""

import json
import socket
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


ANSWERS = {
    "no http": b"SSH-2.0-x\r\n",
    "nothing": b"",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "number": b"HTTP/1.1 9999999 \x1b[31mno\r\n\r\n",
    "loop": b"HTTP/1.1 307 moved\r\nLocation: http://[::1\r\n\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_answers_the_watch_goes_on(answer: str) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(9999)
                connection.sendall(ANSWERS[answer])

        thread = threading.Thread(target=serve)
        thread.start()
        notifier = Notifier(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        assert notifier.offer(diagnosis(finding("a"))) is None
        thread.join()
    assert notifier.failure is not None
    assert notifier.failure.startswith("webhook failed: ")
    assert "\n" not in notifier.failure


def test_an_answer_that_trickles_does_not_hold_the_watch_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wapo_analysis.watch.live.TIMEOUT", 0.05)
    go_on = threading.Event()
    notifier = Notifier("http://x.example", cooldown=0.0, send=lambda url, body: go_on.wait(9))
    assert notifier.offer(diagnosis(finding("a"))) is None
    assert notifier.failure == "webhook failed: no answer within 0.05 s; tried again later"
    assert notifier.offer(diagnosis(finding("a"))) is None, "one post at a time"
    go_on.set()
    assert notifier._post is not None
    notifier._post.join()
    assert notifier.failure is None
    assert notifier.offer(diagnosis(finding("a"))) is None, "it has arrived after all"


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://x:99999/", "http://x:port/", "http://x y/", "http://x/\n", "http://",
     "http://x/\u202e", "http://b\u00fccher.example/", "http://user:pass@x/", "http://x..y/",
     "http://" + "a" * 64 + ".example/", "//x/", "javascript:alert(1)", ""],
)  # fmt: skip
def test_addresses_are_checked_at_the_start(url: str) -> None:
    with pytest.raises(UserError, match="webhook must be an"):
        Notifier(url)
