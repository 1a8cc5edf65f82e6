"""The tokens and rollouts a diagnosis names behind the push of a class."""

import json
from pathlib import Path

import numpy as np
import pytest
import wapo_taxonomy as tax

from tests.support.builders import write_fake_run
from tests.support.step_logs import finding, names, ramp, write_flows, write_steps
from wapo_analysis.cli import run as wapo
from wapo_analysis.diagnose import diagnose
from wapo_analysis.diagnose.detectors.forecast import TREND_WINDOW
from wapo_analysis.diagnose.samples import find_culprits
from wapo_analysis.schema import TOKENS
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.table import Records

# Two gradient passes; class neg_peak unless the advantage is positive. p = 0.8 with one rest token.
P = 0.8
REST = {"collision_rest": 0.2**2, "collision_logp_rest": 0.2**2 * np.log(0.2)}
ENTROPY = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))


def write_tokens(path: Path, step: int, rows: list[tuple[int, int, float]]) -> None:
    """Token rows (rollout, token, coef) of one step; dH is proportional to the coefficient."""
    count = len(rows)
    columns = {
        "step": [step] * count,
        "minibatch": [0] * count,
        "group": [0] * count,
        "rank": [0] * count,
        "rollout": [row[0] for row in rows],
        "position": list(range(count)),
        "token_id": [row[1] for row in rows],
        "advantage": [np.sign(row[2]) for row in rows],
        "coef": [row[2] for row in rows],
        "logp": [np.log(P)] * count,
        "entropy": [ENTROPY] * count,
        **{name: [value] * count for name, value in REST.items()},
    }
    writer = RunWriter(path, open_run(path).manifest, resume_after=10**6)
    writer.write_part(Records.build(TOKENS, columns), step)
    writer.add_vocab({7: "\n\n", 8: " the"})
    writer.close("finished")


def exploding(path: Path, tokens_at: tuple[int, ...]) -> Path:
    """Entropy explodes from step 41 on, driven by neg_peak."""
    columns = {"entropy": ramp(0.4, 3, 100, 40, 20), "reward": ramp(0.5, 0, 100, 40, 20)}
    write_steps(path, columns)
    write_flows(path, {(-1, 1): np.full(100, 1.0), (1, 1): np.full(100, -0.5)})
    for step in tokens_at:
        write_tokens(path, step, [(14, 7, -3.0), (90, 7, -2.0), (3, 8, -1.0), (5, 9, 6.0)])
    return path


def test_shares_are_those_of_the_tokens_and_rollouts(tmp_path: Path) -> None:
    d = diagnose(open_run(exploding(tmp_path / "run", (43,))))
    assert d.verdict == d.culprits.finding == "entropy_explosion"
    assert d.culprits.cls == "neg_peak"
    assert d.culprits.steps == (43,)
    assert [text for text, _ in d.culprits.tokens] == ["\n\n", " the"]
    assert [share for _, share in d.culprits.tokens] == pytest.approx([5 / 6, 1 / 6])
    assert [place[:2] for place in d.culprits.rollouts] == [(43, 14), (43, 90), (43, 3)]
    assert [share for *_, share in d.culprits.rollouts] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert (
        "Predicted dH of neg_peak at step 43 comes from tokens '\\n\\n' 83%, ' the' 17%; "
        "rollouts 14 50%, 90 33%, 3 17%." in d.to_text()
    )


def test_they_stand_in_the_evidence_of_their_finding(tmp_path: Path) -> None:
    form = diagnose(open_run(exploding(tmp_path / "run", (43,)))).to_dict()
    holders = [f for f in form["findings"] if "tokens" in f["evidence"]]
    assert [f["name"] for f in holders] == ["entropy_explosion"]
    evidence = json.loads(json.dumps(holders[0]["evidence"]))
    assert evidence["token_steps"] == [43]
    assert evidence["tokens"][0] == {"token": "\n\n", "share": 0.833333}
    assert evidence["rollouts"][0] == {"step": 43, "rollout": 14, "share": 0.5}


