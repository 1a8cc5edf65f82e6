"""What-if on made-up probes whose answer is known, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.attribute import what_if
from wapo_analysis.attribute.whatif import MODEL_FACTOR
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.probes import agreement, three_numbers
from wapo_analysis.schema import GRADIENT, OTHER_TOKENS, PROBES, UPDATE
from wapo_analysis.store import Run, RunWriter, open_run
from wapo_analysis.table import Records

UPDATES = 2
EFFECTS = (-3e-3, 0.0, 1e-3, -2e-3)
"""Change of the entropy that each class's share of one update causes, nats."""
STEPS = 20


def recorded(
    path: Path,
    effects: tuple[float, ...] = EFFECTS,
    grams: np.ndarray | None = None,
    entropy: float | np.ndarray = 0.5,
    **config: Any,
) -> Run:
    """Run whose probes say the same at every fourth step; entropy constant or step by step."""
    settings = {"optimizer": "sgd", "epochs": 1, "minibatches": UPDATES, "max_grad_norm": 0.0}
    manifest = {
        "name": path.name,
        "source": "built-in",
        "objective": {"name": "grpo"},
        "temperature": 1.0,
        "vocabulary": 16,
        "config": settings | config,
    }
    gram = np.eye(4) if grams is None else grams
    writer = RunWriter(path, manifest)
    values = np.broadcast_to(entropy, STEPS)
    for step in range(1, STEPS + 1):
        if step % 4 == 0:
            writer.write_part(_probe(step, effects, gram), step)
        writer.append_step({"step": step, "entropy": float(values[step - 1])})
    writer.close("finished")
    return open_run(path)


def _probe(step: int, effects: tuple[float, ...], gram: np.ndarray) -> Records:
    total = sum(effects)
    alone = [*effects, total, total]
    dots = np.vstack([gram, gram.sum(0), np.full(4, np.nan)])
    columns = {
        "step": [step] * 6,
        "minibatch": [0] * 6,
        "part": [0, 1, 2, 3, GRADIENT, UPDATE],
        "tokens_of": [OTHER_TOKENS] * 6,
        "counterfactual_dentropy": alone,
        "measured_dentropy": [total] * 6,
    }
    names = ("pos_peak", "pos_valley", "neg_peak", "neg_valley")
    columns |= {f"dot_{name}": dots[:, place] for place, name in enumerate(names)}
    return Records.build(PROBES, columns)


def expected(excluded: list[int], entropy: float = 0.5) -> np.ndarray:
    """Path of plain SGD without clipping: nothing but the excluded effects is missing."""
    missing = sum(EFFECTS[code] for code in excluded)
    updates = UPDATES * np.arange(STEPS)
    return entropy * np.exp(-missing * updates / entropy)


@pytest.mark.parametrize(
    ("names", "codes"),
    [(["pos_peak"], [0]), (["neg"], [2, 3]), (["peak", "neg_valley"], [0, 2, 3])],
)
def test_sgd_without_clipping_loses_the_excluded_effects(
    names: list[str], codes: list[int], tmp_path: Path
) -> None:
    told = what_if(recorded(tmp_path / "run"), names)
    np.testing.assert_allclose(told.path["estimated"], expected(codes), rtol=1e-12)
    assert told.probes == 5
    assert told.recorded_change == 0
    assert told.effect > 0
    assert told.is_clear
    assert told.path["estimated"].iloc[0] == 0.5, "the first batch comes before any update"
    shift = np.log(told.path["estimated"] / 0.5)
    np.testing.assert_allclose(np.log(told.path["low"] / 0.5), shift / MODEL_FACTOR)
    np.testing.assert_allclose(np.log(told.path["high"] / 0.5), shift * MODEL_FACTOR)


def test_adamw_spends_a_gradient_over_ten_updates_and_rescales_the_rest(tmp_path: Path) -> None:
    plain = what_if(recorded(tmp_path / "a", optimizer="adamw", beta1=0.0), ["pos_valley"])
    # The gradients are orthogonal and of one length: three of four are left.
    rho = np.sqrt(4 / 3)
    extra = (rho - 1) * sum(EFFECTS)
    path = 0.5 * np.exp(extra * UPDATES * np.arange(STEPS) / 0.5)
    np.testing.assert_allclose(plain.path["estimated"], path, rtol=1e-12)
    slow = what_if(recorded(tmp_path / "b", optimizer="adamw", beta1=0.9), ["pos_valley"])
    told, quick = (np.log(w.path["estimated"].iloc[1:] / 0.5) for w in (slow, plain))
    ratio = told / quick
    assert 4 < ratio.iloc[0] < ratio.iloc[-1] < 10, "early gradients have a shorter past"


