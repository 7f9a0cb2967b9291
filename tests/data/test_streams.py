"""Batches of an iterable-style dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from holdfast.data import ResumableDataLoader
from holdfast.errors import StateMismatchError

COUNTS = {0: [11], 1: [11], 2: [11, 4], 3: [7, 2, 9]}  # uneven: some workers are exhausted long before the others
KINDS = ["Stream", "StatefulStream"]


def make(kit: SimpleNamespace, kind: str, workers: int, log: Path | None = None, **options: Any) -> ResumableDataLoader:
    """A loader."""
    dataset = getattr(kit, kind)(COUNTS[workers], log)
    return ResumableDataLoader(dataset, **{"batch_size": 2, "seed": 5, "num_workers": workers, **options})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", COUNTS)
def test_samples_come_as_from_pytorch_s_loader(kit: SimpleNamespace, workers: int, kind: str) -> None:
    """In the same order, turn by turn, with exhausted workers left out."""
    for options in ({}, {"drop_last": True}, {"batch_size": None}):
        plain = DataLoader(kit.Stream(COUNTS[workers]), **{"batch_size": 2, "num_workers": workers, **options})
        expected = [torch.as_tensor(batch)[..., 0].tolist() for batch in plain]
        found = [torch.as_tensor(batch)[..., 0].tolist() for batch in make(kit, kind, workers, **options)]
        assert found == expected


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", COUNTS)
def test_killed_anywhere(kit: SimpleNamespace, workers: int, kind: str, persistent: bool) -> None:
    """After every batch of an epoch, and once more two batches later; ids and augmentation, and the next epoch too."""
    options = {"persistent_workers": persistent and workers > 0}
    loader = make(kit, kind, workers, **options)
    whole = [kit.batches(loader) for _ in range(2)]
    assert whole[0] != whole[1]
    for stop in range(0, len(whole[0]) + 1, 3 if workers else 1):
        first = make(kit, kind, workers, **options)
        found = kit.batches(iter(first), stop)
        second = kit.resumed(make(kit, kind, workers, **options), first.state_dict())
        found += kit.batches(iter(second), 2)
        third = kit.resumed(make(kit, kind, workers, **options), second.state_dict())
        while third.epoch == 0:
            found += kit.batches(third)
        assert found == whole[0]
        assert kit.batches(third) == whole[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_state_no_skipped_sample_is_decoded(
    kit: SimpleNamespace, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The dataset goes on where its last consumed batch ended, though workers were ahead."""
    loader = make(kit, "StatefulStream", workers)
    kit.batches(iter(loader), 3)
    log = tmp_path / "decoded"
    left = kit.batches(kit.resumed(make(kit, "StatefulStream", workers, log), loader.state_dict()))
    assert sorted(map(int, log.read_text().split())) == sorted(kit.flat(kit.ids(left)))
    assert caplog.text == ""


