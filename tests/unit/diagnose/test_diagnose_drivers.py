"""Which class a diagnosis names as the driver, and when one class alone is a warning."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import write_fake_run
from tests.support.step_logs import names, ramp, write_flows, write_steps
from wapo_analysis.diagnose import diagnose
from wapo_analysis.schema import ALL_TOKENS, PROBES
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.table import Records


def exploding(tmp_path: Path) -> Path:
    """Explosion from step 41 on that neg_peak drives; before it pos_valley pushes more."""
    path = write_steps(
        tmp_path / "run",
        {"entropy": ramp(0.4, 3, 100, 40, 20), "reward": ramp(0.5, 0, 100, 40, 20)},
    )
    late = np.arange(100) >= 40
    write_flows(
        path,
        {
            (-1, 1): np.where(late, 3.0, 0.1),
            (1, 0): np.full(100, 1.0),
            (1, 1): np.full(100, -2.0),
            (-1, 0): np.zeros(100),
        },
    )
    return path


def test_drivers_are_summed_around_the_onset_and_ranked_by_their_push(tmp_path: Path) -> None:
    d = diagnose(open_run(exploding(tmp_path)))
    assert [driver.cls for driver in d.drivers] == ["neg_peak", "pos_valley", "pos_peak"]
    first, second, against = d.drivers
    assert first.share == pytest.approx(0.75)
    assert second.share == pytest.approx(0.25)
    assert against.share == pytest.approx(-0.5)
    assert first.predicted_dentropy / second.predicted_dentropy == pytest.approx(3)
    assert first.counterfactual_dentropy is None
    assert "neg_peak" in d.sentence
    assert "exclude_bins = neg_peak" in str(d.findings[0].advice)
    assert "drivers" not in {s.name for s in d.skipped}


def test_probes_give_the_counterfactual(tmp_path: Path) -> None:
    path = exploding(tmp_path)
    probes = {
        "step": [2, 45, 45],
        "minibatch": [0, 0, 0],
        "part": [2, 2, 0],
        "tokens_of": [ALL_TOKENS] * 3,
        "tokens": [5, 5, 5],
        "counterfactual_dentropy": [9.0, 0.25, math.nan],
    }
    writer = RunWriter(path, open_run(path).manifest, resume_after=10**6)
    for step, rows in ((2, slice(1)), (45, slice(1, None))):
        writer.write_part(Records.build(PROBES, {k: v[rows] for k, v in probes.items()}), step)
    writer.close("finished")
    alone = {x.cls: x.counterfactual_dentropy for x in diagnose(open_run(path)).drivers}
    assert alone == {"neg_peak": 0.25, "pos_valley": None, "pos_peak": None}


def test_a_class_that_carries_all_the_flow_is_named(tmp_path: Path) -> None:
    d = diagnose(open_run(exploding(tmp_path)))
    assert "one_class_dominates" not in names(d)
    path = write_fake_run(tmp_path / "only", include_bins=("neg_valley",), drift="noise", steps=30)
    found = {f.name: f for f in diagnose(open_run(path)).findings}
    assert found["one_class_dominates"].evidence["class"] == "neg_valley"
    assert found["one_class_dominates"].severity == "info"


def test_one_class_that_pulls_an_unpaid_fall_is_a_warning(tmp_path: Path) -> None:
    columns = {"entropy": ramp(0.4, 0.2, 60, 20, 20), "reward": np.full(60, 0.3)}
    path = write_steps(tmp_path / "run", columns)
    write_flows(path, {(-1, 0): np.full(60, -1.0), (1, 1): np.full(60, -0.01)})
    found = {f.name: f for f in diagnose(open_run(path)).findings}
    assert found["one_class_dominates"].severity == "warning"
    assert found["one_class_dominates"].evidence["predicted_dentropy"] == pytest.approx(-60)


def test_missing_statistics_skip_the_drivers_by_name(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", drift="explosion", missing=("collision_logp_rest",))
    d = diagnose(open_run(path))
    assert d.verdict == "entropy_explosion"
    assert d.drivers == ()
    missing = {s.name: s.missing for s in d.skipped}
    assert missing["drivers"] == ("classes.pred_dentropy_sum",)


def test_a_fall_inside_the_band_is_no_warning(tmp_path: Path) -> None:
    columns = {"entropy": ramp(0.4, 0.24, 60, 20, 20), "reward": np.full(60, 0.3)}
    path = write_steps(tmp_path / "run", columns)
    write_flows(path, {(1, 1): np.full(60, -1.0)})
    found = {f.name: f.severity for f in diagnose(open_run(path)).findings}
    assert found["one_class_dominates"] == "info"


def test_an_unpaid_fall_is_told_once_there_are_steps_to_tell(tmp_path: Path) -> None:
    severity = {}
    for steps in (4, 7, 8):
        columns = {"entropy": np.linspace(0.4, 0.1, steps), "reward": np.full(steps, 0.3)}
        path = write_steps(tmp_path / str(steps), columns)
        write_flows(path, {(1, 1): np.full(steps, -1.0)})
        found = {f.name: f.severity for f in diagnose(open_run(path)).findings}
        severity[steps] = found["one_class_dominates"]
    assert severity == {4: "info", 7: "info", 8: "warning"}


def test_where_the_entropy_moves_against_all_classes_their_push_is_named(tmp_path: Path) -> None:
    columns = {"entropy": ramp(0.3, 0.4, 60, 30, 10), "reward": ramp(0.9, 0, 60, 30, 6)}
    path = write_steps(tmp_path / "run", columns)
    write_flows(path, {(1, 1): np.full(60, -1.0), (-1, 0): np.full(60, -0.5)})
    d = diagnose(open_run(path))
    assert d.verdict == "reward_collapse"
    assert [driver.cls for driver in d.drivers] == ["pos_peak", "neg_valley"]
    assert d.drivers[0].share == pytest.approx(2 / 3)
    assert "All classes predict a fall of the entropy (first-order), yet it rose" in d.sentence


def test_a_calm_run_gets_no_remark_on_a_move_of_nothing(tmp_path: Path) -> None:
    path = write_steps(tmp_path / "run", {"entropy": np.linspace(0.4, 0.41, 30)})
    write_flows(path, {(1, 1): np.full(30, -1.0)})
    d = diagnose(open_run(path))
    assert d.verdict == "healthy"
    assert [driver.cls for driver in d.drivers] == ["pos_peak"]
    assert "All classes" not in d.sentence


@pytest.mark.parametrize(
    ("entropy", "first"),
    [
        (None, "pos_peak"),
        (np.full(30, 0.4), "pos_peak"),
        (np.linspace(0.4, 0.45, 30), "pos_valley"),
        (np.linspace(0.4, 0.35, 30), "pos_peak"),
    ],
)
def test_a_calm_run_ranks_its_classes_by_the_way_its_entropy_went(
    tmp_path: Path, entropy: np.ndarray | None, first: str
) -> None:
    """Without one, or where it did not move, by the sign of what they predict together."""
    columns = {"reward": np.full(30, 0.5)} | ({} if entropy is None else {"entropy": entropy})
    path = write_steps(tmp_path / "run", columns)
    write_flows(path, {(1, 1): np.full(30, -1.0), (1, 0): np.full(30, 0.5)})
    d = diagnose(open_run(path))
    assert d.verdict == "healthy"
    assert d.drivers[0].cls == first
