"""When an epoch begins and ends, and which iterator counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast.data import ResumableDataLoader
from holdfast.errors import UsageError


@pytest.fixture
def make(kit: SimpleNamespace) -> Any:
    """Makes loaders of four batches."""
    return lambda: ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=5)


@pytest.fixture
def epochs(make: Any, kit: SimpleNamespace) -> list[Any]:
    """Three epochs, uninterrupted."""
    loader = make()
    return [kit.batches(loader) for _ in range(3)]


def place(loader: ResumableDataLoader) -> tuple[int, int]:
    """Epoch and position."""
    return loader.epoch, loader.position


def test_exhaustion_begins_the_next_epoch(make: Any) -> None:
    """Once the loop has learned that there is no more; until then it is the end of the old epoch."""
    loader = make()
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    assert place(loader) == (0, 4)
    assert next(iterator, None) is None
    assert place(loader) == (1, 0)
    assert next(iterator, None) is None
    assert place(loader) == (1, 0)


def test_a_state_of_the_last_batch_gives_an_empty_iteration(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """The resumed loop does what was left to do of the epoch: nothing, and its end."""
    loader = make()
    iterator = iter(loader)
    kit.batches(iterator, 4)
    again = kit.resumed(make(), loader.state_dict())
    assert (place(again), kit.batches(again), place(again)) == ((0, 4), [], (1, 0))
    assert kit.batches(again) == epochs[1]


def test_no_workers_for_an_epoch_that_has_nothing_left(kit: SimpleNamespace) -> None:
    """The empty iteration starts no process."""
    loader = ResumableDataLoader(kit.Pictures(4), 2, num_workers=2)
    state = loader.state_dict() | {"position": 2, "samples": 4, "digest": "in order"}
    iterator = iter(kit.resumed(loader, state))
    assert torch.multiprocessing.active_children() == []
    assert kit.batches(iterator) == []


def test_after_a_break_the_next_iteration_is_the_next_epoch(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """In the same process, as with any shuffling loader."""
    loader = make()
    assert kit.batches(loader, 2) == epochs[0][:2]
    assert place(loader) == (0, 2)
    assert kit.batches(loader) == epochs[1]


def test_after_a_break_another_process_goes_on(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """The state says where the loop stopped: whether that was a break or a kill, nobody knows."""
    loader = make()
    kit.batches(loader, 2)
    assert kit.batches(kit.resumed(make(), loader.state_dict())) == epochs[0][2:]


def test_end_epoch_after_a_break(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """A loop that told that the epoch is over does not come back to it."""
    loader = make()
    kit.batches(loader, 2)
    loader.end_epoch()
    assert place(loader) == (1, 0)
    assert kit.batches(kit.resumed(make(), loader.state_dict())) == epochs[1]


def test_end_epoch_at_a_border_does_nothing(make: Any, kit: SimpleNamespace) -> None:
    """It is over already, or was never begun."""
    loader = make()
    loader.end_epoch()
    assert place(loader) == (0, 0)
    kit.batches(loader)
    loader.end_epoch()
    assert place(loader) == (1, 0)


def test_end_epoch_leaves_a_loader_alone_that_is_drawn_from_on_the_side(make: Any) -> None:
    """Its iterator is alive: the epochs that end are another loader's."""
    loader = make()
    iterator = iter(loader)
    next(iterator)
    loader.end_epoch()
    assert place(loader) == (0, 1)
    next(iterator)
    assert place(loader) == (0, 2)


def test_end_epoch_after_a_restore_that_was_not_iterated(make: Any, kit: SimpleNamespace) -> None:
    """As in the process that was saved, where the iterator was gone."""
    loader = make()
    kit.batches(loader, 2)
    again = kit.resumed(make(), loader.state_dict())
    again.end_epoch()
    assert place(again) == (1, 0)


