"""Batches of a map-style dataset, again and again the same."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, get_worker_info

from holdfast.data import ResumableDataLoader

WORKERS = [0, 1, 2, 3]


@pytest.fixture
def whole(kit: SimpleNamespace) -> list[Any]:
    """Two epochs, uninterrupted, loaded in one process."""
    loader = ResumableDataLoader(kit.Pictures(23), 4, shuffle=True, seed=5)
    return [kit.batches(loader), kit.batches(loader)]


@pytest.mark.parametrize("workers", WORKERS)
def test_any_number_of_workers_gives_the_same_batches(kit: SimpleNamespace, whole: list[Any], workers: int) -> None:
    """Ids and augmentation; and no epoch is like another."""
    loader = ResumableDataLoader(kit.Pictures(23), 4, shuffle=True, seed=5, num_workers=workers)
    assert [kit.batches(loader), kit.batches(loader)] == whole
    assert sorted(kit.flat(kit.ids(whole[0]))) == list(range(23))
    assert kit.ids(whole[0]) != kit.ids(whole[1])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("stops", [(0, 3), (1, 4), (2, 6), (5, 6)])
def test_killed_twice_in_an_epoch(kit: SimpleNamespace, whole: list[Any], workers: int, stops: tuple[int, int]) -> None:
    """Three processes, with other numbers of workers each, give together what one gives."""
    found: list[Any] = []
    state = None
    for number, until in enumerate((*stops, None)):
        loader = ResumableDataLoader(kit.Pictures(23), 4, shuffle=True, seed=5, num_workers=(workers + number) % 3)
        if state is not None:
            kit.resumed(loader, state)
        iterator = iter(loader)
        found += kit.batches(iterator, None if until is None else until - len(found))
        state = loader.state_dict()
    assert found == whole[0]
    assert kit.batches(loader) == whole[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_skipped_sample_is_decoded(kit: SimpleNamespace, tmp_path: Path, workers: int) -> None:
    """The resumed process decodes what is left of the epoch, once."""
    loader = ResumableDataLoader(kit.Pictures(24), 4, shuffle=True, seed=5, num_workers=workers)
    kit.batches(iter(loader), 4)
    log = tmp_path / "decoded"
    again = ResumableDataLoader(kit.Pictures(24, log), 4, shuffle=True, seed=5, num_workers=workers)
    left = kit.batches(kit.resumed(again, loader.state_dict()))
    assert sorted(map(int, log.read_text().split())) == sorted(kit.flat(kit.ids(left)))
    assert len(left) == 2


def test_what_was_prefetched_is_not_consumed(kit: SimpleNamespace) -> None:
    """The place is that of the batch that was handed out, though workers are far ahead."""
    loader = ResumableDataLoader(kit.Pictures(40), 2, seed=5, num_workers=2, prefetch_factor=4)
    iterator = iter(loader)
    next(iterator)
    assert (loader.state_dict()["position"], loader.state_dict()["samples"], loader.served) == (1, 2, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_s_generators_are_untouched(kit: SimpleNamespace, workers: int) -> None:
    """Iterating draws nothing: not when the iterator is made, not when samples are loaded in this very process."""
    loader = ResumableDataLoader(kit.Pictures(12), 4, shuffle=True, seed=5, num_workers=workers)
    kit.seed_everything(3)
    np.random.standard_normal()  # leaves a second one in the generator, for later
    expected = [kit.globals_drawn() for _ in range(4)]
    kit.seed_everything(3)
    np.random.standard_normal()
    found = [kit.globals_drawn() for _ in loader]
    found.append(kit.globals_drawn())
    assert found == expected
    assert torch.initial_seed() == 3


def test_the_training_s_draws_do_not_change_the_data(kit: SimpleNamespace, whole: list[Any]) -> None:
    """Order and augmentation come from the loader's seed."""
    loader = ResumableDataLoader(kit.Pictures(23), 4, shuffle=True, seed=5)
    found = []
    for batch in loader:
        kit.globals_drawn()
        found.append(batch.tolist())
    assert found == whole[0]


