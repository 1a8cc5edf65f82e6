"""Spike attribution: shares, texts, contexts, missing data, and the words printed."""

import json
from pathlib import Path

import numpy as np
import pytest
import wapo_taxonomy as tax

from tests.support.builders import write_fake_run
from wapo_analysis.attribute import attribute_step
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.store import Run, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("spikes") / "run"
    return open_run(write_fake_run(folder, steps=12, token_every=2, probe_every=3))


def test_shares_are_parts_of_the_recorded_step(run: Run) -> None:
    rows = run.tokens([5])
    found = attribute_step(run, 5, top=1000)
    assert found.grad_mass == pytest.approx(rows["grad_norm"].sum())
    assert found.pred_dentropy == pytest.approx(rows["pred_dentropy"].sum())
    for table in (found.tokens, found.rollouts, found.prompts):
        assert table["mass_share"].sum() == pytest.approx(1)
        assert table["mass"].is_monotonic_decreasing
    assert found.tokens["pred_dentropy_share"].abs().sum() == pytest.approx(1)
    assert len(found.tokens) == len(rows.drop_duplicates(["group", "rollout", "position"]))


def test_top_token_is_the_largest_gradient_in_its_context(run: Run) -> None:
    rows = run.tokens([5])
    first = attribute_step(run, 5, top=3).tokens.iloc[0]
    largest = rows.loc[rows["grad_norm"].idxmax()]
    assert (first["rollout"], first["position"]) == (largest["rollout"], largest["position"])
    own = rows[rows["rollout"] == largest["rollout"]].sort_values("position")
    spelled = [run.vocab[token] for token in own["token_id"]]
    place = int(largest["position"])
    marked = [*spelled[:place], f"[{spelled[place]}]", *spelled[place + 1 :]]
    assert first["context"] == "".join(marked)
    assert first["token"] == spelled[place]


def test_tokens_by_predicted_change_are_sorted_by_size(run: Run) -> None:
    predicted = attribute_step(run, 5, top=8).by_pred_dentropy["pred_dentropy"].abs()
    assert len(predicted) == 8
    assert predicted.is_monotonic_decreasing


def test_several_passes_over_one_token_count_together(tmp_path: Path) -> None:
    from wapo_analysis.schema import TOKENS
    from wapo_analysis.store import RunWriter
    from wapo_analysis.table import Records

    once = open_run(write_fake_run(tmp_path / "a", steps=1))
    rows = once.tokens([1], derived=False)
    twice = {name: np.concatenate([rows[name]] * 2) for name in rows}
    twice["minibatch"] = np.repeat([0, 4], len(rows))
    writer = RunWriter(once.path, once.manifest, resume_after=10**6)
    writer.write_part(Records.build(TOKENS, twice), 1)
    writer.close("finished")
    again = attribute_step(open_run(once.path), 1, top=1000)
    before = once.tokens([1])
    assert again.grad_mass == pytest.approx(before["grad_norm"].sum())
    single = len(before.drop_duplicates(["group", "rollout", "position"]))
    assert len(again.tokens) == single


def test_missing_statistics_are_told_apart(tmp_path: Path) -> None:
    blind = open_run(write_fake_run(tmp_path / "q", steps=2, missing=("collision_logp_rest",)))
    found = attribute_step(blind, 1)
    assert np.isnan(found.pred_dentropy)
    assert found.by_pred_dentropy.empty
    assert "predicted dH" not in found.headline
    assert "Tokens by share of the predicted dH" not in found.to_text()
    json.dumps(found.to_dict(), allow_nan=False)
    none = open_run(write_fake_run(tmp_path / "n", steps=2, missing=("collision_rest",)))
    with pytest.raises(UserError, match="no gradient per token"):
        attribute_step(none, 1)


def test_steps_without_rows_name_the_nearest(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 8 of run .* nearest .*: 3, 5, 7, 9, 11"):
        attribute_step(run, 8)
    bare = open_run(write_fake_run(tmp_path / "bare", steps=2, token_every=0))
    with pytest.raises(UserError, match="bare has no token rows"):
        attribute_step(bare, 1)
    with pytest.raises(UserError, match="top must be at least 1, got 0"):
        attribute_step(run, 5, top=0)


def test_words_hold_tables_and_three_numbers_where_probed(run: Run) -> None:
    probed, plain = attribute_step(run, 3, 4).to_text(), attribute_step(run, 5, 4).to_text()
    assert "predicted, class alone, measured" in probed
    assert "neg_valley" in probed
    assert "class alone" not in plain
    markdown = attribute_step(run, 3, 4).to_markdown()
    assert markdown.count("### ") == 5
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("| --- ")}
    assert len(widths) > 1