@pytest.mark.parametrize(
    ("tokens_at", "read"),
    [
        ((), None),
        ((1, 20), None),
        ((35,), (35,)),
        ((1, 44, 43, 50, 45), (43, 44, 45)),
        ((38, 99), (38,)),
    ],
)
def test_the_rows_nearest_the_onset_are_read(
    tmp_path: Path, tokens_at: tuple[int, ...], read: tuple[int, ...] | None
) -> None:
    d = diagnose(open_run(exploding(tmp_path / "run", tokens_at)))
    assert d.verdict == "entropy_explosion"
    assert (d.culprits.steps if d.culprits else None) == read


def test_many_small_rollouts_are_not_named(tmp_path: Path) -> None:
    path = exploding(tmp_path / "run", ())
    write_tokens(path, 43, [(number, 7 + number % 4, -1.0) for number in range(50)])
    text = diagnose(open_run(path)).to_text()
    assert "tokens '\\n\\n' 26%, ' the' 26%, '#9' 24%; many rollouts" in text
    assert "none above 2.0%" in text


def test_what_has_no_number_is_not_named(tmp_path: Path) -> None:
    path = exploding(tmp_path / "run", ())
    write_tokens(path, 43, [(-1, -1, -3.0), (-1, -1, -1.0)])
    d = diagnose(open_run(path))
    assert d.culprits.tokens == d.culprits.rollouts == ()
    assert "Predicted dH of neg_peak at step 43 comes from tokens that the source" in d.to_text()
    write_tokens(path, 44, [(-1, 7, -4.0)])
    text = diagnose(open_run(path)).to_text()
    assert "at steps 43 to 44 comes from tokens '\\n\\n' 50%." in text


@pytest.mark.parametrize("flow", [1.0, -1.0])
def test_an_early_warning_names_them_where_the_flow_agrees(tmp_path: Path, flow: float) -> None:
    entropy = 0.4 * 1.05 ** np.clip(np.arange(30) - 20, 0, None)
    columns = {"entropy": entropy, "reward": np.full(30, 0.5)}
    path = write_steps(tmp_path / "run", columns)
    write_flows(path, {(-1, 1): np.full(30, 1.0), (1, 1): np.full(30, flow - 1.0)})
    write_tokens(path, 24, [(14, 7, -3.0)])
    d = diagnose(open_run(path))
    assert d.verdict == "healthy"
    assert "early_warning" in names(d)
    if flow < 0:
        assert d.culprits is None
        return
    assert d.culprits.finding == "early_warning"
    assert d.culprits.tokens == (("\n\n", 1.0),)


def test_before_an_early_warning_the_steps_of_its_trend_are_read(tmp_path: Path) -> None:
    entropy = 0.4 * 1.05 ** np.clip(np.arange(40) - 30, 0, None)
    path = write_steps(tmp_path / "run", {"entropy": entropy, "reward": np.full(40, 0.5)})
    write_flows(path, {(-1, 1): np.full(40, 1.0)})
    warned = finding(diagnose(open_run(path)), "early_warning").step
    for step in (warned - TREND_WINDOW, warned - TREND_WINDOW + 1, warned, warned + 1):
        write_tokens(path, step, [(14, 7, -3.0)])
    culprits = diagnose(open_run(path)).culprits
    assert culprits is not None
    assert culprits.steps == (warned - TREND_WINDOW + 1, warned)


@pytest.mark.parametrize("direction", [1, -1])
def test_only_what_points_in_the_direction_counts(tmp_path: Path, direction: int) -> None:
    run = open_run(write_fake_run(tmp_path / "run", steps=6))
    named = []
    for cls in tax.CLASSES:
        found = find_culprits(run, "x", cls, 2, 4, direction)
        rows = run.tokens([2, 3, 4])
        rows = rows[rows["cls"] == cls]
        push = (direction * rows["pred_dentropy"].astype(float)).clip(lower=0)
        if not push.sum():
            assert found is None
            continue
        share = (push / push.sum()).groupby(rows["token_id"]).sum().max()
        assert found.tokens[0][1] == pytest.approx(share)
        named.append(cls)
    assert len(named) >= 2


def test_the_command_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exploding(tmp_path / "run", (43,))
    assert wapo(["diagnose", str(path)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"next: wapo diagnose {path} --step 43   |   wapo report {path}"
    assert wapo(["diagnose", str(path), "--step", "43"]) == 0
