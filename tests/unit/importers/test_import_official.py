"""Official WAPO output: what its aggregates determine is exact, the rest is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.importers.rows import StepCounts
from wapo_analysis.store import Run, open_run

SOURCE = Path(__file__).parents[2] / "data" / "official_run"
DATA = SOURCE / "plots" / "toy-wapo" / "data"
STEPS = range(1, 7)
SIGNS = {"pos": 1, "neg": -1}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("official") / "run"
    import_run(SOURCE, out)
    return open_run(out)


def counts(step: int) -> dict[str, int]:
    lines = (DATA / "token_bins" / "token_bins.jsonl").read_text().splitlines()
    return next(r["counts"] for r in map(json.loads, lines) if r["step"] == step - 1)


def test_class_counts_are_exact(imported: Run) -> None:
    for step in STEPS:
        given, rows = counts(step), imported.classes.query("step == @step and regime >= 0")
        found = rows.groupby(["sign", "regime"])[["tokens", "kept"]].sum()
        for name, regime in (("peak", 1), ("valley", 0)):
            kept, eligible = given[f"pos_{name}_kept"], given[f"pos_{name}_eligible"]
            assert found.loc[(1, regime)].tolist() == [kept, kept]
            assert found.loc[(0, regime)].tolist() == [eligible - kept, 0]
            assert found.loc[(-1, regime)].tolist() == [given[f"neg_{name}_eligible"], 0]


def test_positive_counts_agree_with_the_trainers_own_count_by_probability(imported: Run) -> None:
    for step in STEPS:
        stored = np.load(DATA / "token_count" / f"step_{step - 1}.npz")
        rows = imported.classes.query("step == @step and sign == 1")
        assert rows["tokens"].sum() == stored["pos"].sum()  # no p = 1 in this run
        assert imported.classes.query("step == @step")["tokens"].sum() == sum(
            n for name, n in counts(step).items() if name.endswith("eligible")
        )


def test_bin_sums_are_mean_times_count_and_the_rest_is_missing(imported: Run) -> None:
    for step in STEPS:
        mass = np.load(DATA / "grad_mass" / f"step_{step - 1}.npz")
        number = np.load(DATA / "token_count" / f"step_{step - 1}.npz")
        for name, sign in SIGNS.items():
            rows = imported.classes.query(
                "step == @step and sign == @sign and prob_bin >= 0",
                local_dict={"step": step, "sign": sign},
            )
            full = number[name] > 0
            assert rows["prob_bin"].tolist() == np.flatnonzero(full).tolist()
            np.testing.assert_allclose(
                rows["grad_mass_proxy"], (mass[name] * number[name])[full], rtol=1e-12
            )
            assert rows["tokens"].isna().all(), "tokens are counted once, in the class rows"
    for column in ("grad_mass", "coef_sum", "clipped", "rule_breaks", "pred_dentropy_sum"):
        assert imported.classes[column].isna().all(), column


def test_token_rows_are_the_scatter(imported: Run) -> None:
    stored = np.load(DATA / "scatter_step_2.npz")
    rows = imported.tokens([3])
    np.testing.assert_allclose(rows["logp"], np.log(stored["prob_train"]), rtol=2e-5)
    np.testing.assert_allclose(rows["logp_old"], np.log(stored["prob_inference"]), rtol=2e-5)
    np.testing.assert_allclose(rows["advantage"], stored["advantages"], rtol=2e-5)
    for column in ("entropy", "token_id", "rollout", "kept", "clipped", "coef"):
        assert rows[column].isna().all(), column


def test_steps_come_from_the_log_one_later_than_the_files(imported: Run) -> None:
    state = json.loads(
        (SOURCE / "checkpoints/toy-wapo/checkpoint-6/trainer_state.json").read_text()
    )
    steps = imported.steps.set_index("step")
    assert steps.index.tolist() == list(STEPS)
    for row in state["log_history"]:
        got = steps.loc[row["step"]]
        for ours, theirs in (
            ("reward", "reward"), ("reward_std", "reward/std"), ("entropy", "entropy"),
            ("lr", "learning_rate"), ("kl_old", "mismatch_kl"), ("length", "tokens/completion"),
            ("tv", "tv_distance"),
        ):  # fmt: skip
            name = ours if ours != "tv" else "official/tv_distance"
            assert got[name] == row[theirs], name
    rewards = np.load(DATA / "rewards" / "reward_step_3.npy")
    assert steps.loc[4, "pass_rate"] == (rewards >= 1).mean()
    assert steps.loc[4, "kept_tokens"] == sum(v for k, v in counts(4).items() if "kept" in k)
    mean = np.load(DATA / "grad_mass" / "step_3.npz")["pos"][4]
    assert steps.loc[4, "official/grad_mass/pos/0.5-1.0"] == mean


def test_completions_and_evaluation(imported: Run) -> None:
    written = json.loads((SOURCE / "completions/toy-wapo/step_3.json").read_text())
    rows = imported.rollouts
    assert len(rows) == len(written) == 64
    assert rows["reward"].tolist() == [row["reward"] for row in written]
    assert rows["completion"][5] == written[5]["completion"][0]["content"]
    assert rows["group"].tolist() == [i % 8 for i in range(64)], "members are 8 apart"
    assert rows["length"].isna().all()
    evaluated = json.loads((SOURCE / "eval/toy-wapo/step_3.json").read_text())
    steps = imported.steps.set_index("step")
    assert steps.loc[3, "eval/reward"] == np.mean([row["reward"] for row in evaluated])


def test_manifest_says_what_is_missing(imported: Run) -> None:
    told = imported.manifest["import"]
    assert imported.manifest["source"] == "import"
    assert told["cannot_feed"]["gradient_mass"] == "run has no 'grad_mass' in its classes table"
    assert "class_share" not in told["cannot_feed"]
    assert "completions: exact_match" in told["unknown_keys"]
    assert "chi_squared" in told["kept_keys"]
    assert any("empty" in note for note in told["notes"]), "the last completions file is []"


def copied(tmp_path: Path) -> Path:
    target = tmp_path / "source"
    shutil.copytree(SOURCE, target)
    return target


def test_steps_repeated_after_a_resume_count_once_the_last_wins(tmp_path: Path) -> None:
    source = copied(tmp_path)
    log = source / "plots/toy-wapo/data/token_bins/token_bins.jsonl"
    again = json.loads(log.read_text().splitlines()[4])
    again["counts"]["neg_peak_eligible"] = 777
    with log.open("a") as stream:
        stream.write(json.dumps(again) + "\n" + '{"step": 5, "coun')
    report = import_run(source, tmp_path / "run")
    assert report.repeated_steps == {5}
    assert report.half_lines == ["token_bins.jsonl"]
    assert "steps 5 were counted again after a resume: the later is read" in report.to_text()
    rows = open_run(tmp_path / "run").classes.query("step == 5 and sign == -1 and regime == 1")
    assert rows["tokens"].tolist() == [777]


def test_zero_advantages_that_cannot_be_told_apart_are_said(tmp_path: Path) -> None:
    source = copied(tmp_path)
    log = source / "plots/toy-wapo/data/token_bins/token_bins.jsonl"
    rows = [json.loads(text) for text in log.read_text().splitlines()]
    for row in rows:  # a trainer without a gate keeps everything
        row["counts"] |= {
            name.replace("eligible", "kept"): n
            for name, n in row["counts"].items()
            if name.endswith("eligible")
        }
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = import_run(source, tmp_path / "run")
    # In step 4 every sequence has an advantage, which the other files show.
    told = report.counts["steps whose pos counts include tokens without advantage (A >= 0)"]
    assert told == 5
    cells = open_run(tmp_path / "run").classes
    found = cells.query("step == 1 and sign == 1 and regime == 1")
    assert found["tokens"].tolist() == [counts(1)["pos_peak_eligible"]]
    assert 0 not in set(cells.query("step == 1")["sign"]), "none is unknown there, not empty"
    assert cells.query("step == 4 and sign == 0")["tokens"].tolist() == [0, 0]


def test_a_gate_is_not_read_from_steps_with_chosen_bins() -> None:
    bins = {"neg_peak_eligible": 5, "neg_peak_kept": 0}
    assert StepCounts.gated([StepCounts(bins=bins)])
    assert not StepCounts.gated([StepCounts(bins=bins, filtered=True)])
    assert not StepCounts.gated(
        [StepCounts(bins=bins), StepCounts(bins=bins | {"neg_peak_kept": 2})]
    )
    assert not StepCounts.gated([])


def test_without_class_counts_the_bins_count_the_tokens(tmp_path: Path) -> None:
    source = copied(tmp_path)
    shutil.rmtree(source / "plots/toy-wapo/data/token_bins")
    import_run(source, tmp_path / "run")
    stored = np.load(DATA / "token_count" / "step_0.npz")
    rows = open_run(tmp_path / "run").classes.query("step == 1")
    assert rows["tokens"].sum() == stored["pos"].sum() + stored["neg"].sum()
    assert set(rows["regime"]) == {-1}


def test_the_layout_without_the_word_checkpoints(tmp_path: Path) -> None:
    source, flat = copied(tmp_path), tmp_path / "outputs" / "toy"
    shutil.copytree(source / "plots/toy-wapo", flat)
    shutil.copytree(source / "checkpoints/toy-wapo", flat, dirs_exist_ok=True)
    rows = json.loads((source / "completions/toy-wapo/step_3.json").read_text())
    (flat / "step_2.json").write_text(json.dumps(rows))
    shutil.copy(source / "eval/toy-wapo/step_3.json", flat / "step_3.json")
    report = import_run(flat, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert set(run.rollouts["step"]) == {2}
    assert any("step_3.json holds evaluation rows" in note for note in report.notes)
    assert len(run.steps) == 6


@pytest.mark.parametrize("part", ["plots", "plots/toy-wapo", "plots/toy-wapo/data", "."])
def test_any_folder_of_the_run_may_be_named(part: str, tmp_path: Path) -> None:
    report = import_run(SOURCE / part, tmp_path / "run")
    assert (report.format, report.steps, report.rollouts) == ("official", 6, 64)


def test_a_broken_archive_is_named_and_the_others_read(tmp_path: Path) -> None:
    source = copied(tmp_path)
    file = source / "plots/toy-wapo/data/scatter_step_2.npz"
    file.write_bytes(file.read_bytes()[:500])
    (source / "completions/toy-wapo/step_3.json").write_text('[{"step"')
    report = import_run(source, tmp_path / "run")
    assert {text.split(":")[0] for text in report.broken} == {"scatter_step_2.npz", "step_3.json"}
    assert open_run(tmp_path / "run").token_steps() == [1, 2, 4, 5, 6]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    source = copied(tmp_path)
    shutil.copytree(source / "plots/toy-wapo", source / "plots/other")
    with pytest.raises(UserError, match="several official runs here.*other.*toy-wapo"):
        import_run(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- single files, both sides of what is read of them


def official(
    root: Path, bins: list[dict[str, Any]] | None = None, **arrays: Any
) -> tuple[ImportReport, Run]:
    """Import one official run of some files: ``rewards__reward_step_0`` is rewards/reward_step_0.

    Several arrays are an archive, one is a file of its own.
    """
    data = root / "plots" / "run" / "data"
    (data / "token_bins").mkdir(parents=True)
    lines = [{"step": 0, "counts": {"pos_peak_eligible": 3}}] if bins is None else bins
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (data / "token_bins" / "token_bins.jsonl").write_text(log)
    for name, values in arrays.items():
        file = data / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True)
        if isinstance(values, dict):
            np.savez(file.with_suffix(".npz"), **values)
        else:
            np.save(file.with_suffix(".npy"), values)
    out = root.parent / f"{root.name}-out"
    return import_run(root, out), open_run(out)


FIVE = np.arange(5)


@pytest.mark.parametrize(
    ("arrays", "bad"),
    [
        ({"pos": FIVE, "neg": FIVE}, None),
        ({"pos": np.arange(6.0), "neg": FIVE > 2}, None),
        ({"pos": FIVE[:4], "neg": FIVE}, "pos"),
        ({"pos": FIVE, "neg": FIVE[:4]}, "neg"),
        ({"pos": FIVE.reshape(5, 1), "neg": FIVE}, "pos"),
        ({"pos": FIVE, "neg": FIVE.astype(str)}, "neg"),
        ({"pos": np.array([1, 2, 3, 4, np.inf]), "neg": FIVE}, "pos"),
        ({"pos": FIVE}, "neg"),
    ],
)
def test_counts_by_probability_are_five_or_more_finite_numbers_of_each_sign(
    arrays: dict[str, np.ndarray], bad: str | None, tmp_path: Path
) -> None:
    other = [{"step": 7, "counts": {"pos_peak_eligible": 3}}]
    report, run = official(tmp_path, other, token_count__step_0=arrays)
    told = [f"step_0.npz:1: {bad} is not 5 or more finite numbers"] if bad else []
    assert report.broken == told
    cells = 0 if bad else np.count_nonzero(arrays["pos"][:5]) + np.count_nonzero(arrays["neg"])
    assert (run.classes["step"] == 1).sum() == cells


@pytest.mark.parametrize("rows", [0, 9_999, 10_000])
def test_a_sample_of_tokens_that_is_full_is_said_to_be_one(rows: int, tmp_path: Path) -> None:
    prob = np.full(rows, 0.5)
    columns = {"prob_train": prob, "prob_inference": prob, "advantages": np.ones(rows)}
    report, run = official(tmp_path, scatter_step_0=columns)
    assert report.token_rows == rows
    assert any("random sample of 10000 tokens" in note for note in report.notes) is (rows == 10_000)
    assert run.token_steps() == ([1] if rows else [])


THREE = {"prob_train": np.array([0.5, 0.0, 0.25]), "prob_inference": np.array([0.5, np.nan, -1]),
         "advantages": np.array([1.0, 0.0, -1.0])}  # fmt: skip
NOT_LISTS = "prob_train, prob_inference, advantages are not lists of as many numbers"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"advantages": np.ones(2)}, NOT_LISTS),
        ({"prob_train": np.array(["a", "b", "c"])}, NOT_LISTS),
        ({name: values.reshape(3, 1) for name, values in THREE.items()}, NOT_LISTS),
    ],
)
def test_a_sample_of_tokens_is_three_lists_of_as_many_numbers(
    change: dict[str, np.ndarray], told: str | None, tmp_path: Path
) -> None:
    report, run = official(tmp_path, scatter_step_4=THREE | change)
    assert report.broken == ([f"scatter_step_4.npz:1: {told}"] if told else [])
    if told is None:
        rows = run.tokens([5], derived=False)
        np.testing.assert_allclose(rows["logp"], [np.log(0.5), np.nan, np.log(0.25)], rtol=2e-5)
        assert rows["logp_old"].isna().tolist() == [False, True, True]
        assert report.counts["probabilities of 0 or not finite, now null"] == 3


def test_a_sample_without_one_of_its_lists_is_none(tmp_path: Path) -> None:
    for name in THREE:
        some = {n: values for n, values in THREE.items() if n != name}
        report, run = official(tmp_path / name, scatter_step_0=some)
        assert (report.broken, report.token_rows) == ([], 0)
        assert run.steps["step"].tolist() == [1]


def test_a_completion_passes_with_a_reward_of_one_and_other_rewards_are_means(
    tmp_path: Path,
) -> None:
    report, run = official(
        tmp_path, rewards__reward_step_0=np.array([1, 0.99, 0, 2]),
        rewards__format_step_0=np.array([0, 1]), rewards__reward_step_1=np.array([1, np.nan]),
        rewards__reward_step_2=np.array([]), rewards__reward_step_3=np.array([["1"]]),
    )  # fmt: skip
    row = run.steps.iloc[0]
    assert (row["step"], row["pass_rate"]) == (1, 0.5)
    assert row["reward"] == pytest.approx(0.9975)
    assert row["reward_std"] == pytest.approx(np.std([1, 0.99, 0, 2]))
    assert row["reward/format"] == 0.5
    bad = [f"reward_step_{n}.npy:1: not a list of finite numbers" for n in (1, 2, 3)]
    assert report.broken == bad


def test_counts_of_classes_are_whole_numbers_of_a_step(tmp_path: Path) -> None:
    counts = {"pos_peak_eligible": 4, "pos_peak_kept": 3, "neg_peak_eligible": 2, "x_kept": "many"}
    lines = [{"step": 0, "counts": counts}, {"step": 1}, {"counts": counts},
             {"step": 3, "counts": counts,
              "hyperparams": {"exclude_bins": ["pos_peak"]}}]  # fmt: skip
    report, run = official(tmp_path, lines)
    found = run.steps[["step", "tokens", "kept_tokens"]].to_numpy()
    assert found.tolist() == [[1, 6, 3], [4, 6, 3]]
    assert report.broken == [f"token_bins.jsonl:{n}: no step or no counts" for n in (2, 3)]
    assert report.counts["counts of tokens that are no count, now 0 (x_kept)"] == 2
    # Of a step with chosen bins nothing is known of a gate; in step 1 what was kept is good.
    tokens = run.classes.query("sign == 1 and regime == 1").set_index("step")["tokens"]
    assert tokens.to_dict() == {1: 3, 4: 4}


def test_an_evaluation_is_the_mean_of_its_rows(tmp_path: Path) -> None:
    rows = [{"step": 3, "reward": 1.0, "acc": 0.5}, {"step": 3, "reward": 0.0, "acc": "x"}, 7]
    (tmp_path / "eval" / "run").mkdir(parents=True)
    (tmp_path / "eval" / "run" / "step_3.json").write_text(json.dumps(rows))
    report, run = official(tmp_path)
    found = run.steps.set_index("step").loc[3].dropna()
    assert found.to_dict() == {"eval/reward": 0.5, "eval/acc": 0.5}
    assert report.files == 2


def test_completions_without_a_reward_are_counted_and_an_empty_file_is_the_last(
    tmp_path: Path,
) -> None:
    rows = [{"step": 2, "prompt": "p", "completion": "c", "reward": 1.0, "acc": 0.5},
            {"step": 2, "prompt": "p", "completion": "d", "acc": 1}, "text"]  # fmt: skip
    folder = tmp_path / "completions" / "run"
    folder.mkdir(parents=True)
    for name, text in (("2", json.dumps(rows)), ("3", "[]"), ("4", '[{"step"')):
        (folder / f"step_{name}.json").write_text(text)
    report, run = official(tmp_path, token_count__step_0={"pos": FIVE, "neg": FIVE})
    assert run.rollouts[["step", "reward", "completion"]].to_numpy().tolist() == [[2, 1.0, "c"]]
    assert report.counts["completions without a reward left out"] == 1
    assert report.unknown_keys["completions: acc"] == 1
    assert report.broken == ["step_4.json:1: no JSON; still being written?"]
    said = "of the completions is empty, as the official trainer leaves its last one"
    assert [note for note in report.notes if said in note] == [f"step_3.json {said}"]
    assert report.files == 5
    assert not [line for line in report.warnings() if "named like" in line], (
        "it is read: it is empty"
    )
