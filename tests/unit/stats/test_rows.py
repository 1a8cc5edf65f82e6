"""Reading rows of logits in any layout, and what finds their largest columns."""

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.stats import eager, head
from wapo_analysis.stats.eager import (
    CPU_ELEMENTS,
    _lift,
    _spans,
    block_rows,
    reduce_by,
    reduce_compiled,
    reduce_keeping,
    reduce_rows,
)
from wapo_analysis.stats.formulas import LOG2_E, TokenStats
from wapo_analysis.stats.rows import (
    BLOCK,
    Rows,
    block_maxima,
    check_head,
    chosen_rows,
    gathered,
    memory,
    one_by_one,
    top_columns,
    upper_end,
)

V = 7


def layouts() -> dict[str, Tensor]:
    """Logits (2, 3, 4, V) whose numbers tell their place, in several ways to lie in memory."""
    plain = torch.arange(2 * 3 * 4 * V, dtype=torch.float32).view(2, 3, 4, V)
    wide = torch.full((2, 3, 6, V), -1.0)
    wide[:, :, 1:5] = plain
    turned = plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    every_other = torch.stack([plain, plain + 1000], dim=-1)[..., 0]
    return {
        "plain": plain, "shifted": wide[:, :, 1:5], "turned": turned, "strided": every_other
    }  # fmt: skip


