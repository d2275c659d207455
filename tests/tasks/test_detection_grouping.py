"""Batches of one orientation, the same for any number of ranks, and nothing left out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slabformer.tasks.detection.grouping import AspectOrder

SIZES = [(48, 64) if index % 3 else (64, 48) for index in range(29)]  # 19 landscape, 10 portrait


def order_of(**changes: int) -> AspectOrder:
    return AspectOrder(SIZES, **{"batch_size": 4, "seed": 0, "rank": 0, "world_size": 1, **changes})


def batches_of(order: AspectOrder) -> list[list[int]]:
    return [batch.tolist() for batch in order.take()]


def test_a_batch_is_of_one_orientation_and_full() -> None:
    batches = batches_of(order_of())
    assert all(len({SIZES[index] for index in batch}) == 1 for batch in batches)
    assert {len(batch) for batch in batches} == {4}
    assert len(batches) == len(order_of()) == 5 + 3
    assert len({SIZES[batch[0]] for batch in batches[:5]}) == 2  # groups come mixed


def test_no_image_is_left_out_and_few_come_twice() -> None:
    counts = Counter(index for batch in batches_of(order_of()) for index in batch)
    assert set(counts) == set(range(29))
    assert sum(counts.values()) - 29 == 1 + 2


def test_ranks_share_the_same_global_batches() -> None:
    whole = batches_of(order_of())
    halves = [batches_of(order_of(batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize(("changes", "same"), [({}, True), ({"seed": 1}, False)], ids=["again", "seed"])
def test_the_order_follows_the_seed(changes: dict[str, int], same: bool) -> None:
    assert (batches_of(order_of()) == batches_of(order_of(**changes))) is same


def test_the_order_follows_the_epoch_and_starts_where_told() -> None:
    order = order_of()
    first = batches_of(order)
    order.epoch = 1
    assert batches_of(order) != first
    order.epoch, order.start = 0, 3
    assert batches_of(order) == first[3:]
    assert batches_of(order) == first  # once only


def test_one_image_of_a_kind_fills_a_batch_of_its_own() -> None:
    order = AspectOrder([(48, 64)] * 8 + [(64, 48)], batch_size=4, seed=0, rank=0, world_size=1)
    assert sorted(set(batch) for batch in batches_of(order) if 8 in batch) == [{8}]


@given(
    landscape=st.lists(st.booleans(), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_any_data_set_is_covered_by_full_batches_of_one_orientation(
    landscape: list[bool], batch_size: int, world_size: int, seed: int
) -> None:
    sizes = [(48, 64) if wide else (64, 48) for wide in landscape]
    ranks = [
        AspectOrder(sizes, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    taken = [batches_of(order) for order in ranks]
    assert {len(batches) for batches in taken} == {len(ranks[0])}
    for parts in zip(*taken, strict=True):
        assert {len(part) for part in parts} == {batch_size}
        assert len({sizes[index] for part in parts for index in part}) == 1
    assert {index for batches in taken for batch in batches for index in batch} == set(range(len(sizes)))
