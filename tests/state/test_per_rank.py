"""What each rank keeps for itself: which entries, and how they are put together in one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from holdfast.data import ResumableDataLoader
from holdfast.errors import UnsupportedValueError
from holdfast.state.capture import CapturedEntry, CapturedTensor, capture
from holdfast.state.per_rank import PerRank, fold, per_rank_entries
from holdfast.state.sharding import Placement, Sharding


class StatefulDataLoader:
    """As torchdata calls it; known by its name."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"position": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (torch.Generator, True),
        (random.Random, True),
        (lambda: {"nested": [np.random.default_rng(1)]}, True),
        (StatefulDataLoader, True),
        (lambda: ResumableDataLoader(range(8), seed=1), True),
        (lambda: ResumableDataLoader(range(8), seed=1, rank=1, world_size=2), False),
        (lambda: PerRank([1, 2]), True),
        (lambda: {"inner": (PerRank(torch.ones(2)),)}, True),
        (lambda: torch.ones(2), False),
        (lambda: {"epochs": 3}, False),
    ],
)
def test_which_entries_are_kept_per_rank(make: Callable[[], Any], kept: bool) -> None:
    """Generators, places that differ from rank to rank, and what a user says."""
    assert per_rank_entries({"entry": make()}) == ({"_rng", "entry"} if kept else {"_rng"})


def test_gradients_are_kept_per_rank_where_parameters_are_whole() -> None:
    """Whether there are any by now or not: all ranks say the same."""
    assert per_rank_entries({"model": nn.Linear(2, 2)}) == {"_rng", "_gradients"}
    assert per_rank_entries({"model": nn.Linear(2, 2).requires_grad_(False)}) == {"_rng"}


@pytest.mark.parametrize("beside", [PerRank(1), torch.Generator()], ids=["PerRank", "generator"])
def test_a_module_is_never_kept_per_rank(beside: Any) -> None:
    """What stands beside it in an entry has to have one of its own."""
    with pytest.raises(UnsupportedValueError, match="an entry of its own") as raised:
        per_rank_entries({"all": {"model": nn.Linear(2, 2), "other": beside}})
    assert raised.value.key == "all.model"


def test_a_value_for_each_rank_is_captured_as_the_value() -> None:
    """One process saves nothing else than without it."""
    plain = {"a": [1, torch.ones(2)]}
    wrapped = {"a": [PerRank(1), PerRank(torch.ones(2))]}
    assert capture(wrapped)["a"].tree == capture(plain)["a"].tree


def test_nothing_for_each_rank_is_refused() -> None:
    """It could not be told from a value that cannot be saved."""
    with pytest.raises(UnsupportedValueError, match="leave it out"):
        capture({"a": PerRank(None)})


def test_folding_moves_entries_into_one() -> None:
    """The typed trees of this rank as bytes, its tensors beside them, ties as they were; the rest stays."""
    tensor = torch.arange(3.0)
    state = {"own": {"x": tensor, "y": tensor, "z": 1}, "model": torch.ones(2)}
    captured = capture(state)
    folded = fold(captured, {"own", "_rng"}, 3, 4)
    assert sorted(folded) == ["_ranks", "model"]
    assert folded["model"] is captured["model"]
    ranks = folded["_ranks"]
    assert ranks.tree == {"world_size": 4, "entries": ["_rng", "own"]}
    assert ranks.aliases == {"00003/own/y": "00003/own/x"}
    assert {name: item.name for name, item in ranks.tensors.items()} == {
        "00003": "00003",
        "00003/own/x": "00003/own/x",
    }
    assert ranks.tensors["00003/own/x"].value is captured["own"].tensors["x"].value
    trees = msgspec.json.decode(listing(ranks, 3))
    assert trees == {"_rng": captured["_rng"].tree, "own": captured["own"].tree}


def test_one_process_folds_nothing() -> None:
    """Its checkpoints are what they were."""
    captured = capture({"own": torch.Generator()})
    assert fold(captured, {"own", "_rng"}, 0, 1) == captured


def test_a_number_of_one_digit_more_changes_no_size() -> None:
    """The plan of a save is used again for the next one."""
    sizes = {
        fold(capture({"own": {"position": position}}), {"own", "_rng"}, 0, 2)["_ranks"].tensors["00000"].shape
        for position in (9, 10, 99_999)
    }
    assert len(sizes) == 1


def test_names_of_entries_with_points_stay_apart() -> None:
    """Entry a.b with tensor c, and entry a with tensor b.c."""
    captured = capture({"a": {"b": {"c": torch.ones(1)}}, "a.b": {"c": torch.zeros(1)}})
    tensors = fold(captured, {"a", "a.b"}, 0, 2)["_ranks"].tensors
    assert sorted(tensors) == ["00000", "00000/a.b/c", "00000/a/b.c"]


def test_a_part_of_a_tensor_is_not_kept_per_rank() -> None:
    """Restored into another number of ranks, it would be no tensor at all."""
    with pytest.raises(UnsupportedValueError, match="an entry of its own"):
        fold({"own": CapturedEntry({"x": {"$tensor": "x"}}, {"x": cut("x")}, {})}, {"own"}, 0, 2)


def test_gradients_are_parted() -> None:
    """Those that are cut stay with all ranks, those that are not go with this one."""
    whole = capture({"g": {"m.a": torch.ones(2)}})["g"]
    tree = {**whole.tree, "m.b": {"$tensor": "m.b"}}
    gradients = CapturedEntry(tree, {**whole.tensors, "m.b": cut("m.b")}, {})
    folded = fold({"_gradients": gradients}, {"_gradients"}, 0, 2)
    assert folded["_gradients"].tree == {"m.b": {"$tensor": "m.b"}}
    assert list(folded["_gradients"].tensors) == ["m.b"]
    assert msgspec.json.decode(listing(folded["_ranks"], 0)) == {"_gradients": whole.tree}


def listing(entry: CapturedEntry, rank: int) -> bytes:
    """The typed trees of a rank."""
    value = entry.tensors[f"{rank:05d}"].value
    assert isinstance(value, np.ndarray)
    return value.tobytes()


def cut(name: str) -> CapturedTensor:
    """A tensor of which two ranks have one half each."""
    sharding = Sharding((4,), (2,), (0, 1), (Placement(0),))
    return CapturedTensor(name, "float32", (4,), "contiguous", "cpu", torch.ones(2), sharding=sharding)