def test_a_failing_sample_leaves_generators_and_place_right(kit: SimpleNamespace) -> None:
    """An error in a dataset takes the place of its batch, as in PyTorch's loader; the next one still counts rightly."""

    class Broken(kit.Pictures):  # type: ignore[misc, name-defined]  # a class from a fixture
        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise OSError("unreadable")
            return super().__getitem__(index)

    for workers in (0, 2):
        loader = ResumableDataLoader(Broken(12), 4, seed=5, num_workers=workers)
        kit.seed_everything(3)
        iterator = iter(loader)
        next(iterator)
        with pytest.raises(OSError, match="unreadable"):
            next(iterator)
        assert (loader.position, torch.initial_seed()) == (1, 3)
        assert kit.ids([next(iterator)]) == [[8, 9, 10, 11]]
        assert loader.position == 3
        assert kit.batches(iterator) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_collating_may_draw(kit: SimpleNamespace, workers: int) -> None:
    """A collator that masks at random, as for masked language models, masks the same after a resume."""

    def mask(samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples) + torch.rand(()) + random.random() + np.random.rand()

    def make() -> ResumableDataLoader:
        return ResumableDataLoader(kit.Pictures(16), 4, seed=5, num_workers=workers, collate_fn=mask)

    whole = kit.batches(ResumableDataLoader(kit.Pictures(16), 4, seed=5, collate_fn=mask))
    first = make()
    found = kit.batches(iter(first), 2)
    assert found + kit.batches(kit.resumed(make(), first.state_dict())) == whole


def test_collating_does_not_depend_on_what_a_dataset_has_cached(kit: SimpleNamespace) -> None:
    """A dataset that draws only when it has not loaded a sample before leaves the generators in either state."""

    class Caching(kit.Pictures):  # type: ignore[misc, name-defined]  # a class from a fixture
        def __init__(self, count: int, cached: bool) -> None:
            super().__init__(count)
            self.cached = cached

        def __getitem__(self, index: int) -> int:
            if not self.cached:
                kit.globals_drawn()
            return index

    def mask(samples: list[int]) -> list[float]:
        return [sum(kit.globals_drawn()) + sample for sample in samples]

    fresh, cached = (ResumableDataLoader(Caching(4, cached), 2, seed=5, collate_fn=mask) for cached in (False, True))
    assert list(fresh) == list(cached)


def test_samples_without_batches(kit: SimpleNamespace) -> None:
    """``batch_size=None`` gives samples; each is a batch of the position."""
    whole = kit.batches(ResumableDataLoader(kit.Pictures(6), None, shuffle=True, seed=5))
    loader = ResumableDataLoader(kit.Pictures(6), None, shuffle=True, seed=5)
    assert sorted(int(row[0]) for row in whole) == list(range(6))
    assert len(loader) == 6
    found = kit.batches(iter(loader), 4)
    again = ResumableDataLoader(kit.Pictures(6), None, shuffle=True, seed=5, num_workers=1)
    assert found + kit.batches(kit.resumed(again, loader.state_dict())) == whole


