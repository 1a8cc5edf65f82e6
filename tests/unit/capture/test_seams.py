"""Where a loss finds its quantities: tables of cases."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wapo_analysis.capture import own_rank
from wapo_analysis.capture.seams import SEAMS, Names, look_up, shaped
from wapo_analysis.errors import UserError


@pytest.mark.parametrize(
    ("where", "found"),
    [
        (None, None), ("a", 1), ("absent", None), ("b.c", 2), ("b.absent.d", None), ("d.1", 5),
        ("d.0.e", 4), ("f.g", 6), ("f.absent", None), ("n.x", None),
        (lambda call: call["a"] + 1, 2), ("b.n.x", None),
    ],
)  # fmt: skip
def test_a_path_goes_through_keys_attributes_and_indices(where: Any, found: Any) -> None:
    call = {
        "a": 1, "b": {"c": 2, "n": None}, "d": [{"e": 4}, 5], "f": SimpleNamespace(g=6), "n": None
    }  # fmt: skip
    assert look_up(where, call) == found


def test_names_are_a_row_a_changed_row_or_a_mapping() -> None:
    assert Names.of("verl") is SEAMS["verl"]
    own = Names(logp="a", advantages="b")
    assert Names.of(own) is own
    assert Names.of({"logp": "a", "advantages": "b"}) == own
    changed = Names.of({"like": "skyrl", "sampler": None})
    assert changed.sampler is None
    assert (changed.logp, changed.loss_scale) == ("log_probs", SEAMS["skyrl"].loss_scale)
    for wrong, said in (
        ("sky", "unknown trainer 'sky'"), ({"logp": "a"}, "where logp and advantages are"),
        ({"like": "skyrl", "lopg": "x"}, "unknown quantity 'lopg'"),
        ({"like": "skyr"}, "unknown trainer 'skyr'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            Names.of(wrong)  # type: ignore[arg-type]


def test_what_a_call_lacks_is_left_out_unless_nothing_goes_without() -> None:
    names = Names(logp="x", advantages="data.adv", mask="absent", entropy="data.h")
    assert names.find({"x": 1, "data": {"adv": 2, "h": None}}) == {"logp": 1, "advantages": 2}
    with pytest.raises(UserError, match=r"without advantages, which should be at 'data.adv'; its"):
        names.find({"x": 1, "data": {}})
    with pytest.raises(UserError, match="without logp, which should be at 'x'; its arguments were"):
        names.find({"data": {"adv": 1}})


LOGP, OLD, SAMPLED = (torch.full((2, 3), value) for value in (-1.0, -2.0, -3.0))


def test_quantities_get_the_names_and_shapes_of_the_recorder() -> None:
    plain = shaped({"logp": LOGP, "advantages": torch.ones(2, 1)})
    assert plain["mask"].tolist() == [[True] * 3] * 2
    assert plain["advantages"].tolist() == [1.0, 1.0]
    assert plain["loss_scale"] == 1.0
    assert not {"logp_prox", "kept", "cu_seqlens", "sampler", "weights"} & plain.keys()
    weights = torch.tensor([[0.0, 0.5, 1], [-1, 0, 2]])
    given = {"logp": LOGP, "advantages": LOGP, "logp_old": OLD, "sampler": SAMPLED,
             "mask": torch.eye(2, 3), "weights": weights,
             "loss_scale": torch.tensor(4)}  # fmt: skip
    full = shaped(given)
    assert full["logp_old"] is SAMPLED
    assert full["logp_prox"] is OLD
    assert full["kept"].tolist() == [[False, True, True], [True, False, True]]
    assert full["mask"].tolist() == torch.eye(2, 3).tolist()
    assert full["advantages"] is LOGP
    assert full["loss_scale"] == 4.0
    assert "weights" in given, "what was found stays as it was"
    assert shaped({"logp": LOGP, "advantages": LOGP, "sampler": SAMPLED})["logp_prox"] is None


def test_one_completion_of_a_call_is_a_packed_row() -> None:
    one = {"logp": torch.zeros(4), "advantages": torch.zeros(4)}
    assert shaped(one)["cu_seqlens"].tolist() == [0, 4]
    bounds = torch.tensor([0, 1, 4])
    assert shaped({**one, "cu_seqlens": bounds})["cu_seqlens"] is bounds
    assert "cu_seqlens" not in shaped({**one, "rollouts": torch.zeros(4)})


def test_tokens_of_areal_fit_or_are_not_known() -> None:
    tokens: Any = SEAMS["areal"].tokens
    call = {"input_data": {"input_ids": torch.tensor([5, 6, 7, 8])}, "logprobs": torch.zeros(4)}
    assert tokens(call).tolist() == [6, 7, 8, 5]
    assert tokens({**call, "logprobs": torch.zeros(2, 2)}).tolist() == [[6, 5], [8, 7]]
    assert tokens({**call, "logprobs": torch.zeros(3)}) is None
    assert tokens({**call, "input_data": {}}) is None


def test_logits_of_slime_are_those_before_each_token_of_a_completion() -> None:
    logits: Any = SEAMS["slime"].logits
    rows = torch.arange(9.0)[:, None]
    batch = {"unconcat_tokens": [torch.zeros(5), torch.zeros(4)], "response_lengths": [2, 3]}
    found = logits({"batch": batch, "logits": rows[None]})
    assert [part[:, 0].tolist() for part in found] == [[2, 3], [5, 6, 7]]
    assert logits({"batch": batch, "logits": rows[None, :8]}) is None, "a part of them"
    tokens: Any = SEAMS["slime"].tokens
    scored = (None, {"log_probs": [torch.zeros(2), torch.zeros(3)]})
    ids = {"unconcat_tokens": [torch.arange(5), torch.arange(10, 14)]}
    picked = tokens({"batch": ids, "scored": scored})
    assert [part.tolist() for part in picked] == [[3, 4], [11, 12, 13]]


def test_nemo_s_first_column_predicts_nothing() -> None:
    names, data = SEAMS["nemo-rl"], {"token_mask": torch.ones(2, 3), "sample_mask": torch.eye(2)[0]}
    call = {"data": {**data, "advantages": OLD}, "next_token_logprobs": LOGP[:, 1:]}
    found = names.find(call)
    assert found["mask"].tolist() == [[1, 1], [0, 0]]
    assert found["advantages"].tolist() == [[-2.0, -2.0]] * 2
    assert found["logp_old"].tolist() == LOGP[:, 1:].tolist(), "its own, where none were kept"
    assert "sampler" not in found
    call["data"]["prev_logprobs"] = SAMPLED
    assert names.find(call)["logp_old"].tolist() == [[-3.0, -3.0]] * 2


def test_a_process_alone_is_the_first() -> None:
    assert own_rank() == 0


@pytest.mark.parametrize(("processes", "whole"), [(1, True), (2, False), (8, False)])
def test_of_split_logits_slime_s_are_a_part(
    processes: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: processes)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)  # type: ignore[arg-type]
    logits: Any = SEAMS["slime"].logits
    batch = {"unconcat_tokens": [torch.zeros(3)], "response_lengths": [1]}
    found = logits({"batch": batch, "logits": torch.arange(3.0)[None, :, None]})
    assert (found is not None) is whole
    if whole:
        assert found[0].tolist() == [[1.0]]


@pytest.mark.parametrize("processes", [None, 3])
def test_a_mean_over_processes_is_scaled_by_their_number(
    processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes is not None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    for name in ("skyrl", "areal"):
        scale: Any = SEAMS[name].loss_scale
        assert scale({}) == (processes or 1)


def test_open_instruct_marks_what_is_no_response_with_a_log_probability_of_one() -> None:
    call = {
        "new_logprobs": torch.tensor([-0.5, 1.0, 2.0]), "ratio": torch.tensor([2.0, 1.0, 1.0]),
        "advantages": torch.ones(3),
    }  # fmt: skip
    found = SEAMS["open-instruct"].find(call)
    assert found["mask"].tolist() == [True, False, True]
    assert found["logp_old"].tolist() == pytest.approx([-0.5 - 0.6931472, 1.0, 2.0])