def test_text_from_a_model_cannot_break_the_terminal(tmp_path: Path) -> None:
    texts = {"completion": "a\x1b[31mred\n|b", "prompt": "p\r\n", "vocab": "\x07"}
    run = open_run(write_fake_run(tmp_path / "evil", steps=1, texts=texts))
    text = attribute_step(run, 1, 3).to_text()
    assert not {"\x1b", "\x07", "\r"} & set(text)
    assert "\\x1b[31mred\\n|b" in text
    assert "\\|b" in attribute_step(run, 1, 3).to_markdown()


def test_command_prints_every_format(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(run.path)
    assert wapo(["diagnose", path, "--step", "3", "--top", "2"]) == 0
    assert "Tokens by share of the gradient" in capfd.readouterr().out
    assert wapo(["diagnose", path, "--step", "3", "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["step"] == 3
    assert len(found["tokens"]) == 10
    sets = {row["tokens_of"] for row in found["three_numbers"]}
    assert sets == {*tax.CLASSES, "all tokens", "step before"}
    assert wapo(["diagnose", path, "--step", "3", "-f", "markdown"]) == 0
    assert "| gradient | predicted dH |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--step", "4"], "nearest of the 6 steps that have"),
        (["--step", "3", "--fail-on", "critical"], "cannot be combined with --step"),
        (["--step", "x"], "--step"),
        (["--step", "3", "--top", "0"], "--top"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], told: str, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert wapo(["diagnose", str(run.path), *options]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_prompts_are_shown_by_what_sets_them_apart(tmp_path: Path) -> None:
    from wapo_analysis.schema import ROLLOUTS
    from wapo_analysis.store import RunWriter
    from wapo_analysis.table import Records

    run = open_run(write_fake_run(tmp_path / "run", steps=6, loose=True))
    head = "<|im_start|>system You are a helpful assistant. <|im_end|> user "
    rows = run.table("rollouts", [6])
    asked = rows.assign(prompt=[f"{head}What is {group} + 1? end" for group in rows["group"]])
    writer = RunWriter(run.path, run.manifest, resume_after=10**6)
    given = {name: values.to_numpy() for name, values in asked.items() if values.notna().all()}
    writer.write_part(Records.build(ROLLOUTS, given), 6)
    writer.close("finished")
    run = open_run(run.path)
    found = attribute_step(run, 6)
    assert set(found.prompts["prompt"]) == set(asked["prompt"])
    assert found.prompts["question"].str.startswith("... ").all()
    assert "helpful" not in found.to_text()


def test_a_large_step_equals_the_plain_groupby(tmp_path: Path) -> None:
    """Blocks, shuffled passes and tokens whose class changes between passes: same sums."""
    from wapo_analysis.schema import TOKENS
    from wapo_analysis.store import RunWriter
    from wapo_analysis.table import Records

    once = open_run(
        write_fake_run(tmp_path / "run", steps=1, loose=True, prompts=8, rollouts=8, length=40)
    )
    given = {n: v.to_numpy() for n, v in once.tokens([1], derived=False).items()}
    many = {n: np.concatenate([v] * 30) for n, v in given.items()}
    draw = np.random.default_rng(0)
    size = len(many["logp"])
    assert size > 1 << 16  # rows of a block
    many["minibatch"] = np.repeat(np.arange(30), size // 30)
    many["logp"] = (many["logp"] + draw.normal(0, 0.3, size)).clip(-9, -1e-3).astype(np.float32)
    order = draw.permutation(size)
    writer = RunWriter(once.path, once.manifest, resume_after=10**6)
    writer.write_part(Records.build(TOKENS, {n: v[order] for n, v in many.items()}), 1)
    writer.close("finished")
    run = open_run(once.path)
    found = attribute_step(run, 1, top=10**6)
    keys = ["group", "rollout", "position", "token_id", "cls"]
    rows = run.tokens([1]).astype({"cls": str})
    plain = rows.groupby(keys)[["grad_norm", "pred_dentropy"]].sum()
    assert len(plain) > len(rows.groupby(keys[:4]))
    for table in (found.tokens, found.by_pred_dentropy):
        sums = table.set_index(keys)[["mass", "pred_dentropy"]].sort_index()
        assert sums.index.equals(plain.index)
        np.testing.assert_allclose(sums, plain, rtol=1e-12)
    by_rollout = rows.groupby(["group", "rollout"])["grad_norm"].sum()
    shown = found.rollouts.set_index(["group", "rollout"])["mass"].sort_index()
    np.testing.assert_allclose(shown, by_rollout, rtol=1e-12)
    assert found.tokens["prob"].between(0, 1).all()