KEPT = {
    "all": None, "run": [3, 4, 5, 6], "across": [10, 11, 12, 13], "some": [0, 5, 6, 11, 12, 23],
    "one": [9], "none": [],
}  # fmt: skip


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("kept", KEPT)
def test_every_row_is_read_picked_and_put_in_its_place(layout: str, kept: str) -> None:
    logits, numbers = layouts()[layout], KEPT[kept]
    whole = layouts()["plain"].reshape(-1, V)
    wanted = list(range(24)) if numbers is None else numbers
    rows = Rows(logits, None if numbers is None else torch.tensor(numbers, dtype=torch.long))
    assert len(rows) == len(wanted)
    for start, stop in ((0, len(wanted)), (1, len(wanted) - 1), (len(wanted) // 2, len(wanted))):
        if stop <= start:
            assert rows.block(0, 0).shape == (0, V)  # a batch of which no token counts
            continue
        expected = whole[wanted[start:stop]]
        assert torch.equal(rows.block(start, stop), expected)
        space = torch.empty(24, V)
        assert torch.equal(rows.block(start, stop, space), expected)
        wide = torch.empty(24, V, dtype=torch.float64)
        found = rows.block(start, stop, wide)
        assert found.dtype == torch.float64
        assert torch.equal(found, expected.double())
        ids = torch.tensor([[6, 0, 3]] * (stop - start))
        assert torch.equal(rows.pick(start, stop, ids), expected[:, [6, 0, 3]])
        out = torch.zeros(2, 3, 4, V)
        rows.put(out, start, expected + 0.5)
        filled = torch.zeros(24, V)
        filled[wanted[start:stop]] = expected + 0.5
        assert torch.equal(out.view(-1, V), filled)
    first = int(logits.reshape(-1)[0])
    base = torch.as_strided(logits, (logits.untyped_storage().size() // 4,), (1,), 0)
    offsets = rows.offsets() + logits.storage_offset()
    assert base[offsets].tolist() == [first + V * n for n in wanted]


@pytest.mark.parametrize(
    ("layout", "kept", "start", "stop", "copied"),
    [
        ("shifted", None, 4, 8, False), ("shifted", None, 0, 1, False),
        ("shifted", None, 3, 4, False), ("shifted", None, 7, 8, False),
        ("shifted", None, 5, 7, False), ("shifted", None, 2, 6, True),
        ("shifted", None, 3, 5, True), ("shifted", None, 0, 8, True),
        ("shifted", [1, 3, 4, 5, 6, 7], 2, 6, False), ("shifted", [1, 3, 4], 0, 1, False),
        ("shifted", [4, 5, 7], 0, 3, True), ("shifted", [1, 3, 4], 1, 3, True),
        ("plain", None, 2, 23, False), ("plain", [2, 3, 5, 6], 0, 2, False),
        ("plain", [2, 3, 5, 6], 1, 3, True), ("plain", [2, 3, 5, 6], 3, 4, False),
    ],
)  # fmt: skip
def test_rows_that_lie_evenly_are_not_copied(
    layout: str, kept: Any, start: int, stop: int, copied: bool
) -> None:
    """Panels of four rows with a gap between them, or rows without one."""
    logits = layouts()[layout]
    begin = logits.untyped_storage().data_ptr()
    block = Rows(logits, None if kept is None else torch.tensor(kept)).block(start, stop)
    inside = begin <= block.data_ptr() < begin + logits.untyped_storage().size()
    assert inside is not copied


@pytest.mark.parametrize(
    ("count", "vocabulary", "chunk", "rows"),
    [
        (1 << 30, 1, None, CPU_ELEMENTS), (1 << 30, 2, None, CPU_ELEMENTS // 2),
        (999, 1000, None, CPU_ELEMENTS // 1000), (9, CPU_ELEMENTS, None, 1),
        (9, CPU_ELEMENTS + 1, None, 1), (9, CPU_ELEMENTS // 2, None, 2), (9, 1000, 3, 3),
        (9, CPU_ELEMENTS + 1, 5, 5), (4, 1000, 5, 4), (4, 2, None, 4), (0, 7, None, 1),
        (0, 7, 5, 1), (1, 7, 5, 1),
    ],
)  # fmt: skip
def test_rows_of_a_block_fit_into_the_cache(
    count: int, vocabulary: int, chunk: int | None, rows: int
) -> None:
    whole = torch.empty(1, 1).expand(count, vocabulary)
    assert block_rows(Rows(whole), chunk) == rows


def test_spans_cover_all_rows_once() -> None:
    assert list(_spans(0, 7, 3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(_spans(2, 6, 2)) == [(2, 4), (4, 6)]
    assert list(_spans(3, 3, 2)) == []


@pytest.mark.parametrize(
    ("elements", "opened", "topk", "groups"),
    [
        (43, 1 << 20, 0, [(0, 8), (8, 9)]), (39, 1 << 20, 0, [(0, 6), (6, 9)]),
        (9, 1 << 20, 0, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]),
        (43, BLOCK * 6, 2, [(0, 3), (3, 6), (6, 9)]),
        (43, BLOCK * 2 - 1, 2, [(n, n + 1) for n in range(9)]),
        (43, BLOCK * 99, 2, [(0, 8), (8, 9)]),
    ],
)  # fmt: skip
def test_the_sums_of_a_group_follow_its_maxima(
    elements: int, opened: int, topk: int, groups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CPU's last cache keeps between two looks at the logits; blocks of two rows."""
    monkeypatch.setattr(eager, "_GROUP_ELEMENTS", elements)
    monkeypatch.setattr(eager, "_OPENED_ELEMENTS", opened)
    rows, order = Rows(torch.rand(9, 5)), list[Any]()

    def sums(start: int, stop: int, origin: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        assert len(origin) == len(out) == stop - start
        order.append((start, stop))
        return (torch.zeros_like(origin),) * 4

    def maxima(block: Tensor) -> Tensor:
        order.append(len(block))
        return block_maxima(block)

    reduce_by(sums, rows, torch.zeros(9, dtype=torch.long), topk, 2, None, maxima)
    expected = list[Any]()
    for start, stop in groups:
        spans = list(_spans(start, stop, 2))
        expected += [b - a for a, b in spans] + spans
    assert order == expected


def test_the_largest_columns_are_found_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_kernel", lambda program: program)
    monkeypatch.setattr(eager, "_dynamic", lambda *tensors: tensors)
    for reduce in (reduce_rows, reduce_compiled):
        found = reduce(Rows(torch.rand(3, 5)), torch.arange(3), 1.0)
        assert (found.top_values, found.top_ids) == (None, None)


@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_upper_end_of_a_row(vocabulary: int, dtype: torch.dtype) -> None:
    """Logits of the target, the mode and the next, by sorting; few values, so many are equal."""
    draw = torch.Generator().manual_seed(vocabulary)
    rows = torch.randint(4, (60, vocabulary), generator=draw).to(dtype)
    rows[rows == 0] = -torch.inf
    rows[:, 0] = 1
    target = torch.randint(vocabulary, (60, 1), generator=draw)
    maxima = block_maxima(rows)
    assert maxima.shape == (60, -(-vocabulary // BLOCK))
    parts = [part.amax(1) for part in rows.split(BLOCK, 1)]
    assert torch.equal(maxima, torch.stack(parts, 1))
    pick = partial(torch.gather, rows, 1)
    k = min(3, vocabulary)
    order = rows.sort(dim=1, descending=True, stable=True)
    values, ids = top_columns(pick, maxima, k, vocabulary)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(ids, order.indices[:, :k])
    ends = upper_end(pick, maxima.clone(), target, vocabulary)
    for row, at in enumerate(target[:, 0].tolist()):
        chosen, highest = rows[row, at], rows[row].max()
        mode = at if chosen == highest else int(rows[row].argmax())
        left = [float(v) for n, v in enumerate(rows[row].tolist()) if n not in (at, mode)]
        found = [float(part[row]) for part in ends[:3]]
        assert found == [float(chosen), float(highest), max(left, default=-torch.inf)]
        assert int(ends.mode[row]) == mode


@pytest.mark.parametrize(("targets", "picks"), [([[3], [200]], 2), ([[3], [201]], 3)])
def test_a_second_block_is_opened_only_if_a_target_is_not_the_mode(
    targets: list[list[int]], picks: int
) -> None:
    rows = torch.zeros(2, 256)
    rows[0, 3] = rows[1, 200] = 1
    seen: list[int] = []

    def pick(ids: Tensor) -> Tensor:
        seen.append(ids.shape[1])
        return rows.gather(1, ids)

    ends = upper_end(pick, block_maxima(rows), torch.tensor(targets), 256)
    assert seen == [1, *[BLOCK] * (picks - 1)]
    assert ends.mode.tolist() == [[3], [200]]


def test_the_lowest_power_in_a_sum_has_a_normal_square() -> None:
    """Arithmetic of denormal numbers is slow; far below the rounding of a sum it is of no use."""
    for dtype, lowest in eager.LOWEST.items():
        assert 4.0**lowest >= torch.finfo(dtype).tiny
        assert 2.0**lowest < torch.finfo(dtype).eps ** 2
    for dtype, lowest in head._LOWEST.items():
        assert torch.finfo(dtype).tiny <= 2.0**lowest < torch.finfo(dtype).eps ** 3


def test_a_normaliser_becomes_a_power_of_two() -> None:
    draw = torch.Generator().manual_seed(3)
    sum_e = torch.rand(40, 1, generator=draw, dtype=torch.float64) * 9
    ends = torch.randn(40, 2, generator=draw, dtype=torch.float64)
    out = torch.tensor([[4, 4], [4, 9]] * 20)
    lift = _lift(sum_e, ends, out)
    mode = torch.where(out[:, :1] == out[:, 1:], 0.0, ends[:, 1:].exp())
    powers = (sum_e + ends[:, :1].exp() + mode).log() + lift
    exponent = powers * LOG2_E
    torch.testing.assert_close(exponent, exponent.round(), rtol=0, atol=1e-12)
    assert (lift.abs() <= 0.5 / LOG2_E + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_powers_are_those_of_the_row_and_nothing_more_is_found(dtype: torch.dtype) -> None:
    """Exponentials from the origin on, but of target and mode; no largest columns."""
    logits = (3 * torch.randn(9, 40, generator=torch.Generator().manual_seed(2))).to(dtype)
    targets = torch.arange(9) * 4
    powers = torch.empty(9, 40, dtype=dtype)
    reduced, modes, lifts = reduce_keeping(Rows(logits), targets, 0.8, powers)
    assert reduced.top_values is None
    assert reduced.top_ids is None
    best = logits.max(1)
    at = logits.gather(1, targets[:, None])[:, 0]
    assert modes.tolist() == torch.where(at == best.values, targets, best.indices).tolist()
    origin = reduced.numbers[:, 2:3]
    expected = ((logits.float() - origin) / 0.8 + lifts[:, None]).exp()
    others = torch.ones(9, 40, dtype=torch.bool)
    others[range(9), targets] = others[range(9), modes] = False
    rtol = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(powers.float()[others], expected[others], rtol=rtol, atol=1e-30)
    assert lifts.any() == (dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        normaliser = expected.double().sum(1).log2()
        torch.testing.assert_close(normaliser, normaliser.round(), rtol=0, atol=1e-4)


def test_rows_are_chosen_by_mask_or_number() -> None:
    targets = torch.tensor([[3, -100], [6, 0]])
    mask = torch.tensor([[True, False], [True, True]])
    for given in ({"mask": mask, "kept": None}, {"mask": None, "kept": torch.tensor([0, 2, 3])}):
        chosen, kept = chosen_rows(targets, 7, **given)
        assert chosen.tolist() == [3, 6, 0]
        assert kept is not None
        assert kept.tolist() == [0, 2, 3]
    chosen, kept = chosen_rows(targets.clamp(min=0), 7, None, None)
    assert (chosen.tolist(), kept) == ([3, 0, 6, 0], None)


def test_problems_of_a_batch_are_solved_one_by_one() -> None:
    class Scaled:
        @staticmethod
        def apply(values: Tensor, factor: Any) -> tuple[Tensor | None, ...]:
            return values * factor, None

    given = torch.arange(6.0).view(3, 2)
    whole, dims = one_by_one(Scaled, 2, (1, None), (given, 10))
    assert whole[0] is not None
    assert whole[0].tolist() == [[0.0, 20.0, 40.0], [10.0, 30.0, 50.0]]
    assert (whole[1], dims) == (None, (0, None))


def test_the_memory_of_a_machine_is_its_pages_or_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    for sysconf, found in ((sizes.__getitem__, 4_096_000), ({}.__getitem__, 0)):

        def ask(name: str, sysconf: Any = sysconf) -> int:
            try:
                return int(sysconf(name))
            except KeyError as error:
                raise ValueError("unrecognized configuration name") from error

        monkeypatch.setattr(os, "sysconf", ask)
        memory.cache_clear()
        assert memory() == found
    monkeypatch.undo()
    memory.cache_clear()
    assert memory() > 1 << 28


@pytest.mark.parametrize(
    ("learns", "enabled", "refused"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_a_shard_is_gathered_unless_it_asks_for_a_gradient(
    learns: bool, enabled: bool, refused: bool
) -> None:
    whole = torch.ones(3, 2)
    shard: Any = SimpleNamespace(full_tensor=lambda: whole, requires_grad=learns)
    with torch.set_grad_enabled(enabled):
        if refused:
            with pytest.raises(UserError, match="the head is a shard of FSDP2"):
                gathered(shard)
        else:
            assert gathered(shard) is whole
        assert gathered(whole) is whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None), ({"weight": (7, 2, 1)}, "does not fit"), ({"weight": (7,)}, "does not fit"),
        ({"weight": (7, 3)}, "does not fit"), ({"weight": (2, 7)}, "does not fit"),
        ({"bias": (7,)}, None), ({"bias": (2,)}, "bias must have shape"),
        ({"scale": 0.5}, None), ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"softcap": 0.5}, None), ({"softcap": float("inf")}, "softcap must be positive"),
    ],
)  # fmt: skip
def test_a_head_must_fit_its_hidden_states(change: dict[str, Any], said: str | None) -> None:
    sizes = {"weight": (7, 2), "bias": None, "scale": 1.0, "softcap": None, **change}
    weight, bias = torch.zeros(sizes["weight"]), sizes["bias"]
    given = (torch.zeros(3, 2), weight, torch.zeros(3), None if bias is None else torch.zeros(bias))
    if said is None:
        check_head(*given, 1.0, None, sizes["scale"], sizes["softcap"])
    else:
        with pytest.raises(UserError, match=said):
            check_head(*given, 1.0, None, sizes["scale"], sizes["softcap"])


def test_parts_of_statistics_are_joined_and_changed_together() -> None:
    first = TokenStats(*(torch.full((2,), float(n)) for n in range(5)))
    second = first.map(lambda part: part[:1] + 10)
    joined = TokenStats.concat([first, second])
    assert [part.tolist() for part in joined[:5]] == [[n, n, n + 10] for n in range(5)]
    assert joined.top_ids is None
    for one, same in zip(TokenStats.concat([first])[:5], first[:5], strict=True):
        assert torch.equal(one, same)
    assert TokenStats.measured() == (
        "logp", "entropy", "collision_rest", "collision_logp_rest", "top1"
    )  # fmt: skip
