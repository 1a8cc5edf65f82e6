"""What watching costs of a whole micro-step: forward, backward and AdamW of a 135M model.

The model has the shape of SmolLM2-135M (30 layers, width 576, vocabulary 49152, tied) with random
weights, and sees about 500 completion tokens. The base arm captures nothing: its log-probability is
the selective log-softmax a trainer computes anyway. *Beside* is the strict passive figure: the same
log-probability, and all statistics read from the same logits beside it; the base gets nothing in
return. *Trainer* is what `wapo train` does: the statistics supply the log-probability as well.
*Fused* is replace mode: no logits.

The overhead is the CPU time of everything capture does in a step (statistics, token pass, recorder,
its writer thread until all files are written) over the CPU time of the rest of the same step. Both
are read in one step, so the noise of the step itself does not drown a few percent. What the
gradient hook adds to the backward pass is a view of N numbers.
"""

import tempfile
from pathlib import Path
from statistics import median
from time import process_time

from experiments.bench.harness import Measure, Measures, interleave
from experiments.bench.micro_step import MicroStep, Watcher
from experiments.bench.options import Options

KNOBS = {"class_totals": {"token_every": 0}, "full": {"token_every": 1}}
"""What the recorder writes: class totals only, or every token row as well."""


def measure(options: Options) -> Measures:
    """Overheads of the two knobs; in a full bench also whole steps of all arms, interleaved."""
    options.say("step: SmolLM2-135M shape, random weights")
    step = MicroStep()
    note = f"{step.tokens} tokens, V={step.shape.vocabulary}, {step.shape.name} shape, float32"
    with tempfile.TemporaryDirectory() as folder:
        found = overheads(step, Path(folder), options.rounds_or(2, 5), note)
        return found if options.quick else found | _arms(step, Path(folder), options, note)


def overheads(step: MicroStep, folder: Path, rounds: int, note: str = "") -> Measures:
    """Share of a step that passive capture adds, for each knob, all knobs in the same steps."""
    shares: dict[str, list[float]] = {knob: [] for knob in KNOBS}
    step.plain()  # makes the optimizer's state
    for number in range(rounds):
        watchers = {
            knob: Watcher.into(folder / f"{knob}-{number}", **settings)
            for knob, settings in KNOBS.items()
        }
        started = process_time()
        step.beside(*watchers.values())
        rest = process_time() - started - sum(w.seconds for w in watchers.values())
        for knob, watcher in watchers.items():
            shares[knob].append(watcher.seconds / rest)
    return {
        f"capture_overhead_{knob}": Measure(median(found), min(found), max(found), note)
        for knob, found in shares.items()
    }


def _arms(step: MicroStep, folder: Path, options: Options, note: str) -> Measures:
    """Whole steps of every arm against the plain one, in turn."""
    made = iter(range(10_000))

    def watcher() -> Watcher:
        return Watcher.into(folder / f"arm-{next(made)}")

    options.say("step: whole steps of five arms")
    times = interleave(
        {
            "plain": step.plain,
            "official": step.official,
            "beside": lambda: step.beside(watcher()),
            "trainer": lambda: step.trainer(watcher()),
            "fused": lambda: step.fused(watcher()),
        },
        options.rounds_or(2, 3),
    )
    return {
        f"step_overhead_{arm}": times.ratio(arm, "plain", note).shifted(-1.0)
        for arm in ("official", "beside", "trainer", "fused")
    }
