"""Where a person waits: start of the commands, figures and page, a large step, a slow disk.

Commands run as processes of their own, in CPU time of process and children; the bases are what
they cannot do without: ``import pandas``, and loading the same model with transformers alone.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from time import perf_counter, sleep

import numpy as np

from experiments.bench.data import token_columns, token_pass
from experiments.bench.harness import Measure, Measures, Work, interleave
from experiments.bench.options import Options
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.table import Records
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

_STEPS = 20
_LARGE = 4_000_000
_OVERFLOW_ROWS, _PAUSE = 1 << 18, 0.03
_BARE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({base!r})
AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
"""
_OURS = """
from wapo_analysis.cli import application
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import begin
application("train")
begin(TrainConfig(), None, None)
"""


def measure(options: Options) -> Measures:
    """Start-up, figures and page of a run of 20 steps, a step of 4M rows, a queue that is full."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = folder / "run"
        options.say(f"waiting: a run of {_STEPS} steps of the shipped base")
        train(TrainConfig(steps=_STEPS, checkpoint_every=0), run)
        found = _starts(run, options) | _drawn(run, folder, options)
        found |= _large_step(folder / "large", options)
        return found | _overflow(folder / "overflow", options)


def _starts(run: Path, options: Options) -> Measures:
    """Start of ``wapo diagnose`` and ``wapo train`` beside what they import."""
    options.say("waiting: start of wapo diagnose and wapo train")
    wapo, python = (sys.executable, "-m", "wapo_analysis"), (sys.executable, "-c")
    base = str(files("wapo_analysis") / "assets/base")
    short = {
        "diagnose": _command(*wapo, "diagnose", str(run)),
        "pandas": _command(*python, "import pandas"),
    }
    long = {
        "train": _command(*python, _OURS),
        "bare": _command(*python, _BARE.format(base=base)),
    }
    times = interleave(short, options.rounds_or(3, 9), _children_clock)
    starts = interleave(long, options.rounds_or(1, 5), _children_clock)
    note = f"run of {_STEPS} steps"
    return {
        "diagnose_cpu_seconds": _middle(times.seconds["diagnose"], note),
        "diagnose_vs_import_pandas": times.ratio("diagnose", "pandas", note),
        "train_start_cpu_seconds": _middle(starts.seconds["train"], "shipped base"),
        "train_start_vs_bare": starts.ratio("train", "bare", "shipped base, until the first step"),
    }


def _drawn(run: Path, folder: Path, options: Options) -> Measures:
    """All figures and the page of a run; CPU time, the wall time stands beside it."""
    options.say("waiting: wapo figures and wapo report")
    found: Measures = {}
    for name, out in (("figures", folder / "figures"), ("report", folder / "page.html")):
        words = (sys.executable, "-m", "wapo_analysis", name, str(run), "--out", str(out))
        started, seconds = perf_counter(), _children_clock(_command(*words))
        note = f"run of {_STEPS} steps, {os.cpu_count()} cores, {perf_counter() - started:.1f} s"
        found[f"{name}_cpu_seconds"] = Measure(seconds, note=f"{note} of wall time")
    return found


def _large_step(run: Path, options: Options) -> Measures:
    """Time and peak memory of ``wapo diagnose --step`` of a step of 4 million rows."""
    options.say(f"waiting: wapo diagnose --step of {_LARGE} rows")
    columns = token_columns(_LARGE)
    rollouts = np.unique(columns["rollout"])
    described = {"step": np.ones(len(rollouts)), "rank": np.zeros(len(rollouts))}
    described |= {"group": rollouts // 8, "rollout": rollouts, "reward": rollouts % 2}
    writer = RunWriter(run, {"name": "large"})
    writer.write_part(Records.build(TOKENS, columns), 1)
    writer.write_part(Records.build(ROLLOUTS, described), 1)
    writer.close("finished")
    del columns
    words = (sys.executable, "-m", "wapo_analysis", "diagnose", str(run), "--step", "1")
    told = json.loads(_told(sys.executable, "-c", _PEAK, *words))
    note = f"{_LARGE / 1e6:.0f} M rows, whole command"
    return {
        "large_step_cpu_seconds": Measure(told["seconds"], note=note),
        "large_step_peak_mb": Measure(told["peak"] / 1024, note=note),
    }


_PEAK = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss}))
"""


def _overflow(run: Path, options: Options) -> Measures:
    """Longest `finish_step` while steps come faster than the disk takes them, and the shares."""
    options.say(f"waiting: {_STEPS} steps of {_OVERFLOW_ROWS} rows, one every 30 ms")
    tokens = token_pass(_OVERFLOW_ROWS)
    recorder, blocked = Recorder(run, {"name": "overflow"}), []
    for step in range(1, _STEPS + 1):
        recorder.watch_pass(tokens)
        started = perf_counter()
        recorder.finish_step(step, reward=0.0)
        blocked.append(1e3 * (perf_counter() - started))
        sleep(_PAUSE)
    recorder.close("finished")
    if recorder.failure is not None:
        raise recorder.failure
    shares = ", ".join(f"{share:.3g}" for share in open_run(run).steps["token_fraction"])
    note = f"{_OVERFLOW_ROWS} rows every 30 ms, wall time; shares written: {shares}"
    return {"finish_step_ms": Measure(statistics.median(blocked), min(blocked), max(blocked), note)}


def _middle(seconds: Sequence[float], note: str) -> Measure:
    return Measure(statistics.median(seconds), min(seconds), max(seconds), note)


def _command(*words: str) -> Work:
    return partial(_told, *words)


def _told(*words: str) -> str:
    """What a process prints.

    Raises
    ------
    RuntimeError
        If it fails; the message ends with its last line.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(words, capture_output=True, text=True, env=variables)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{words[-1][:60]} failed: {last}")
    return done.stdout


def _children_clock(work: Work) -> float:
    """CPU seconds of the processes that the work starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