class AtOnce:
    """Loads whole batches."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __len__(self) -> int:
        return 6

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.calls.append(indices)
        return [torch.tensor([index, torch.rand(())]) for index in indices]


def test_a_dataset_that_loads_batches_is_asked_for_batches(kit: SimpleNamespace) -> None:
    """One call a batch; and the same numbers after a resume."""
    dataset = AtOnce()
    loader = ResumableDataLoader(dataset, 2, seed=5)
    whole = kit.batches(loader)
    assert dataset.calls == [[0, 1], [2, 3], [4, 5]]
    found = kit.batches(iter(first := ResumableDataLoader(AtOnce(), 2, seed=5)), 1)
    assert found + kit.batches(kit.resumed(ResumableDataLoader(AtOnce(), 2, seed=5), first.state_dict())) == whole
    assert whole != kit.batches(loader)


def test_a_subset_is_asked_as_what_it_is_a_subset_of(kit: SimpleNamespace) -> None:
    """Every Subset can load batches; one of a plain dataset is seeded for each sample, whatever batch it is in."""
    plain = Subset(Subset(kit.Pictures(9), range(8)), range(6))
    in_twos = kit.flat(kit.batches(ResumableDataLoader(plain, 2, seed=5)))
    in_threes = kit.flat(kit.batches(ResumableDataLoader(plain, 3, seed=5)))
    assert in_twos == in_threes
    dataset = AtOnce()
    kit.batches(ResumableDataLoader(Subset(dataset, [4, 5, 0]), 2, seed=5))
    assert dataset.calls == [[4, 5], [0]]


def test_drop_last(kit: SimpleNamespace) -> None:
    """The last batch, not filled, is left out, as PyTorch leaves it out."""
    for drop_last in (False, True):
        loader = ResumableDataLoader(kit.Pictures(10), 4, drop_last=drop_last)
        plain = DataLoader(kit.Pictures(10), 4, drop_last=drop_last)
        assert kit.ids(kit.batches(loader)) == kit.ids(kit.batches(plain))
        assert len(loader) == len(plain)


def test_persistent_workers_live_through_epochs_and_restores(kit: SimpleNamespace, whole: list[Any]) -> None:
    """The processes stay the same ones; each batch tells them where it belongs."""
    loader = ResumableDataLoader(kit.Pictures(23), 4, shuffle=True, seed=5, num_workers=2, persistent_workers=True)
    begin = loader.state_dict()
    assert kit.batches(loader) == whole[0]
    workers = {child.pid for child in torch.multiprocessing.active_children()}
    found = kit.batches(iter(loader), 3)
    in_the_middle = loader.state_dict()
    loader.load_state_dict(begin)
    assert kit.batches(loader) == whole[0]
    loader.load_state_dict(in_the_middle)
    assert found + kit.batches(loader) == whole[1]
    assert {child.pid for child in torch.multiprocessing.active_children()} == workers


def test_without_a_seed_the_last_manual_seed_counts(kit: SimpleNamespace) -> None:
    """``torch.manual_seed`` decides, and nothing is drawn to find out."""
    torch.manual_seed(77)
    torch.rand(3)
    implied = kit.batches(ResumableDataLoader(kit.Pictures(8), 2, shuffle=True))
    assert implied == kit.batches(ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=77))


class Sharded:
    """Tells whether it finds itself where PyTorch's documentation says."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        info = get_worker_info()
        assert info is not None
        return int(info.dataset is self) * 10 + info.num_workers


def test_workers_find_the_user_s_dataset() -> None:
    """``get_worker_info().dataset`` is it, for a ``worker_init_fn`` to shard; the wrapper does not show."""

    def init(worker: int) -> None:
        info = get_worker_info()
        assert info is not None
        assert isinstance(info.dataset, Sharded)

    loader = ResumableDataLoader(Sharded(), 2, num_workers=2, worker_init_fn=init)
    assert [batch.tolist() for batch in loader] == [[12, 12], [12, 12]]


def test_samples_are_what_plain_pytorch_collates() -> None:
    """Dictionaries, tuples and arrays come out as from PyTorch's loader."""
    samples = [{"image": np.full(2, index), "label": (index, str(index))} for index in range(5)]
    assert str(list(ResumableDataLoader(samples, 2))) == str(list(DataLoader(samples, 2)))
    assert str(list(ResumableDataLoader(samples, None))) == str(list(DataLoader(samples, None)))
    assert list(ResumableDataLoader([], 2)) == []


def test_whether_ranks_share_its_state() -> None:
    """Where they deal out the samples of one order; not where each has data of its own."""
    assert ResumableDataLoader(range(8), seed=1, rank=1, world_size=2).shared
    assert not ResumableDataLoader(range(8), seed=1).shared
    assert not ResumableDataLoader(range(8), sampler=[1, 2]).shared
