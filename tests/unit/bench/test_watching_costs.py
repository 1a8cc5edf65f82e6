"""``wapo bench``: what watching adds to a step, on a model small enough for a test."""

import json

import pytest

from wapo_analysis.bench import Costs, Share, watching_costs
from wapo_analysis.cli import run
from wapo_analysis.errors import UserError

TINY = {"layers": 1, "width": 64, "vocabulary": 300, "tokens": 8, "seconds": 0.0}
FLAGS = ["--layers", "1", "--width", "64", "--vocab", "300", "--tokens", "8", "--seconds", "0"]


@pytest.fixture(scope="module")
def costs() -> Costs:
    return watching_costs(**TINY)


def test_every_cost_is_a_share_of_the_plain_step(costs: Costs) -> None:
    assert costs.step_seconds > 0
    for share in (costs.class_totals, costs.token_rows, costs.rescore, costs.probe):
        assert share.low <= share.value <= share.high
    # Beside a step of a millisecond, writing and scoring anew must show.
    assert costs.class_totals.value > 0.05
    assert costs.probe.value > 1
    assert 20 < costs.bytes_per_token < 1000
    assert "1 layer, width 64, vocabulary 300" in costs.what
    assert "4 rollouts, 32 completion tokens; CPU" in costs.what


def test_each_line_says_what_changes_it(costs: Costs) -> None:
    text = costs.to_text()
    for words in ("token_every, token_fraction, store_bits", "rescore_every=", "probe_every="):
        assert words in text
    assert costs.to_markdown().count("\n|") == 6
    assert json.loads(json.dumps(costs.to_dict()))["probe"]["value"] == costs.probe.value


def test_shares_are_shown_as_percent_or_as_steps() -> None:
    assert str(Share(0.0123, -0.001, 0.02)) == "+1.2% (-0.1% to +2.0%)"
    assert str(Share(17.06, 16.0, 18.0)) == "17.1 steps (16.0 to 18.0)"
    assert Share(0.253, 0, 0).every("rescore_every") == "rescore_every=26 makes it 1% of training"
    assert Share(-0.01, 0, 0).every("rescore_every") == "rescore_every=1 makes it 1% of training"


def test_the_command_prints_the_costs(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *FLAGS, "-f", "json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert {"what", "step_seconds", "class_totals", "bytes_per_token"} <= set(printed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts": 3}, "even number of at least 2, got 3"),
        ({"width": 100}, "width must be a multiple of 64, got 100"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"model": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        watching_costs(**{**TINY, **settings})
