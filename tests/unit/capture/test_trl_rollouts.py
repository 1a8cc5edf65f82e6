"""Rollouts of a TRL batch: numbers over processes, what describes them, sums and log entries."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from wapo_taxonomy import CLASSES

from tests.support.recorder_passes import tokens
from tests.support.trl_toy import toy_tokenizer
from wapo_analysis.capture.trl.rollouts import ID_KEY, RolloutReader, log_entries, log_sums
from wapo_analysis.capture.trl.trainer import OLD_LOGPS
from wapo_analysis.record.step import token_records
from wapo_analysis.record.tokens import HostPass, given_in_all, repetition

TOKENIZER = toy_tokenizer()
END = TOKENIZER.eos_token_id
GROUP = 2


def reader(process: int = 0, processes: int = 1, **trainer: Any) -> RolloutReader:
    accelerator = SimpleNamespace(process_index=process, num_processes=processes)
    raw = SimpleNamespace(
        accelerator=accelerator, num_generations=GROUP, processing_class=TOKENIZER, **trainer
    )
    return RolloutReader(SimpleNamespace(raw=raw))  # type: ignore[arg-type]


def ids_of(*texts: str, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) and their mask; ``.`` at the end of a text is the end token."""
    rows, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        spelled = [END if c == "." else TOKENIZER.convert_tokens_to_ids(c) for c in text]
        rows[row, : len(spelled)] = torch.tensor(spelled)
        mask[row, : len(spelled)] = 1
    return rows, mask


def batch(*texts: str, **more: Any) -> dict[str, Any]:
    ids, mask = ids_of(*texts)
    prompts, prompt_mask = ids_of(*["1+"] * len(texts), width=3)
    return {
        "completion_ids": ids, "completion_mask": mask, "prompt_ids": prompts,
        "prompt_mask": prompt_mask, "advantages": torch.arange(len(texts)).float() - 0.5, **more,
    }  # fmt: skip