def test_set_epoch_keeps_the_place_in_its_epoch(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """The loop of every tutorial may say it at the top, resumed or not."""
    loader = make()
    for _ in range(2):
        loader.set_epoch(loader.epoch)
        kit.batches(loader)
    kit.batches(loader, 1)
    again = kit.resumed(make(), loader.state_dict())
    again.set_epoch(2)
    assert place(again) == (2, 1)
    assert kit.batches(again) == epochs[2][1:]


def test_set_epoch_goes_to_the_beginning_of_another(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """Forward or back."""
    loader = make()
    kit.batches(loader, 2)
    loader.set_epoch(2)
    assert place(loader) == (2, 0)
    assert kit.batches(loader) == epochs[2]
    loader.set_epoch(1)
    assert kit.batches(loader) == epochs[1]


def test_of_two_iterators_the_newer_counts(make: Any, kit: SimpleNamespace, epochs: list[Any]) -> None:
    """The older one says so, instead of giving batches that nobody counts."""
    loader = make()
    older = iter(loader)
    next(older)
    newer = iter(loader)
    with pytest.raises(UsageError, match=r"the loader was iterated again.*make two loaders"):
        next(older)
    assert kit.batches(newer) == epochs[1]


@pytest.mark.parametrize(
    ("go", "why"),
    [
        (lambda loader: loader.load_state_dict(loader.state_dict()), "the loader was restored"),
        (lambda loader: loader.set_epoch(7), r"set_epoch\(7\) was called"),
    ],
    ids=["load_state_dict", "set_epoch"],
)
def test_an_iterator_ends_when_its_loader_goes_elsewhere(make: Any, go: Any, why: str) -> None:
    """It belongs to where the loader was."""
    loader = make()
    iterator = iter(loader)
    next(iterator)
    go(loader)
    with pytest.raises(UsageError, match=why):
        next(iterator)


def test_position_served_and_length(make: Any, kit: SimpleNamespace) -> None:
    """The position is the epoch's, what was served the process's, and the length a whole epoch's."""
    loader = make()
    kit.batches(loader)
    kit.batches(loader, 3)
    assert (loader.position, loader.served, len(loader)) == (3, 7, 4)
    again = kit.resumed(make(), loader.state_dict())
    assert (again.position, again.served, len(again)) == (3, 0, 4)
    assert [number for number, _ in enumerate(again, start=again.position)] == [3]
    assert again.served == 1


@pytest.fixture
def waiting(make: Any) -> ResumableDataLoader:
    """A loader whose epochs end when the loop says so, at the end of its first one."""
    loader: ResumableDataLoader = make()
    loader.wait_for_end_epoch()
    list(loader)
    return loader


def test_the_end_of_an_epoch_can_wait(waiting: ResumableDataLoader, make: Any, kit: SimpleNamespace) -> None:
    """What comes after the last batch belongs to its epoch, and whoever resumes there gets no batch of it again."""
    again = kit.resumed(make(), waiting.state_dict())
    assert (place(waiting), place(again), kit.batches(again)) == ((0, 4), (0, 4), [])


def test_it_waits_for_the_end_of_the_epoch(waiting: ResumableDataLoader, kit: SimpleNamespace, epochs: Any) -> None:
    """With ``end_epoch()`` the next one is reached, once."""
    waiting.end_epoch()
    waiting.end_epoch()
    assert (place(waiting), kit.batches(waiting)) == ((1, 0), epochs[1])


def test_or_for_the_next_iteration(waiting: ResumableDataLoader, kit: SimpleNamespace, epochs: Any) -> None:
    """A loop that tells of no epochs goes through them all the same."""
    assert [kit.batches(waiting) for _ in range(2)] == epochs[1:]
    assert place(waiting) == (2, 4)


def test_an_epoch_without_batches_can_wait_too() -> None:
    """Whatever there is to be iterated."""
    loader = ResumableDataLoader([], 2)
    loader.wait_for_end_epoch()
    assert (list(loader), place(loader)) == ([], (0, 0))
    loader.end_epoch()
    assert place(loader) == (1, 0)


def test_an_epoch_resumed_at_its_end_can_wait_too(
    waiting: ResumableDataLoader, make: Any, kit: SimpleNamespace, epochs: Any
) -> None:
    """After the empty iteration it waits as it did before."""
    again = kit.resumed(make(), waiting.state_dict())
    again.wait_for_end_epoch()
    list(again)
    assert place(again) == (0, 4)
    again.end_epoch()
    assert (place(again), kit.batches(again)) == ((1, 0), epochs[1])
