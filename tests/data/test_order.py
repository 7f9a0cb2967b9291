"""The loader's own order: over epochs, ranks, and interruptions."""

from __future__ import annotations

import logging
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.data import ResumableDataLoader


def ranks_of(kit: SimpleNamespace, count: int, world_size: int, state: Any = None, **options: Any) -> list[Any]:
    """The loaders of all ranks, at the place of a state."""
    loaders = [
        ResumableDataLoader(kit.Pictures(count), seed=5, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return [loader if state is None else kit.resumed(loader, state) for loader in loaders]


def together(kit: SimpleNamespace, found: list[list[Any]]) -> list[Any]:
    """The samples of all ranks, in the order of the epoch: rank after rank, sample after sample."""
    dealt = [kit.flat(batches) for batches in found]
    return [sample for samples in zip_longest(*dealt) for sample in samples if sample is not None]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_order_of_one(kit: SimpleNamespace, shuffle: bool) -> None:
    """Dealt out like cards, each sample with its augmentation."""
    whole = together(kit, [kit.batches(loader) for loader in ranks_of(kit, 12, 1, batch_size=4, shuffle=shuffle)])
    for world_size in (2, 3):
        found = [kit.batches(loader) for loader in ranks_of(kit, 12, world_size, batch_size=2, shuffle=shuffle)]
        assert together(kit, found) == whole


def test_ranks_that_do_not_divide_the_data_are_filled_from_its_beginning(kit: SimpleNamespace) -> None:
    """As by DistributedSampler: all ranks have as many batches, or some would wait for ever; or the rest is dropped."""
    found = [kit.ids(kit.batches(loader)) for loader in ranks_of(kit, 7, 3, batch_size=2)]
    assert found == [[[0, 3], [6]], [[1, 4], [0]], [[2, 5], [1]]]
    assert [kit.ids(kit.batches(loader)) for loader in ranks_of(kit, 2, 5, batch_size=2)] == [
        [[0]],
        [[1]],
        [[0]],
        [[1]],
        [[0]],
    ]
    dropped = ranks_of(kit, 8, 3, batch_size=2, drop_last=True)
    assert [kit.ids(kit.batches(loader)) for loader in dropped] == [[[0, 3]], [[1, 4]], [[2, 5]]]
    assert [len(loader) for loader in dropped] == [1, 1, 1]


def test_another_world_size_continues_exactly(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """With as many samples in the batches of all ranks together, nothing changes but who loads what."""
    whole = together(kit, [kit.batches(loader) for loader in ranks_of(kit, 24, 1, batch_size=4, shuffle=True)])
    first = ranks_of(kit, 24, 2, batch_size=2, shuffle=True)
    begun = together(kit, [kit.batches(iter(loader), 3) for loader in first])
    with caplog.at_level(logging.WARNING, "holdfast"):
        second = ranks_of(kit, 24, 4, first[0].state_dict(), batch_size=1, shuffle=True)
    assert [loader.position for loader in second] == [3] * 4
    assert begun + together(kit, [kit.batches(loader) for loader in second]) == whole
    assert "batch_size=2 on 2 ranks and goes on with batch_size=1 on 4" in caplog.text
    assert "no sample is repeated or left out." in caplog.text


def test_another_batch_size_continues_at_the_sample(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """No sample twice, none left out; a warning says that batches are not those of an uninterrupted epoch."""
    loader = ResumableDataLoader(kit.Pictures(12), 3, seed=5)
    found = kit.batches(iter(loader), 1)
    again = kit.resumed(ResumableDataLoader(kit.Pictures(12), 4, seed=5), loader.state_dict())
    assert again.position == 1
    found += kit.batches(again)
    assert kit.ids(found) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [11]]
    assert "but 4 samples at a time do not end there" in caplog.text


@given(
    count=st.integers(0, 30),
    batch_size=st.integers(1, 7),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    world_sizes=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
    stops=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_pieces_equal_the_whole(
    kit: SimpleNamespace,
    count: int,
    batch_size: int,
    drop_last: bool,
    shuffle: bool,
    world_sizes: list[int],
    stops: list[int],
) -> None:
    """However often it is interrupted: two epochs in pieces are two epochs, on every rank."""
    world_size = world_sizes[0]
    options = {"batch_size": batch_size, "drop_last": drop_last, "shuffle": shuffle}
    for rank in range(world_size):
        loader = ranks_of(kit, count, world_size, **options)[rank]
        whole = [kit.batches(loader), kit.batches(loader)]
        assert {len(batches) for batches in whole} == {len(loader)}
        state = None
        found: list[list[Any]] = [[], [], []]
        for stop in [*stops, None, None]:
            loader = ranks_of(kit, count, world_size, state, **options)[rank]
            epoch = loader.epoch
            found[epoch] += kit.batches(iter(loader), stop)
            state = loader.state_dict()
            if loader.epoch == 2:
                break
        assert found[: loader.epoch] == whole[: loader.epoch]
        assert loader.epoch >= 1
