"""One process of ``python -m tests.fuzz``: plays inputs until the time is over, one JSON line each
fault; the file ``beat`` holds the input in hand, for whoever ends a worker that hangs."""

import argparse
import gc
import importlib
import json
import pkgutil
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

LENGTH = 200  # bytes that an input is made of
MEMORY = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--beat", type=Path, required=True)
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    options = parser.parse_args()
    # One input must not take all memory of the machine: what asks for it gets a MemoryError.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with _instrumented() if options.guided else nullcontext():
        import wapo_analysis
        from tests.fuzz.target import Fuzz
        from wapo_analysis.diagnose import detectors

        detectors.FAULTS_RAISE = True

        if options.guided:  # what a command imports when it runs is to be seen as well
            for module in pkgutil.walk_packages(wapo_analysis.__path__, "wapo_analysis."):
                if "plugin" not in module.name and "__main__" not in module.name:
                    with suppress(ImportError):  # of an extra
                        importlib.import_module(module.name)
    # In memory, where there is such a place: nothing waits for a disk.
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    try:
        worker = Worker(Fuzz(folder), options.beat, options.until)
        gc.collect()
        gc.freeze()  # what is loaded by now need not be gone through again and again
        (worker.guided if options.guided else worker.by_chance)(options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _instrumented():
    import atheris

    return atheris.instrument_imports(include=["wapo_analysis"])


class Worker:
    """Plays inputs and tells what came of them."""

    def __init__(self, fuzz, beat: Path, until: float) -> None:
        self.fuzz, self.beat, self.until = fuzz, beat, until
        self.counts: Counter[str] = Counter()
        self.told = time.time()

    def by_chance(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.time() < self.until:
            self.one(draw.randbytes(LENGTH))
        self.tell_counts()

    def guided(self, seed: int) -> None:
        import atheris

        draw = random.Random(seed)
        corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
        for number in range(64):
            (corpus / str(number)).write_bytes(draw.randbytes(LENGTH))
        rest = max(1, int(self.until - time.time()))
        limits = [f"-max_total_time={rest}", f"-max_len={LENGTH}", "-rss_limit_mb=0", "-timeout=0"]
        limits += [f"-seed={seed + 1}", f"-artifact_prefix={corpus}/"]
        atheris.Setup(["fuzz", *limits, str(corpus)], self.one)
        atheris.Fuzz()

    def one(self, data: bytes) -> None:
        self.beat.write_bytes(data)
        outcome = self.fuzz.play(data)
        self.counts[outcome.call] += 1
        if outcome.fault:
            self.say(data=data.hex(), **vars(outcome))
        if time.time() - self.told > 2:
            self.tell_counts()

    def tell_counts(self) -> None:
        self.told = time.time()
        self.say(counts=self.counts)
        self.counts = Counter()

    def say(self, **line: object) -> None:
        print(json.dumps(line), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