def test_sgd_rescales_through_clipping_alone(tmp_path: Path) -> None:
    clipped = what_if(recorded(tmp_path / "run", max_grad_norm=1.0), ["pos_valley"])
    rho = (1 / np.sqrt(3)) / (1 / np.sqrt(4))
    path = 0.5 * np.exp((rho - 1) * sum(EFFECTS) * UPDATES * np.arange(STEPS) / 0.5)
    np.testing.assert_allclose(clipped.path["estimated"], path, rtol=1e-12)


def test_excluding_everything_keeps_the_policy(tmp_path: Path) -> None:
    told = what_if(recorded(tmp_path / "run"), ["pos", "neg"])
    np.testing.assert_allclose(told.path["estimated"], expected([0, 1, 2, 3]), rtol=1e-12)


def test_a_class_without_gradient_changes_nothing(tmp_path: Path) -> None:
    gram = np.diag([1.0, 0.0, 1.0, 1.0])
    told = what_if(recorded(tmp_path / "run", grams=gram), ["pos_valley"])
    np.testing.assert_array_equal(told.path["estimated"], told.path["recorded"])
    assert not told.is_clear
    assert told.silence == "the band of the probes holds zero"


FALLING = np.linspace(0.5, 0.3, STEPS)


def test_it_speaks_only_within_what_the_run_has_seen(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", entropy=FALLING)
    told = what_if(run, ["pos_peak"])
    assert told.inside
    assert told.silence is None
    assert told.low < told.estimated_change < told.high
    assert told.low > told.recorded_change
    run = recorded(tmp_path / "strong", tuple(4 * e for e in EFFECTS), entropy=FALLING)
    outside = what_if(run, ["pos_peak", "neg_valley"])
    assert outside.is_clear
    assert outside.silence is not None
    assert outside.silence.startswith("the estimate leaves the entropies this run has seen (0.300")
    assert outside.to_dict()["says"] is None
    assert outside.command == f"wapo fork {run.path} --at 0 --exclude-bins pos_peak,neg_valley"
    assert outside.command in outside.to_text()


def test_a_path_its_probes_do_not_explain_says_nothing(tmp_path: Path) -> None:
    rising = recorded(tmp_path / "run", entropy=FALLING[::-1])
    assert what_if(rising, ["pos_peak"]).silence == (
        "the probed updates do not account for the recorded path"
    )
    slow = recorded(tmp_path / "slow", entropy=np.linspace(0.5, 0.45, STEPS))
    told = what_if(slow, ["neg_peak"])
    assert told.factor == pytest.approx(told.accounted)
    assert told.factor > MODEL_FACTOR


def test_trust_counts_the_predictions_that_had_the_right_sign(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "run", steps=24, probe_every=3))
    told = what_if(run, ["neg"])
    assert list(told.trust["cls"]) == ["pos_peak", "pos_valley", "neg_peak", "neg_valley"]
    assert (told.trust["alone_of"] == 8).all()
    numbers = three_numbers(run.probes)
    for code, row in told.trust.iterrows():
        own = numbers[numbers["tokens_of"] == code]
        for column, measured in (("alone", "counterfactual"), ("whole", "measured")):
            agreed = agreement(own["predicted"], own[measured])
            assert row[column] == round(agreed["sign_agreement"] * agreed["pairs"])
    assert "pos_valley       8 of 8        8 of 8" in told.to_text()
    json.dumps(told.to_dict(), allow_nan=False)


