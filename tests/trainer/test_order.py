from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas.errors import UserError
from trainer.order import ViewOrder, global_batch, rank_slice

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw: Any) -> tuple[list[int], ViewOrder]:
    rows = draw(SHARDS)
    return rows, ViewOrder(rows, draw(SEEDS), draw(st.integers(1, 9)), draw(st.integers(1, 5)))


def _all_views(rows: list[int]) -> list[tuple[int, int]]:
    return [(shard, row) for shard, count in enumerate(rows) for row in range(count)]


@given(orders(), st.integers(0, 3))
def test_each_epoch_is_a_permutation_of_all_views(case: tuple[list[int], ViewOrder], epoch: int) -> None:
    rows, order = case
    views = order.take(epoch * len(order), len(order))
    assert len(order) == sum(rows)
    assert views.dtype == np.int64
    assert sorted(map(tuple, views.tolist())) == _all_views(rows)


@given(orders(), st.integers(0, 200), st.integers(0, 100))
def test_any_stretch_is_that_of_the_stream(case: tuple[list[int], ViewOrder], start: int, count: int) -> None:
    _, order = case
    stretch = order.take(start, count)
    assert stretch.shape == (count, 2)
    assert [order.at(start + i) for i in range(count)] == [tuple(view) for view in stretch.tolist()]


@given(orders(), st.integers(0, 20), st.integers(1, 5))
def test_one_two_and_four_ranks_see_the_same_batches(
    case: tuple[list[int], ViewOrder], step: int, quarter: int
) -> None:
    _, order = case
    batch_size = 4 * quarter
    batch = global_batch(order, step, batch_size)
    for world_size in (1, 2, 4):
        shares = [rank_slice(order, step, batch_size, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        np.testing.assert_array_equal(np.concatenate(shares), batch)


@given(SHARDS, SEEDS, st.integers(0, 20), st.integers(1, 16))
def test_resuming_anywhere_sees_what_was_to_come(
    rows: list[int], seed: int, step: int, batch_size: int
) -> None:
    undisturbed, resumed = ViewOrder(rows, seed, 4, 3), ViewOrder(rows, seed, 4, 3)
    for earlier in range(step):
        global_batch(undisturbed, earlier, batch_size)
    expected = global_batch(undisturbed, step, batch_size)
    np.testing.assert_array_equal(global_batch(resumed, step, batch_size), expected)


@given(SHARDS, SEEDS, st.integers(1, 9), st.integers(1, 5))
def test_a_window_reads_few_blocks_and_each_block_falls_in_one_window(
    rows: list[int], seed: int, block_rows: int, window_blocks: int
) -> None:
    order = ViewOrder(rows, seed, block_rows, window_blocks)
    sizes = {
        (shard, block): min(block_rows, count - block * block_rows)
        for shard, count in enumerate(rows)
        for block in range(-(-count // block_rows))
    }
    views = [(shard, row // block_rows) for shard, row in order.take(0, len(order)).tolist()]
    seen: set[tuple[int, int]] = set()
    while views:
        window: set[tuple[int, int]] = set()
        length = 0
        while length < len(views) and (views[length] in window or len(window) < window_blocks):
            window.add(views[length])
            length += 1
        length = sum(sizes[block] for block in window)  # a window ends when its blocks are used up
        assert set(views[:length]) == window
        assert not window & seen
        seen |= window
        views = views[length:]


@settings(max_examples=20)
@given(SEEDS)
def test_seeds_and_epochs_give_other_orders(seed: int) -> None:
    order = ViewOrder([100, 100], seed, 8, 4)
    first, second = order.take(0, 200), order.take(200, 200)
    assert (first != second).any()
    assert (first != ViewOrder([100, 100], seed + 1, 8, 4).take(0, 200)).any()


def test_rows_are_well_mixed() -> None:
    """Neighbours in the order are neighbours on disk about as seldom as chance within a window has it."""
    views = ViewOrder([4096], 0, 64, 16).take(0, 4096)
    adjacent = (np.abs(np.diff(views[:, 1])) == 1).mean()
    assert adjacent < 10 / 1024
    starts = [ViewOrder([4096], seed, 64, 16).at(0)[1] for seed in range(200)]
    assert np.mean(starts) == pytest.approx(2048, abs=4 * 4096 / np.sqrt(12 * 200))


def test_the_order_is_the_same_for_ever() -> None:
    """A checkpoint's position means the same views under any later version."""
    views = ViewOrder([300, 0, 77, 1024], seed=7, block_rows=32, window_blocks=4).take(1000, 2000)
    assert hashlib.sha256(views.astype("<i8").tobytes()).hexdigest()[:16] == "fa4b76b0c5a7d5f9"


def test_a_billion_views_are_never_listed() -> None:
    order = ViewOrder([10_000] * 100_000, seed=0, block_rows=10_000)
    assert len(order) == 1_000_000_000
    assert order.take(10**12 + 123, 1000).shape == (1000, 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rows_per_shard": []}, "rows_per_shard"),
        ({"rows_per_shard": [0, 0]}, "rows_per_shard"),
        ({"seed": -1}, "seed -1"),
        ({"block_rows": 0}, "block_rows 0"),
        ({"window_blocks": 0}, "window_blocks 0"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ViewOrder(**{"rows_per_shard": [3], "seed": 0} | arguments)


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 10 .* 4 ranks"):
        rank_slice(ViewOrder([30], 0), 0, 10, 0, 4)