def examples(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+=", "solution": n} for n in range(count)]


def inputs_of(given: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    return {name: values[rows] for name, values in given.items()}


def test_two_processes_number_rollouts_and_groups_as_one() -> None:
    """Two generated batches of 2 x 4 rollouts, each pass of half a process's share."""
    found = {}
    for process in (0, 1):
        watch = reader(process, 2)
        numbers = []
        for made in range(2):
            given = batch("1.", "22.", "333.", "444444")
            watch.take_rewards(torch.arange(8.0)[:, None] + 10 * made)
            watch.take_batch(examples(4), given)
            assert given[ID_KEY].tolist() == [8 * made + 4 * process + n for n in range(4)]
            for rows in ([3, 1], [0, 2]):
                rollout, group = watch.numbers(inputs_of(given, rows))
                assert group.tolist() == [n // GROUP for n in rollout.tolist()]
                numbers += rollout.tolist()
        found[process] = numbers
        table = watch.columns()
        own = [8 * made + 4 * process + n for made in range(2) for n in range(4)]
        assert table["rollout"] == own
        assert table["group"] == [n // GROUP for n in own]
        assert table["reward"] == [n % 8 + 10.0 * (n // 8) for n in own]
        assert table["advantage"] == [-0.5, 0.5, 1.5, 2.5] * 2
        assert table["completion"] == ["1", "22", "333", "444444"] * 2
        assert table["length"] == [2, 3, 4, 6] * 2
        assert table["finish_reason"] == ["stop", "stop", "stop", "length"] * 2
        assert table["prompt"] == [f"{n}+=" for n in range(4)] * 2
        assert table["answer"] == ["0", "1", "2", "3"] * 2
        assert watch.statistics()["reward"] == np.mean([*range(8), *range(10, 18)])
        sums = watch.sums()
        assert (sums["length"], sums["length n"]) == (30.0, 8)
        assert (sums["truncated"], sums["truncated n"]) == (2.0, 8)
        assert sums["repetition"] == pytest.approx(2 * repetition([1] * 6))
    assert found[0] == [3, 1, 0, 2, 11, 9, 8, 10]
    assert found[1] == [7, 5, 4, 6, 15, 13, 12, 14]


def test_a_step_has_the_rollouts_its_passes_saw_else_the_last_batch() -> None:
    watch = reader()
    assert watch.columns() == watch.statistics() == {}
    given = batch("1.", "2.", "3.", "4.")
    watch.take_batch(examples(4), given)
    watch.start_step()
    assert watch.columns()["rollout"] == [0, 1, 2, 3], "nothing was seen: the whole batch"
    watch.numbers(inputs_of(given, [2]))
    assert watch.columns()["rollout"] == [2]
    watch.start_step()
    watch.numbers(inputs_of(given, [1, 3]))
    assert watch.columns()["rollout"] == [1, 3]
    assert np.isnan(watch.columns()["reward"]).all(), "nobody told any"
    watch.take_batch(examples(4), batch("1.", "2.", "3.", "4."))
    watch.start_step()
    assert list(watch._batches) == [1], "of earlier batches nothing is kept"


def test_a_batch_made_before_attaching_has_plain_numbers() -> None:
    rollout, group = reader().numbers(batch("1.", "2.", "3."))
    assert rollout.tolist() == [0, 1, 2]
    assert group.tolist() == [-1] * 3


def test_rewards_are_weighted_as_the_trainer_does_and_nan_where_nothing_graded() -> None:
    nan = torch.nan
    matrix = torch.tensor([[1.0, 2.0], [nan, 4.0], [nan, nan], [0.5, nan]])
    watch = reader(reward_weights=torch.tensor([2.0, 0.25]))
    watch.take_rewards(matrix)
    watch.take_batch(examples(4), batch("1.", "2.", "3.", "4."))
    assert watch.columns()["reward"][:2] == [2.5, 1.0]
    assert np.isnan(watch.columns()["reward"][2])
    assert watch.columns()["reward"][3] == 1.0
    watch.take_rewards(matrix[:3])
    watch.take_batch(examples(4), batch("1.", "2.", "3.", "4."))
    assert np.isnan(watch.columns()["reward"]).all(), "a matrix of another batch is none of this"


def test_lengths_count_what_the_policy_wrote_and_ends_what_ended() -> None:
    """A masked-out completion keeps its text; what a tool answered is no token of the policy."""
    given = batch("12.", "123456", "1234.")
    given["completion_mask"][0] = 0
    given["tool_mask"] = torch.ones_like(given["completion_mask"])
    given["tool_mask"][2, 1:3] = 0
    watch = reader()
    watch.take_batch(examples(3), given)
    table = watch.columns()
    assert table["length"] == [6, 6, 3]
    assert table["finish_reason"] == ["length", "length", "stop"]
    assert [len(text) for text in table["completion"]] == [2, 6, 4]


def test_end_tokens_of_the_generation_count_too() -> None:
    stop = TOKENIZER.convert_tokens_to_ids("9")
    watch = reader(generation_config=SimpleNamespace(eos_token_id=[stop, None]))
    watch.take_batch(examples(2), batch("129", "128"))
    assert watch.columns()["finish_reason"] == ["stop", "length"]


def test_an_advantage_for_every_token_is_averaged_and_prompts_are_spelled() -> None:
    given = batch("12.", "1.", "3", "4")
    given["completion_mask"][3] = 0
    nines = [9.0] * 4
    given["advantages"] = torch.tensor(
        [[1.0, 2.0, 6.0, 9, 9, 9], [4.0, -2.0, *nines], [0.5, 9, *nines], [9.0, 9, *nines]]
    )
    watch = reader()
    watch.take_batch([{"prompt": [{"role": "user"}]}, {"label": 0}, {}, {}], given)
    table = watch.columns()
    assert table["advantage"] == [3.0, 1.0, 0.5, 0.0]
    assert table["prompt"] == ["1+"] * 4
    assert table["answer"] == [None, "0", None, None]


def test_old_log_probabilities_travel_with_a_batch_that_has_but_their_sum() -> None:
    given = batch("12.", "1.")
    mine, other = -torch.rand(2, 6), -torch.rand(2, 6)
    given["old_logps"] = (mine * given["completion_mask"]).sum(1)
    watch = reader()
    for scored in (other, mine, other + 1):
        watch.take_scores(scored)
    watch.take_batch(examples(2), given)
    assert torch.equal(given[OLD_LOGPS], mine)
    without = batch("12.", "1.")
    watch.take_scores(mine)
    watch.take_batch(examples(2), without)
    assert OLD_LOGPS not in without


def test_sums_of_classes_are_those_of_the_rows_and_the_same_names_always() -> None:
    given = tokens(2, rows=200)
    given.collision_rest[::9] = torch.nan  # type: ignore[index]
    (rows,) = token_records([HostPass(given)], 1, 0, 1.0)
    sums = log_sums(rows, given_in_all([given]))
    assert sums.keys() == log_sums(None).keys()
    assert set(log_sums(None).values()) == {0.0}
    for name, code in zip((*CLASSES, "none", "unknown"), (0, 1, 2, 3, 4, -1), strict=True):
        mine = rows["cls"] == code
        assert sums[f"tokens/{name}"] == mine.sum()
        assert sums[f"grad_mass/{name}"] == pytest.approx(np.nansum(rows["grad_norm"][mine]))
        assert sums[f"flow/{name}"] == pytest.approx(np.nansum(rows["pred_dentropy"][mine]))
        known = np.isfinite(rows["pred_dentropy"][mine]).sum()
        assert sums[f"flow_tokens/{name}"] == known
    assert sums["tokens/unknown"] > 0


def sums_of(**more: float) -> dict[str, float]:
    plain = log_sums(None)
    numbers = {
        "rows": 10.0, "tokens/pos_peak": 5.0, "grad_mass/pos_peak": 3.0, "flow/pos_peak": -0.5,
        "flow_tokens/pos_peak": 5.0, "tokens/neg_peak": 3.0, "grad_mass/neg_peak": 1.0,
        "flow/neg_peak": 0.25, "flow_tokens/neg_peak": 3.0, "tokens/none": 2.0,
    }  # fmt: skip
    return {**plain, **numbers, **more}


def test_log_entries_are_shares_of_all_tokens_and_of_the_mass() -> None:
    columns = {"entropy_pos": 0.5, "entropy_neg": float("nan"), "entropy": 0.6}
    entries = log_entries(sums_of(), columns)
    assert entries["wapo/entropy_pos"] == 0.5
    assert "wapo/entropy_neg" not in entries, "not finite"
    assert "wapo/entropy" not in entries
    assert entries["wapo/grad_mass"] == 4.0
    assert entries["wapo/share/pos_peak"] == 0.5
    assert entries["wapo/grad_share/neg_peak"] == 0.25
    assert entries["wapo/share/pos_valley"] == entries["wapo/grad_share/pos_valley"] == 0.0
    assert entries["wapo/entropy_flow/pos_peak"] == -0.5
    assert entries["wapo/entropy_flow/neg_peak"] == 0.25


def test_log_entries_leave_out_what_is_not_known_of_every_token() -> None:
    without_flow = log_entries(sums_of(**{"flow_tokens/neg_peak": 2.0}), {})
    assert not any("flow" in name for name in without_flow)
    assert without_flow["wapo/share/neg_peak"] == 0.3
    assert log_entries(sums_of(**{"tokens/unknown": 10.0}), {}) == {}
    idle = log_entries(sums_of(**{"grad_mass/pos_peak": 0.0, "grad_mass/neg_peak": 0.0}), {})
    assert idle["wapo/grad_mass"] == 0.0
    assert not any(name.startswith("wapo/grad_share") for name in idle)


def test_a_completion_of_its_end_alone_stopped_and_one_that_is_masked_out_did_not() -> None:
    given = batch(".", ".", "1.")
    given["completion_mask"][1] = 0
    watch = reader()
    watch.take_batch(examples(3), given)
    table = watch.columns()
    assert table["finish_reason"] == ["stop", "length", "stop"]
    assert table["length"] == [1, 6, 2]
    assert watch.sums()["repetition"] == repetition([END, 0, 0, 0, 0, 0]), "of the second alone"


def test_prompts_are_spelled_if_one_is_no_text_and_tools_wrote_the_rest() -> None:
    given = batch("123.", "45")
    given["tool_mask"] = torch.zeros_like(given["completion_mask"])
    given["tool_mask"][:, 0] = 1
    watch = reader()
    watch.take_batch([{"prompt": "0+="}, {"prompt": [{"role": "user"}]}], given)
    table = watch.columns()
    assert table["prompt"] == ["1+"] * 2
    assert table["length"] == [1, 1]


def test_of_two_batches_that_no_pass_saw_the_last_one_counts() -> None:
    watch = reader()
    for text in ("1.", "22."):
        watch.take_rewards(torch.full((2, 1), float(len(text))))
        watch.take_batch(examples(2), batch(text, text))
    assert watch.columns()["completion"] == ["22", "22"]
    assert watch.columns()["rollout"] == [0, 1]
    assert watch.statistics()["reward"] == 3.0