def test_estimates_stay_entropies(tmp_path: Path) -> None:
    up = what_if(recorded(tmp_path / "up", effects=(-5.0, 0.0, 0.0, 0.0)), ["pos_peak"])
    assert up.path["estimated"].max() == pytest.approx(np.log(16))
    down = what_if(recorded(tmp_path / "down", effects=(5.0, 0.0, 0.0, 0.0)), ["pos_peak"])
    assert down.path["estimated"].min() >= 0
    still = what_if(recorded(tmp_path / "zero", entropy=0.0), ["pos_peak"])
    assert np.isfinite(still.path["estimated"]).all()


def test_too_few_probes_and_wrong_names_are_told(tmp_path: Path) -> None:
    bare = open_run(write_fake_run(tmp_path / "bare", steps=4))
    with pytest.raises(UserError, match=r"bare has 0 probes, .* wapo train --probe-every 5"):
        what_if(bare, ["neg_peak"])
    run = recorded(tmp_path / "run")
    with pytest.raises(UserError, match="unknown bin 'peaks'; allowed: pos_peak"):
        what_if(run, ["peaks"])
    with pytest.raises(UserError, match="name the classes to exclude"):
        what_if(run, [])


def test_a_log_without_entropy_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="r has no entropy in its step log"):
        what_if(recorded(tmp_path / "r", entropy=np.nan), ["neg_peak"])


def test_bands_hold_the_estimate_and_repeat(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", steps=24, probe_every=3)
    one, two = what_if(open_run(path), ["neg"]), what_if(open_run(path), ["neg"])
    pd.testing.assert_frame_equal(one.path, two.path)
    assert one.low <= one.estimated_change <= one.high
    assert (one.path["low"] <= one.path["high"]).all()


def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(recorded(tmp_path / "run", entropy=FALLING).path)
    assert wapo(["whatif", path, "--exclude-bins", "pos_peak"]) == 0
    text = capfd.readouterr().out
    assert "Without pos_peak entropy would have ended higher, by 0.0" in text
    assert "Predictions of this run" not in text, "these probes hold no prediction"
    assert wapo(["whatif", path, "--exclude-bins", "pos_valley, peak"]) == 0
    text = capfd.readouterr().out
    assert "Without pos_peak and pos_valley and neg_peak" in text
    assert wapo(["whatif", path, "--exclude-bins", "pos_valley"]) == 0
    text = capfd.readouterr().out
    assert "Cannot say what leaving pos_valley out would do: the band of the probes holds" in text
    assert f"    wapo fork {path} --at 0 --exclude-bins pos_valley" in text
    assert wapo(["whatif", path, "--exclude-bins", "pos_peak", "-f", "json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["excluded"] == ["pos_peak"]
    assert (told["clear"], told["says"], told["silence"]) == (True, "higher", None)
    assert len(told["path"]) == STEPS
    assert wapo(["whatif", path, "--exclude-bins", "pos_peak", "-f", "markdown"]) == 0
    assert "| step | recorded |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--exclude-bins"),
        (["--exclude-bins", "x"], "unknown bin 'x'"),
        (["--exclude-bins", "pos,neg_paek"], "did you mean 'neg_peak'"),
        (["--exclude-bins", ","], "name the classes"),
    ],
)
def test_command_mistakes(
    options: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(recorded(tmp_path / "run").path)
    assert wapo(["whatif", path, *options]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize(
    ("exclude", "told"),
    [
        (
            "neg",
            "no token of neg_peak or neg_valley had a gradient in run: .* are of pos_peak, pos",
        ),
        ("pos", "run was trained on pos_peak and pos_valley alone: without that nothing is"),
        ("pos,neg", "run was trained on pos_peak and pos_valley alone"),
    ],
)
def test_classes_without_a_part_in_the_updates_and_all_that_had_one(
    tmp_path: Path, exclude: str, told: str
) -> None:
    run = open_run(write_fake_run(tmp_path / "run", objective="wapo", steps=24, probe_every=3))
    with pytest.raises(UserError, match=told):
        what_if(run, exclude.split(","))
    assert what_if(run, ["pos_valley"]).excluded == ("pos_valley",)


def test_what_comes_next_leaves_out_a_question_without_an_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for bins, asked in (((), True), (("neg_peak",), False)):
        path = write_fake_run(
            tmp_path / str(asked), drift="explosion", include_bins=bins, probe_every=5
        )
        assert wapo(["diagnose", str(path)]) == 0
        assert ("wapo whatif" in capfd.readouterr().out) == asked
