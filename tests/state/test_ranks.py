"""What each rank kept for itself comes back to it; and what becomes of it when there are more or fewer ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.checkpoint import Checkpoint
from holdfast.data import ResumableDataLoader
from holdfast.errors import CorruptCheckpointError, StateMismatchError, UsageError
from holdfast.saving import About, write
from holdfast.state.capture import CapturedEntry, CapturedTensor, capture
from holdfast.state.per_rank import PerRank, fold, per_rank_entries
from holdfast.storage.local import LocalStore

WORLD_SIZE = 3
Folded = Mapping[str, CapturedEntry]


def made(rank: int) -> dict[str, Any]:
    """The state of a rank: a model that all share, and what it keeps for itself."""
    return {
        "model": nn.Linear(2, 2, bias=False),
        "generator": torch.Generator().manual_seed(rank),
        "buffer": {"seen": PerRank(torch.full((2,), float(rank))), "note": PerRank(f"rank {rank}")},
    }


def saved_by_ranks(path: Path, states: list[dict[str, Any]], change: Callable[[Folded], object] | None = None) -> None:
    """A checkpoint as several ranks write it together, put together here by one."""
    together: dict[str, CapturedEntry] = {}
    for rank, state in enumerate(states):
        torch.manual_seed(100 + rank)
        random.seed(rank)
        np.random.seed(rank)
        folded = fold(capture(state), per_rank_entries(state), rank, len(states))
        if together:
            together["_ranks"].tensors.update(folded["_ranks"].tensors)
            together["_ranks"].aliases.update(folded["_ranks"].aliases)
        else:
            together = folded
    if change is not None:
        change(together)
    write(LocalStore(str(path.parent)), together, About(step=7), [path.name])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What three ranks saved."""
    saved_by_ranks(tmp_path / "x", [made(rank) for rank in range(WORLD_SIZE)])
    return tmp_path / "x"


def buffer_of(state: dict[str, Any]) -> tuple[list[float], str]:
    """What is kept per rank and is no generator."""
    return state["buffer"]["seen"].value.tolist(), state["buffer"]["note"].value


def fresh() -> dict[str, Any]:
    """A state that was not restored yet."""
    return made(50)


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_each_rank_gets_what_it_had(saved: Path, rank: int) -> None:
    """Its generators, the global ones too, its tensors and its values, into the live objects."""
    state = fresh()
    tensor = state["buffer"]["seen"].value
    report = holdfast.restore(saved, state, rank=rank, world_size=WORLD_SIZE)
    assert not report.differs
    assert (report.skipped, report.notes) == ((), ())
    assert buffer_of(state) == ([rank, rank], f"rank {rank}")
    assert state["buffer"]["seen"].value is tensor
    assert state["generator"].initial_seed() == rank
    assert torch.initial_seed() == 100 + rank
    assert random.random() == random.Random(rank).random()
    assert np.random.random() == np.random.RandomState(rank).random_sample()


