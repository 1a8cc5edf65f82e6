"""What sources seldom hold: masked rows, packed logs that were appended to, missing counts."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.import_sources import token_columns, write_lines
from wapo_analysis.cli import run
from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, account, import_run
from wapo_analysis.importers.detect import _json_kind
from wapo_analysis.importers.jsonl import message_text
from wapo_analysis.importers.mapping import NameTable, nearest, set_names
from wapo_analysis.importers.printed import is_log, line_of
from wapo_analysis.importers.rows import StepCounts, class_table
from wapo_analysis.importers.run import ImportSettings
from wapo_analysis.store import Run, open_run


def imported(source: Path, **settings: str) -> Run:
    out = source.parent / f"{source.name}-run"
    import_run(source, out, ImportSettings(**settings))  # type: ignore[arg-type]
    return open_run(out)


def test_token_rows_outside_of_the_loss_mask_are_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame(token_columns())
    inside = np.arange(len(frame)) % 3 > 0
    frame.assign(response_mask=inside.astype(int)).to_parquet(tmp_path / "t.parquet")
    frame[inside].to_parquet(tmp_path / "only.parquet")
    masked, only = imported(tmp_path / "t.parquet"), imported(tmp_path / "only.parquet")
    assert 0 < len(masked.tokens()) == inside.sum() < len(frame)
    assert masked.tokens().equals(only.tokens())


def test_a_packed_log_that_was_appended_to_is_read_to_its_end(tmp_path: Path) -> None:
    rows = [{"step": step, "reward": step / 10, "entropy": 0.5} for step in range(1, 9)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    members = gzip.compress(b"".join(lines[:5])) + gzip.compress(b"".join(lines[5:]))
    (tmp_path / "train.jsonl.gz").write_bytes(members)
    assert imported(tmp_path / "train.jsonl.gz").steps.step.tolist() == list(range(1, 9))
    (tmp_path / "cut.jsonl.gz").write_bytes(members[:-9])  # it is still being written
    assert imported(tmp_path / "cut.jsonl.gz").steps.step.tolist()[:5] == [1, 2, 3, 4, 5]


def test_prompts_solved_by_none_and_all_are_shares_where_all_three_are_counted(
    tmp_path: Path,
) -> None:
    row = {"step": 1, "reward": 0.5, "entropy": 0.4, "batch/solve_none": 2, "batch/solve_all": 1}
    rows = [row | {"batch/solve_partial": 5}, row | {"step": 2}, row | {"step": 3}]
    rows[2] |= {"batch/solve_none": 1, "batch/solve_all": 0}
    steps = imported(write_lines(tmp_path / "train.jsonl", rows)).steps
    assert steps["groups_all_wrong"][0] == 0.25
    assert steps["groups_all_right"][0] == 0.125
    assert steps["groups_all_wrong"].isna()[1], "two prompts of nobody knows how many"
    assert steps["groups_all_wrong"].isna()[2], "nor is one of them all there are"
    assert steps["groups_all_right"][2] == 0


def test_shares_of_prompts_stay_shares_also_where_they_are_one(tmp_path: Path) -> None:
    shares = [0.5, 1.0, 0.0, 1.5]
    rows = [{"step": n, "reward": 0.5, "entropy": 0.4, "batch/solve_none": share}
            for n, share in enumerate(shares)]  # fmt: skip
    steps = imported(write_lines(tmp_path / "train.jsonl", rows)).steps
    np.testing.assert_array_equal(steps["groups_all_wrong"], [0.5, 1, 0, np.nan])


def test_classes_of_which_the_files_count_nothing_are_empty() -> None:
    report = ImportReport("official", "run")
    counts = StepCounts(bins={"pos_peak_eligible": 5, "neg_valley_eligible": 3, "pos_peak_kept": 4})
    rows = class_table(7, counts, False, report)
    found = {
        (int(sign), int(regime)): (int(tokens), int(kept))
        for sign, regime, tokens, kept in zip(
            rows["sign"], rows["regime"], rows["tokens"], rows["kept"], strict=True
        )
    }
    assert found == {(1, 1): (5, 4), (-1, 1): (0, 0), (1, 0): (0, 0), (-1, 0): (3, 0)}
    assert set(rows["prob_bin"]) == {-1}
    assert report.counts["steps whose pos counts include tokens without advantage (A >= 0)"] == 1


def test_a_trainer_that_drops_negative_rollouts_is_known_by_its_counts() -> None:
    bins = {"pos_peak_eligible": 5, "pos_peak_kept": 3, "neg_peak_eligible": 4}
    assert StepCounts.gated([StepCounts(bins)])
    assert not StepCounts.gated([StepCounts(bins | {"neg_peak_kept": 1})])
    assert not StepCounts.gated([StepCounts(bins, filtered=True)])
    assert not StepCounts.gated([])
    rows = class_table(1, StepCounts(bins), True, ImportReport("official", "run"))
    peaks = {int(s): int(t) for s, r, t in zip(rows["sign"], rows["regime"], rows["tokens"],
                                               strict=True) if r == 1}  # fmt: skip
    assert peaks == {1: 3, 0: 2, -1: 4}, "what was eligible and not kept had no advantage"


def test_completions_that_ended_by_length_were_cut(tmp_path: Path) -> None:
    ends = ["length", "stop", "length", "length", None, "stop"]
    rows = [
        {"step": 1 + n // 4, "prompt_id": n // 2, "completion": "a b", "reward": n % 2,
         "finish_reason": end}
        for n, end in enumerate(ends)
    ]  # fmt: skip
    run = imported(write_lines(tmp_path / "rollouts.jsonl", rows))
    assert run.steps["truncated"].tolist() == [0.75, 0.0], "of those whose end is known"
    named = {name: end for name, end in run.rollouts["finish_reason"].items() if end == end}
    assert list(named.values())[:4] == ends[:4]


def test_a_short_table_of_one_named_run_is_no_summary_of_runs(tmp_path: Path) -> None:
    """Rows without a step are counted; of two runs with a row or two each nothing could be."""
    table = "run_name,reward,entropy\na,0.1,0.5\na,0.2,0.4\na,0.3,0.3\n"
    (tmp_path / "one.csv").write_text(table)
    assert imported(tmp_path / "one.csv").steps["reward"].tolist() == [0.1, 0.2, 0.3]
    (tmp_path / "two.csv").write_text(table.replace("a,0.3", "b,0.3"))
    with pytest.raises(UserError, match="holds 2 runs, a row or two of each and no step"):
        imported(tmp_path / "two.csv")


@pytest.mark.parametrize(
    ("lines", "is_one"),
    [
        (["step 1 reward=0.5", "step 2 reward=0.6"], True),
        (["step 1 reward=0.5"], False),
        (["step 1 a=0.5 b=2", "step 2 a=0.6 b=1", "step 3 a=0.7 b=3"], True),
        (["step 1 a=0.5 b=2", "step 2 a=0.6 b=1"], False),
        (["step 1 a=0.5 b=2", "step 2 a=0.6 b=1", "step 2 a=0.7 b=3"], False),
        (["step 1 a=0.5", "step 2 a=0.6", "step 3 a=0.7"], False),
        (["words alone", ""], False),
    ],
)
def test_lines_are_a_log_by_two_vital_names_or_three_steps_in_order(
    lines: list[str], is_one: bool
) -> None:
    assert is_log(lines, lambda keys: "reward" in keys) is is_one


@pytest.mark.parametrize("length", [10, 65535, 65536, 140000])
def test_a_row_that_is_being_written_costs_no_whole_row_however_long_it_is(
    tmp_path: Path, length: int
) -> None:
    """A table is looked through from its end in blocks of 64 KiB."""
    rows = "".join(f"{step},0.5,0.4,said\n" for step in range(1, 6))
    half = "6,0.".ljust(length, "1")
    (tmp_path / "t.csv").write_text(f"step,reward,entropy,note\n{rows}{half}")
    assert imported(tmp_path / "t.csv").steps["step"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("said", "said"), (None, None), ([], ""), (3, "3"), ({"text": "said"}, "said"),
        ({"text": 3}, '{"text": 3}'), (["a", "b"], '["a", "b"]'),
        ([{"role": "user", "content": "ask"}, {"role": "assistant"}], "ask\n"),
        (np.array([{"content": [{"text": "ask", "content": "é"}]}]), "é"),
    ],
)  # fmt: skip
def test_the_text_of_a_prompt_or_a_chat(value: object, text: str | None) -> None:
    assert message_text(value) == text


def test_an_account_of_more_than_six_lines_says_how_many_more(tmp_path: Path) -> None:
    run = imported(write_lines(tmp_path / "train.jsonl", [{"step": 1, "reward": 0.5}] * 2))
    said = [f"line {n}" for n in range(8)]

    def told(count: int) -> list[str]:
        manifest = run.manifest.changed({"import": {"said": said[:count]}})
        return account(Run(run.path, manifest))

    assert told(6) == said[:6]
    assert told(8) == [*said[:6], "2 more: wapo import"]


def test_a_run_is_chosen_by_its_name_or_a_part_of_it_among_the_rows(tmp_path: Path) -> None:
    rows = [
        {"step": step, "run_name": name, "reward": level + step / 100, "entropy": 0.5}
        for name, level in (("grpo-1", 0.1), ("wapo-1", 0.6))
        for step in range(1, 6)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    for chosen in ("wapo-1", "wapo"):
        assert imported(tmp_path / "t.csv", run=chosen).steps["reward"].min() > 0.6
        (tmp_path / "t.csv").touch()
        shutil.rmtree(tmp_path / "t.csv-run")
    with pytest.raises(UserError, match="unknown --run of .* 'sft'; allowed: grpo-1, wapo-1"):
        imported(tmp_path / "t.csv", run="sft")


def test_probabilities_that_none_can_be_are_counted_and_null(tmp_path: Path) -> None:
    columns = {
        "step": [1] * 6, "rollout": [0] * 6, "advantage": [1.0, 1, 1, 1, 1, np.nan],
        "prob": [0.5, 0.0, 1.0, -0.1, np.nan, 0.5], "sum_p_sq": [0.3, 0.3, 1.0, 0.3, 0.3, 0.3],
    }  # fmt: skip
    source = tmp_path / "t.parquet"
    pd.DataFrame(columns).to_parquet(source)
    report = import_run(source, tmp_path / "out")
    assert report.counts["prob of 0 or less, logp null"] == 2
    assert report.counts["token rows without an advantage left out"] == 1
    rows = open_run(tmp_path / "out").tokens()
    assert rows["logp"].tolist() == pytest.approx([np.log(0.5), np.nan, 0.0, np.nan, np.nan],
                                                  rel=1e-4, nan_ok=True)  # fmt: skip
    assert rows["collision_rest"][0] == pytest.approx(0.05, rel=1e-3)
    assert rows["collision_rest"][2] == 0.0


def test_a_run_is_labelled_by_its_objective_where_that_is_told(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", [{"step": s, "reward": 0.5} for s in (1, 2)])
    assert imported(source, objective="wapo").label == "WAPO"
    for settings, label in (({}, "train.jsonl-run"), ({"name": "mine"}, "mine"),
                            ({"label": "L", "objective": "wapo"}, "L")):  # fmt: skip
        shutil.rmtree(tmp_path / "train.jsonl-run")
        assert imported(source, **settings).label == label


def test_a_negative_entropy_is_told_to_be_a_loss_term(tmp_path: Path) -> None:
    rows = [{"step": s, "reward": 0.5, "entropy": -0.4} for s in range(1, 6)]
    report = import_run(write_lines(tmp_path / "train.jsonl", rows), tmp_path / "out")
    assert open_run(tmp_path / "out").steps["entropy"].isna().all()
    assert any("entropy is negative, so it is a loss term" in text for text in report.events)
    assert any("--map entropy=-entropy" in text for text in report.events)
    rows = [row | {"entropy": 0.0} for row in rows]
    import_run(write_lines(tmp_path / "zero.jsonl", rows), tmp_path / "out2")
    assert open_run(tmp_path / "out2").steps["entropy"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["val/math/acc", "val/code/acc"], ["math", "code"]),
        (["a/x/1", "b/y/1"], ["a/x", "b/y"]),
        (["val/math", "val/math/hard"], ["val/math", "val/math/hard"]),
        (["val/math"], ["val/math"]),
    ],
)
def test_held_out_sets_are_told_apart_by_what_they_do_not_share(
    names: list[str], told: list[str]
) -> None:
    assert set_names(names) == dict(zip(names, told, strict=True))


def test_the_name_that_most_looks_like_a_column_is_found_once() -> None:
    assert nearest(["rollout_score", "policy_entropy"]) == {
        "reward": "rollout_score", "entropy": "policy_entropy",
    }  # fmt: skip
    assert "entropy" not in nearest(["entropy_loss", "entropy/bits"]), "another thing or unit"
    assert nearest(["alpha", "beta"]) == {}
    assert list(nearest(["entropy"]).values()) == ["entropy"]


def test_names_are_found_without_case_prefix_and_the_word_mean() -> None:
    feeds = NameTable({}).feeds(("Train/Reward", "avg_entropy", "other"))
    assert feeds["reward"].names == ("Train/Reward",)
    assert feeds["entropy"].names == ("avg_entropy",)
    both = NameTable({}).feeds(("entropy", "avg_entropy", "reward"))
    assert both["entropy"].names == ("entropy",)
    mapped = NameTable({"entropy": "-entropy_loss", "reward": "r"})
    feeds = mapped.feeds(("entropy_loss", "entropy", "x"))
    assert (feeds["entropy"].names, feeds["entropy"].negative) == (("entropy_loss",), True)
    assert "reward" not in feeds
    assert mapped.never_seen() == ["reward=r"]


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("2026-01-01 | INFO | trainer:train_step:142 - step 7: reward=0.5 kl=0.1", 7),
        ("iteration 3 global_step 12 reward=0.5 kl=0.1", 12),
        ("step 4 train_step 9 reward=0.5 kl=0.1", 9),
        ("iter 4 reward=0.5 kl=0.1", 4),
        ("reward=0.5 kl=0.1", None),
    ],
)
def test_of_several_counters_the_run_s_own_step_counts(line: str, step: int | None) -> None:
    found = line_of(line)
    assert found is not None
    assert found.step == step
    assert (found.values["reward"], found.values["kl"]) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("name", "first", "kind"),
    [
        ("7.jsonl", {"input": "q", "output": "a", "score": 1}, "verl-rollouts"),
        ("7.jsonl", {"input": "q", "output": "a", "score": 1, "step": 7}, "verl-rollouts"),
        ("m.jsonl", {"step": 1, "data": {"actor/entropy": 0.5}}, "verl-metrics"),
        ("m.jsonl", {"step": 1, "data": {}}, "table"),
        ("l.jsonl", {"global_step/max_steps": "1/9", "reward": 0.5}, "swift-log"),
        ("l.jsonl", {"current_steps": 1, "total_steps": 9}, "trainer-log"),
        ("l.jsonl", {"current_steps": 1, "loss": 0.5}, "table"),
        ("c.jsonl", {"completion": ["a"], "prompt": ["q"], "step": 1}, "completions"),
        ("c.jsonl", {"completion": "a", "prompt": "q", "step": 1, "reward": 1}, "table"),
        ("p.jsonl", {"trainer_logprobs": [], "inference_logprobs": [], "loss_mask": []},
         "prime-rl"),
    ],
)  # fmt: skip
def test_what_a_file_of_json_lines_is_by_its_first_record(
    tmp_path: Path, name: str, first: dict[str, object], kind: str
) -> None:
    file = write_lines(tmp_path / name, [first, first])
    assert _json_kind(file, file.read_text()) == kind


@pytest.mark.parametrize(
    ("line", "step", "values"),
    [
        ("Step 1,200 | reward: 0.5 | tokens: 1,234,567", 1200, {"reward": 0.5, "tokens": 1234567}),
        ("step=12,000 reward=-1,234.5 kl=0.125", 12000, {"reward": -1234.5, "kl": 0.125}),
        ("2026-01-01 10:00:15,123 INFO step=7 reward=0.5 kl=0.1", 7, {"reward": 0.5, "kl": 0.1}),
        ("step=7, a=1,b=200,c=3", 7, {"a": 1, "b": 200, "c": 3}),
        ("step 7 reward=0.5,kl=0.1,n=200", 7, {"reward": 0.5, "kl": 0.1, "n": 200}),
    ],
)
def test_thousands_may_be_grouped_in_printed_lines(
    line: str, step: int, values: dict[str, float]
) -> None:
    found = line_of(line)
    assert found is not None
    assert (found.step, found.values) == (step, values)


# ---- lines of a table


def test_a_quotation_mark_that_is_never_closed_is_told(tmp_path: Path) -> None:
    open_mark = '"'
    rows = "".join(f"{n},0.{n},{open_mark * (n == 3)}x\n" for n in range(1, 9))
    (tmp_path / "t.csv").write_text("step,reward,note\n" + rows)
    said = import_run(tmp_path / "t.csv", tmp_path / "out").to_text()
    assert len(open_run(tmp_path / "out").steps) == 3
    assert "lines in quotation marks that look like rows, read as text: 5 (t.csv:4)" in said


def test_a_table_that_begins_with_an_empty_line_is_read_or_refused(tmp_path: Path) -> None:
    lines = "".join(f"{n},0.{n},1.{n}\n" for n in range(1, 9))
    for head in ("\nstep,reward,entropy\n", "\n\n\nstep,reward,entropy\n", "\n"):
        (tmp_path / "t.csv").write_text(head + lines)
        handled = run(["import", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])
        assert handled in (0, 2)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_completion_with_a_line_like_a_row_is_no_open_quotation_mark(tmp_path: Path) -> None:
    text = "First I count them.\nThat is 3, 4, so 12\nOr 4, 13, 5\nI am done."
    frame = pd.DataFrame({"step": [1, 2], "reward": [1.0, 0.0], "note": text})
    frame.to_csv(tmp_path / "t.csv", index=False)
    said = import_run(tmp_path / "t.csv", tmp_path / "out").to_text()
    assert "look like rows" not in said
