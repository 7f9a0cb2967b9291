"""What a loader refuses: arguments that exclude each other, and states that are not its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler
from torch.utils.data.datapipes.iter import IterableWrapper

from holdfast.data import ResumableDataLoader
from holdfast.errors import StateMismatchError, UsageError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sampler and shuffle": ({"sampler": [1], "shuffle": True}, "leave shuffle out"),
    "sampler and ranks": ({"sampler": [1], "seed": 1, "world_size": 2}, "Give the ranks to it"),
    "batch sampler and batch size": ({"batch_sampler": [[1]], "batch_size": 2}, "it says how batches are made"),
    "batch sampler and drop_last": ({"batch_sampler": [[1]], "drop_last": True}, "it says how batches are made"),
    "no batches to drop": ({"batch_size": None, "drop_last": True}, "no batches to drop"),
    "empty batches": ({"batch_size": 0}, "expected a positive number or None, found 0"),
    "ranks without a seed": ({"world_size": 2}, "one seed for all"),
    "no such rank": ({"seed": 1, "world_size": 2, "rank": 2}, "one of the 2 ranks"),
    "no integer": ({"seed": "x"}, "expected an integer, found 'x'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_exclude_each_other(arguments: dict[str, Any], message: str) -> None:
    """Each is named, with the way out."""
    with pytest.raises(UsageError, match=message):
        ResumableDataLoader([1, 2, 3], **arguments)


@pytest.mark.parametrize("name", ["shuffle", "sampler", "batch_sampler"])
def test_a_stream_has_its_own_order(kit: SimpleNamespace, name: str) -> None:
    """As in PyTorch."""
    with pytest.raises(UsageError, match=f"leave {name} out"):
        ResumableDataLoader(kit.Stream([3]), **{name: [True]})


@pytest.mark.filterwarnings("ignore")
def test_data_pipes_are_refused() -> None:
    """PyTorch's loader shards them by itself."""
    with pytest.raises(UsageError, match="data pipe"):
        ResumableDataLoader(IterableWrapper([1, 2]))


def test_batches_out_of_order_cannot_be_asked_for() -> None:
    """They would come as fast as they can, and never twice alike."""
    with pytest.raises(TypeError, match="in_order"):
        ResumableDataLoader([1], in_order=False)  # type: ignore[call-arg]


@pytest.fixture
def state(kit: SimpleNamespace) -> dict[str, Any]:
    """Of the middle of an epoch."""
    loader = ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=5)
    kit.batches(loader, 2)
    return loader.state_dict()


MISMATCHES: dict[str, tuple[Any, str]] = {
    "other data": (lambda kit: ResumableDataLoader(kit.Pictures(9), 2), "saved with 8 samples, now 9 in mid-epoch"),
    "another kind": (lambda kit: ResumableDataLoader(kit.Stream([8]), 2), "saved with a map one, now a iterable one"),
    "a sampler": (
        lambda kit: ResumableDataLoader(kit.Pictures(8), 2, sampler=range(8)),
        "its own order, now its sampler",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_what_does_not_fit_is_refused(kit: SimpleNamespace, state: dict[str, Any], make: Any, message: str) -> None:
    """Expected, found, and the way out; the loader stays as it was."""
    loader = make(kit)
    before = loader.state_dict()
    with pytest.raises(StateMismatchError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


def test_shuffling_switched_off_is_found(kit: SimpleNamespace, state: dict[str, Any]) -> None:
    """When the order is made again; as it would be when PyTorch shuffled differently."""
    loader = kit.resumed(ResumableDataLoader(kit.Pictures(8), 2), state)
    with pytest.raises(StateMismatchError, match="now shuffle=False"):
        iter(loader)


def test_at_a_border_the_data_may_change(kit: SimpleNamespace) -> None:
    """Another length, another order: the next epoch is a new one."""
    loader = ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=5)
    kit.batches(loader)
    state = loader.state_dict()
    for other in (ResumableDataLoader(kit.Pictures(9), 3), ResumableDataLoader(kit.Pictures(9), 3, sampler=range(9))):
        assert len(kit.batches(kit.resumed(other, state))) == 3
        assert other.epoch == 2


def test_the_saved_seed_counts(kit: SimpleNamespace, state: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A warning says so when another one was given."""
    whole = kit.batches(ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=5))
    for seed in (None, 5, 6):
        again = kit.resumed(ResumableDataLoader(kit.Pictures(8), 2, shuffle=True, seed=seed), state)
        assert kit.batches(again) == whole[2:]
    assert [record.getMessage() for record in caplog.records] == [
        "the loader goes on with the seed it was saved with, 5, not with seed=6."
    ]


@pytest.mark.parametrize("state", [{}, {"position": 1}, {"version": "1"}, {"version": 1, "kind": "map", "seed": None}])
def test_states_of_something_else(state: dict[str, Any]) -> None:
    """What is missing or of another kind is named."""
    with pytest.raises(StateMismatchError, match="expected the state of a ResumableDataLoader, found"):
        ResumableDataLoader([1]).load_state_dict(state)


def test_states_from_the_future(state: dict[str, Any]) -> None:
    """Are not guessed at."""
    with pytest.raises(StateMismatchError, match="has version 2, and this Holdfast reads up to 1"):
        ResumableDataLoader([1]).load_state_dict({**state, "version": 2})


def test_samplers_with_other_generators(kit: SimpleNamespace) -> None:
    """A state of a sampler with a generator does not fit one without."""
    own = RandomSampler(range(8), generator=torch.Generator())
    saved = ResumableDataLoader(kit.Pictures(8), 2, sampler=own).state_dict()
    with pytest.raises(StateMismatchError, match=r"sampler.generator, now none"):
        ResumableDataLoader(kit.Pictures(8), 2, sampler=RandomSampler(range(8))).load_state_dict(saved)