def test_only_this_ranks_bytes_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others there are."""
    reads: list[tuple[int, int]] = []
    original = Checkpoint.read_files

    def noted(self: Checkpoint, wanted: Mapping[str, Any], **options: Any) -> None:
        assert not options.get("whole")
        reads.extend((read.begin, read.begin + read.nbytes) for read in wanted.get("_ranks.safetensors", ()))
        original(self, wanted, **options)

    monkeypatch.setattr(Checkpoint, "read_files", noted)
    holdfast.restore(saved, fresh(), rank=1, world_size=WORLD_SIZE)
    records = holdfast.open(saved).manifest.tensors["_ranks"]
    own = {
        (record.pieces[0].begin, record.pieces[0].begin + record.nbytes)
        for name, record in records.items()
        if name.startswith("00001")
    }
    assert set(reads) == own


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_ranks_is_an_error(saved: Path, world_size: int) -> None:
    """It says what is kept per rank and which choices there are; nothing is touched."""
    state = fresh()
    weight = state["model"].weight.clone()
    with pytest.raises(StateMismatchError, match="saved by 3 ranks") as raised:
        holdfast.restore(saved, state, rank=0, world_size=world_size)
    for word in ("'buffer'", "'generator'", "global random-number generators", "'reassign'", "'reseed'"):
        assert word in str(raised.value)
    assert torch.equal(state["model"].weight, weight)
    assert state["generator"].initial_seed() == 50


def test_without_anything_per_rank_the_number_of_ranks_does_not_matter(saved: Path) -> None:
    """A model alone, with the generators left alone."""
    model = nn.Linear(2, 2, bias=False)
    holdfast.restore(saved, {"model": model}, generators=False, rank=0, world_size=5)
    assert torch.equal(model.weight, holdfast.load(saved)["model"]["weight"])


def test_reassigning(saved: Path) -> None:
    """Ranks that were there get what they had; further ones new seeds, and stay as they were constructed."""
    first, further = fresh(), fresh()
    assert holdfast.restore(saved, first, rank=2, world_size=5, per_rank="reassign").notes == ()
    assert buffer_of(first) == ([2, 2], "rank 2")
    assert torch.initial_seed() == 102
    report = holdfast.restore(saved, further, rank=3, world_size=5, per_rank="reassign")
    assert buffer_of(further) == ([50, 50], "rank 50")
    assert further["generator"].initial_seed() not in (50, 0, 1, 2)
    assert torch.initial_seed() != 102
    assert not report.differs
    assert sorted(report.notes) == [
        "_rng: generators seeded anew; 3 rank(s) saved it, each its own",
        "buffer: as it was constructed; 3 rank(s) saved it, each its own",
        "generator: generators seeded anew; 3 rank(s) saved it, each its own",
    ]
    assert torch.equal(further["model"].weight, first["model"].weight)


@pytest.mark.parametrize(("world_size", "gone"), [(1, "ranks 1 to 2"), (2, "rank 2")])
def test_reassigning_to_fewer(saved: Path, world_size: int, gone: str) -> None:
    """The report says what nobody takes over."""
    report = holdfast.restore(saved, fresh(), rank=0, world_size=world_size, per_rank="reassign")
    assert report.notes == tuple(
        f"{entry}: what {gone} had is left out, since fewer ranks go on" for entry in ("buffer", "generator")
    )


def test_reseeding(saved: Path) -> None:
    """Every rank gets new seeds: those of a checkpoint and a rank, and no others."""
    seeds = []
    for rank in (0, 1, 0):
        state = fresh()
        holdfast.restore(saved, state, rank=rank, world_size=2, per_rank="reseed")
        assert buffer_of(state) == ([50, 50], "rank 50")
        seeds.append((state["generator"].initial_seed(), torch.initial_seed(), random.random(), np.random.random()))
    assert seeds[0] == seeds[2]
    assert all(mine != others for mine, others in zip(*seeds[:2], strict=True))
    assert seeds[0][0] != seeds[0][1]


def test_new_seeds_are_for_another_number_of_ranks_only(saved: Path) -> None:
    """With the same number everything is as it was."""
    state = fresh()
    holdfast.restore(saved, state, rank=1, world_size=WORLD_SIZE, per_rank="reseed")
    assert buffer_of(state) == ([1, 1], "rank 1")


@pytest.mark.parametrize(
    "generator",
    [
        torch.Generator(),
        random.Random(1),
        np.random.default_rng(1),
        np.random.RandomState(1),
        np.random.Philox(1),
    ],
    ids=lambda generator: type(generator).__name__,
)
def test_every_kind_of_generator_is_seeded_anew(tmp_path: Path, generator: Any) -> None:
    """By another number of ranks."""
    saved_by_ranks(tmp_path / "x", [{"generator": generator}] * 2)
    before = capture({"generator": generator})["generator"].tree
    holdfast.restore(tmp_path / "x", {"generator": generator}, rank=0, world_size=3, per_rank="reseed")
    assert capture({"generator": generator})["generator"].tree != before


def test_one_process_to_several(tmp_path: Path) -> None:
    """What one saved is that of rank 0."""
    holdfast.save(tmp_path / "x", made(0))
    with pytest.raises(StateMismatchError, match="saved by one process"):
        holdfast.restore(tmp_path / "x", fresh(), rank=0, world_size=2)
    first, second = fresh(), fresh()
    holdfast.restore(tmp_path / "x", first, rank=0, world_size=2, per_rank="reassign")
    holdfast.restore(tmp_path / "x", second, rank=1, world_size=2, per_rank="reassign")
    assert buffer_of(first) == ([0, 0], "rank 0")
    assert buffer_of(second) == ([50, 50], "rank 50")


def test_a_shared_loader_is_restored_by_any_number_of_ranks(tmp_path: Path) -> None:
    """Its position counts the samples of all of them."""
    loaders = [ResumableDataLoader(range(24), batch_size=2, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for loader in loaders:
        next(iter(loader))
    saved_by_ranks(tmp_path / "x", [{"loader": loader} for loader in loaders])
    assert "loader" in holdfast.load(tmp_path / "x")
    rest = []
    for rank in range(2):
        loader = ResumableDataLoader(range(24), batch_size=2, seed=1, rank=rank, world_size=2)
        holdfast.restore(tmp_path / "x", {"loader": loader}, generators=False, rank=rank, world_size=2)
        rest += [int(number) for batch in loader for number in batch]
    assert sorted(rest) == list(range(6, 24))


def test_gradients_of_this_rank(tmp_path: Path) -> None:
    """Those that wait for a reduction over ranks come back to the rank that had them."""
    model = nn.Linear(2, 1, bias=False)

    def folded(rank: int) -> dict[str, CapturedEntry]:
        model.weight.grad = torch.full((1, 2), float(rank + 1))
        state = {"model": model}
        return fold(capture(state, gradients=True), per_rank_entries(state), rank, 2)

    first, second = folded(0), folded(1)
    first["_ranks"].tensors.update(second["_ranks"].tensors)
    write(LocalStore(str(tmp_path)), first, About(), ["x"])
    model.weight.grad = None
    holdfast.restore(tmp_path / "x", {"model": model}, rank=1, world_size=2)
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2.0, 2.0]]
    model.weight.grad = None
    report = holdfast.restore(tmp_path / "x", {"model": model}, rank=0, world_size=3, per_rank="reseed")
    assert model.weight.grad is None
    assert any(note.startswith("_gradients") for note in report.notes)


def test_loading_what_a_rank_had(saved: Path) -> None:
    """Asked for; it is left out otherwise."""
    assert list(holdfast.load(saved)) == ["model"]
    loaded = holdfast.load(saved, rank=2)
    assert sorted(loaded) == ["buffer", "generator", "model"]
    assert loaded["buffer"]["seen"].tolist() == [2, 2]
    assert holdfast.load(saved, rank=1, only="buffer/note") == {"buffer": {"note": "rank 1"}}


def test_ranks_that_did_not_save(saved: Path, tmp_path: Path) -> None:
    """There is nothing of theirs to be loaded."""
    with pytest.raises(UsageError, match="there are 3"):
        holdfast.load(saved, rank=3)
    holdfast.save(tmp_path / "one", made(0))
    with pytest.raises(UsageError, match="there are 0"):
        holdfast.load(tmp_path / "one", rank=0)


def test_parts_of_a_state(saved: Path) -> None:
    """An entry that is kept per rank is chosen like any other; what is not in the state is named."""
    state = fresh()
    report = holdfast.restore(saved, state, only="generator", rank=1, world_size=WORLD_SIZE)
    assert state["generator"].initial_seed() == 1
    assert buffer_of(state) == ([50, 50], "rank 50")
    assert report.restored == 0
    report = holdfast.restore(saved, {"model": state["model"]}, rank=1, world_size=WORLD_SIZE)
    assert report.skipped == ("buffer", "generator")


@pytest.mark.parametrize(
    "arguments",
    [{"rank": 1}, {"world_size": 2}, {"rank": 2, "world_size": 2}, {"rank": -1, "world_size": 2}],
)
def test_ranks_that_cannot_be(saved: Path, arguments: dict[str, int]) -> None:
    """Both are given, or neither."""
    with pytest.raises(UsageError, match="rank="):
        holdfast.restore(saved, fresh(), **arguments)


def test_a_choice_that_is_none(saved: Path) -> None:
    """The message names those that there are."""
    with pytest.raises(UsageError, match="error, reassign, reseed"):
        holdfast.restore(saved, fresh(), per_rank="shuffle")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- bad content


def replaced(folded: Folded, data: bytes) -> None:
    """Other bytes for the typed trees of rank 0."""
    array = np.frombuffer(data, np.uint8)
    old = folded["_ranks"].tensors["00000"]
    assert isinstance(old, CapturedTensor)
    folded["_ranks"].tensors["00000"] = msgspec.structs.replace(
        old, shape=array.shape, value=array, address=array.ctypes.data
    )


BAD: dict[str, Callable[[Folded], object]] = {
    "no tree": lambda folded: setattr(folded["_ranks"], "tree", [1]),
    "no number": lambda folded: folded["_ranks"].tree.update(world_size="2"),
    "no ranks": lambda folded: folded["_ranks"].tree.update(world_size=0),
    "a flag": lambda folded: folded["_ranks"].tree.update(world_size=True),
    "no names": lambda folded: folded["_ranks"].tree.update(entries=[1]),
    "no bytes": lambda folded: folded["_ranks"].tensors.pop("00000"),
    "no JSON": lambda folded: replaced(folded, b"{"),
    "JSON of something else": lambda folded: replaced(folded, b"[]"),
    "a rank without an entry": lambda folded: replaced(folded, b'{"_rng": 1}'),
    "a tensor of another rank": lambda folded: replaced(folded, b'{"_rng": 1, "own": {"$tensor": "../00001/own/x"}}'),
    "a tag that is none": lambda folded: replaced(folded, b'{"_rng": 1, "own": {"$call": "x"}}'),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_content_is_named(tmp_path: Path, bad: str) -> None:
    """Whatever a writer put there; nothing is touched."""
    state = {"own": PerRank({"x": torch.ones(2)})}
    saved_by_ranks(tmp_path / "x", [state, state], BAD[bad])
    with pytest.raises(CorruptCheckpointError, match="state of"):
        holdfast.restore(tmp_path / "x", state, rank=0, world_size=2)
    with pytest.raises(CorruptCheckpointError, match="state of"):
        holdfast.load(tmp_path / "x", rank=0)