def test_without_a_state_one_warning_says_what_is_loaded_again(
    kit: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """How many batches and samples."""
    loader = make(kit, "Stream", 2)
    kit.batches(iter(loader), 3)
    again = kit.resumed(make(kit, "Stream", 2), loader.state_dict())
    with caplog.at_level(logging.WARNING, "holdfast"):
        iter(again)
    assert [record.getMessage() for record in caplog.records] == [
        (
            "the dataset has no state: 3 batches (6 samples) of epoch 0 are loaded again and left out. Give it "
            "state_dict() and load_state_dict() to continue at once."
        )
    ]


def test_what_is_replayed_is_not_collated(kit: SimpleNamespace) -> None:
    """Samples that are left out are drawn from the dataset, and nothing else is done with them."""
    collated: list[int] = []

    def collate(samples: list[torch.Tensor]) -> torch.Tensor:
        collated.extend(int(sample[0]) for sample in samples)
        return torch.stack(samples)

    loader = make(kit, "Stream", 0, collate_fn=collate)
    kit.batches(iter(loader), 3)
    collated.clear()
    kit.batches(kit.resumed(make(kit, "Stream", 0, collate_fn=collate), loader.state_dict()))
    assert collated == [6, 7, 8, 9, 10]


def test_turns_go_on_with_the_worker_whose_turn_it_was(kit: SimpleNamespace) -> None:
    """PyTorch begins with the first worker; those before the one whose turn it is pass."""
    loader = make(kit, "StatefulStream", 3)
    found = kit.ids(kit.batches(iter(loader), 4))
    assert found == [[0, 1], [1000, 1001], [2000, 2001], [2, 3]]
    again = kit.resumed(make(kit, "StatefulStream", 3), loader.state_dict())
    assert kit.ids(kit.batches(again, 3)) == [[2002, 2003], [4, 5], [2004, 2005]]


def test_the_training_s_generators_are_untouched(kit: SimpleNamespace) -> None:
    """In this process too, a stream draws from generators of its own."""
    for workers in (0, 2):
        kit.seed_everything(3)
        expected = [kit.globals_drawn() for _ in range(3)]
        kit.seed_everything(3)
        iterator = iter(make(kit, "Stream", workers))
        found = []
        for _ in range(3):
            next(iterator)
            found.append(kit.globals_drawn())
        assert found == expected


def test_ranks_do_not_draw_alike(kit: SimpleNamespace) -> None:
    """Each rank has its own data, and its own augmentation."""
    found = [kit.batches(make(kit, "Stream", 0, rank=rank, world_size=2)) for rank in range(2)]
    assert kit.ids(found[0]) == kit.ids(found[1])
    assert found[0] != found[1]


class Iterating(IterableDataset[Any]):
    """Its iterator has the state."""

    def __iter__(self) -> Iterator[int]:
        return Place()


class Place:
    """An iterator with a state."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.next == 9:
            raise StopIteration
        self.next += 1
        return self.next

    def state_dict(self) -> dict[str, int]:
        """The next number."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.next = state["next"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_iterator_may_have_the_state(kit: SimpleNamespace, workers: int) -> None:
    """It is put back into the new iterator, and each epoch begins with a new one."""
    loader = ResumableDataLoader(Iterating(), 2, seed=5, num_workers=workers)
    found = kit.batches(iter(loader), 2)
    again = kit.resumed(ResumableDataLoader(Iterating(), 2, seed=5, num_workers=workers), loader.state_dict())
    assert found + kit.batches(again) == [[1, 2], [3, 4], [5, 6], [7, 8], [9]]
    assert kit.batches(again, 1) == [[1, 2]]


class Epochs(IterableDataset[Any]):
    """Counts its own epochs, and its finished state gives nothing until it is iterated anew."""

    def __init__(self) -> None:
        self.state = {"epoch": 0, "next": 0}

    def __iter__(self) -> Iterator[int]:
        is_loaded = self.state.pop("loaded", 0)
        if self.state["next"] == 4 and not is_loaded:
            self.state = {"epoch": self.state["epoch"] + 1, "next": 0}
        while self.state["next"] < 4:
            self.state["next"] += 1
            yield self.state["epoch"] * 10 + self.state["next"]

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go there."""
        self.state = {**state, "loaded": 1}


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "persistent"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_dataset_that_lives_on_keeps_its_state_over_epochs(
    kit: SimpleNamespace, options: dict[str, Any], stop: int
) -> None:
    """Killed in an epoch, at its last batch or after it: the next one is the dataset's next one."""
    loader = ResumableDataLoader(Epochs(), 2, seed=5, **options)
    assert kit.batches(loader) == [[1, 2], [3, 4]]
    between = loader.state_dict()
    assert kit.batches(kit.resumed(ResumableDataLoader(Epochs(), 2, seed=5, **options), between)) == [
        [11, 12],
        [13, 14],
    ]
    found = kit.batches(iter(loader), stop)
    again = kit.resumed(ResumableDataLoader(Epochs(), 2, seed=5, **options), loader.state_dict())
    found += kit.batches(again)
    assert found == [[11, 12], [13, 14]]
    assert kit.batches(again) == [[21, 22], [23, 24]]


def test_after_a_break_the_next_epoch_begins(kit: SimpleNamespace) -> None:
    """In the same process, and in one that resumes between the epochs."""
    loader = make(kit, "Stream", 2)
    whole = [kit.batches(loader) for _ in range(2)]
    loader = make(kit, "Stream", 2)
    kit.batches(loader, 3)
    loader.end_epoch()
    again = kit.resumed(make(kit, "Stream", 2), loader.state_dict())
    assert kit.batches(loader) == whole[1]
    assert kit.batches(again) == whole[1]


def test_length_is_the_dataset_s() -> None:
    """What PyTorch's loader would say; without one, its error."""

    class Sized(Iterating):
        def __len__(self) -> int:
            return 9

    assert len(ResumableDataLoader(Sized(), 2)) == 5
    assert len(ResumableDataLoader(Sized(), 2, drop_last=True)) == 4
    assert len(ResumableDataLoader(Sized(), None)) == 9
    with pytest.raises(TypeError):
        len(ResumableDataLoader(Iterating(), 2))


@pytest.mark.parametrize(
    ("options", "what"),
    [({"num_workers": 3}, "num_workers"), ({"batch_size": 3}, "batch_size"), ({"world_size": 2}, "world_size")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_shares_in_mid_epoch_are_refused(kit: SimpleNamespace, options: dict[str, int], what: str) -> None:
    """Who had what of the data cannot be dealt out anew; at the border of two epochs it need not be."""
    loader = ResumableDataLoader(kit.Stream([7, 2, 9]), 2, seed=5, num_workers=2)
    border = loader.state_dict()
    kit.batches(loader, 2)
    other = ResumableDataLoader(kit.Stream([7, 2, 9]), **{"batch_size": 2, "seed": 5, "num_workers": 2, **options})
    with pytest.raises(StateMismatchError, match=rf"{what} in mid-epoch: saved with \d, now \d.*set_epoch\(1\)"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(border)
    assert len(kit.batches(other)) > 0
