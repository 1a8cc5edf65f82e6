"""``make fuzz MINUTES=10``: damaged inputs, given to every reader and command.

Files and folders of every kind (runs, sources of imports, settings, data of tasks) are damaged in
their bytes or in what they say, and handed to a reader or a command. Counted are tracebacks, hangs
(over ten seconds), and numbers that differ from the undamaged ones without a word. Half of the
processes are guided by coverage where atheris is installed (extra ``dev``), the others draw by
chance. Exit code 1 if anything was found.

    python -m tests.fuzz --minutes 10
    python -m tests.fuzz --data 0a1b2c...     # one input again, its damaged files are kept
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PATIENCE = 90
"""Seconds after which a worker that says nothing has an input that nothing can interrupt."""


@dataclass
class Found:
    """What all workers have met so far."""

    inputs: Counter[str] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)

    def take(self, line: dict) -> None:
        """Count a line of a worker; the first fault of its kind is printed."""
        if "counts" in line:
            self.inputs.update(line["counts"])
            return
        frames = [text.strip() for text in line["trace"].splitlines() if "wapo_analysis/" in text]
        kind = (line["fault"], frames[-1] if frames else line["call"])
        self.faults[kind] += 1
        if self.faults[kind] == 1:
            print(f"\n{line['fault']} in {line['call']}: {line['input']}\n{line['trace']}")
            print(f"again: python -m tests.fuzz --data {line['data'].rstrip('0')}", flush=True)

    def told(self) -> str:
        """What to put into docs/reliability.md."""
        hangs = sum(n for (fault, _), n in self.faults.items() if fault == "hang")
        silent = sum(n for (fault, _), n in self.faults.items() if fault == "silent difference")
        calls = ", ".join(f"{name} {n}" for name, n in self.inputs.most_common())
        return (
            f"{sum(self.inputs.values())} inputs: "
            f"{sum(self.faults.values()) - hangs - silent} tracebacks, {hangs} hangs, {silent} "
            f"silent differences, {len(self.faults)} kinds\n{calls}"
        )


class Worker:
    """A process that plays inputs, started anew when one of them hangs."""

    def __init__(self, folder: Path, seed: int, until: float, guided: bool) -> None:
        self.beat, self.until, self.guided = folder / f"beat-{seed}", until, guided
        self.seed = seed
        self.beat.write_bytes(b"")
        self.start()

    def start(self) -> None:
        arguments = ["--seed", str(self.seed), "--until", str(self.until), "--beat", str(self.beat)]
        arguments += ["--guided"] * self.guided
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.seen, self.rest = time.time(), b""

    def lines(self) -> list[dict]:
        """Whole lines that have arrived."""
        assert self.process.stdout is not None
        *whole, self.rest = (self.rest + (self.process.stdout.read() or b"")).split(b"\n")
        return [json.loads(line) for line in whole]

    def stuck(self) -> dict | None:
        """The input of a worker that is stuck or dead before its time; a new one is started."""
        age = time.time() - max(self.beat.stat().st_mtime, self.seen)
        dead = self.process.poll() not in (None, 0) and time.time() < self.until
        if age < PATIENCE and not dead:
            return None
        self.process.kill()
        self.process.wait()
        data = self.beat.read_bytes().hex()
        self.seed += 1000
        self.start()
        fault = "died" if dead else "hang"
        return {"fault": fault, "call": "?", "input": "see --data", "trace": "", "data": data}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", help="play one input again, given as hexadecimal bytes")
    options = parser.parse_args()
    if options.data is not None:
        return again(bytes.fromhex(options.data + "0" * (len(options.data) % 2)))
    until, found = time.time() + 60 * options.minutes, Found()
    guided = find_spec("atheris") is not None
    print(f"seed {options.seed}, atheris {'guides half' if guided else 'is not installed'}")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(Path(folder), options.seed + number, until, guided and number % 2 == 1)
            for number in range(options.workers)
        ]
        while any(worker.process.poll() is None for worker in workers):
            time.sleep(0.2)
            for worker in workers:
                for line in worker.lines():
                    found.take(line)
                stuck = worker.stuck() if time.time() < until + PATIENCE else None
                if stuck is not None:
                    found.take(stuck)
            if time.time() > until + 2 * PATIENCE:
                for worker in workers:
                    worker.process.kill()
        for worker in workers:
            for line in worker.lines():
                found.take(line)
    print(found.told())
    return 1 if found.faults else 0


def again(data: bytes) -> int:
    """Play one input; its damaged files stay."""
    from tests.fuzz.target import Fuzz

    folder = Path(tempfile.mkdtemp(prefix="fuzz-again-"))
    outcome = Fuzz(folder).play(data)
    print(f"{outcome.call}: {outcome.input}\n{outcome.fault or 'handled'}\n{outcome.trace}")
    print(f"files: {folder / 'damaged'}")
    return 1 if outcome.fault else 0


if __name__ == "__main__":
    sys.exit(main())
