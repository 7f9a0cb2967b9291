"""Checkpoints that several ranks write: nothing twice, nothing missing, and all or nothing is committed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import holdfast
from holdfast.distributed.committing import open_elsewhere
from holdfast.distributed.group import Group
from holdfast.distributed.saving import SharedSaves
from holdfast.distributed.share import Links
from holdfast.errors import RankError, RanksDifferError, RankTimeoutError
from holdfast.part import About
from holdfast.state.capture import CapturedEntry
from holdfast.state.sharding import REPLICATED, Placement, Sharding
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending

Make = Callable[..., Any]
WORLD = tuple(range(4))


def sharded(shape: tuple[int, ...], dim: int = 0, ranks: tuple[int, ...] = WORLD) -> Sharding:
    """Cut along one dimension over all ranks."""
    return Sharding(shape, (len(ranks),), ranks, (Placement(dim),))


def mesh(shape: tuple[int, ...], *placements: Placement) -> Sharding:
    """Cut over a mesh of two by two."""
    return Sharding(shape, (2, 2), WORLD, placements)


SHARDINGS: dict[str, Callable[[tuple[int, ...]], Sharding | None]] = {
    "whole": lambda shape: None,
    "rows": sharded,
    "columns": lambda shape: sharded(shape, 1),
    "rows and columns": lambda shape: mesh(shape, Placement(0), Placement(1)),
    "rows, twice": lambda shape: mesh(shape, REPLICATED, Placement(0)),
    "columns, twice": lambda shape: mesh(shape, Placement(1), REPLICATED),
    "rows of rows": lambda shape: mesh(shape, Placement(0), Placement(0)),
    "strided rows": lambda shape: mesh(shape, Placement(0, 2), Placement(0)),
}


@pytest.fixture
def save(ranks: Make, tmp_path: Path) -> Make:
    """Saves what each rank captured, as all ranks together; returns what became of it on each."""

    def all_save(capture: Callable[[int], Mapping[str, CapturedEntry]], size: int = 4, **options: Any) -> list[Any]:
        def work(group: Group) -> Any:
            saves = SharedSaves(group, range(size), LocalStore(tmp_path / "run"), {})
            return saves.begin(lambda: capture(group.rank), About(step=3)).finish(["step-000000000003"])

        return list(ranks(size, **options).run(work))

    return all_save


@pytest.fixture
def whole(tmp_path: Path) -> Callable[[], Any]:
    """The checkpoint as any other process sees it, every byte of it verified."""

    def look() -> Any:
        checkpoint = holdfast.open(tmp_path / "run" / "step-000000000003")
        checkpoint.verify()
        return checkpoint

    return look


def values(shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """Different numbers."""
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (2, 9), (1, 1), (0, 4)], ids=str)
@pytest.mark.parametrize("how", SHARDINGS)
def test_whatever_way_it_is_cut(
    save: Make, whole: Make, cut: Any, captured: Make, how: str, shape: tuple[int, ...]
) -> None:
    """It is read as the one tensor that it is; some cuts are not even, and some ranks hold nothing."""
    tensors = {f"w{n}": cut(values(shape, n), SHARDINGS[how](shape)) for n in range(3)}
    results = save(lambda rank: captured(tensors, rank))
    assert [type(result).__name__ for result in results] == ["Checkpoint"] + ["function"] * 3, results
    checkpoint = whole()
    for name, tensor in tensors.items():
        assert checkpoint.read(f"model/{name}").tolist() == tensor.whole.tolist()
    stored = sum(file.bytes for name, file in checkpoint.files.items() if name.startswith("model"))
    assert stored < 4096 * len(checkpoint.files) + 3 * 4 * torch.Size(shape).numel() + 1, "something is there twice"


def test_more_tensors_than_a_file_may_hold(
    save: Make, whole: Make, cut: Any, captured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones and parts of others lie in as many files as it takes."""
    monkeypatch.setattr("holdfast.state.plan.MAX_TENSORS_A_FILE", 3)
    tensors = {f"w{n}": cut(values((8, 2), n), sharded((8, 2)) if n % 2 else None) for n in range(12)}
    save(lambda rank: captured(tensors, rank))
    checkpoint = whole()
    names = [list(safe_open(Path(checkpoint.path) / file, "pt").keys()) for file in checkpoint.files]
    assert max(map(len, names)) <= 3
    for name, tensor in tensors.items():
        assert checkpoint.read(f"model/{name}").tolist() == tensor.whole.tolist()


def test_all_ways_together(save: Make, whole: Make, cut: Any, captured: Make) -> None:
    """One entry may hold tensors that are cut in different ways."""
    tensors = {how: cut(values((9, 6), n), SHARDINGS[how]((9, 6))) for n, how in enumerate(SHARDINGS)}
    save(lambda rank: captured(tensors, rank))
    loaded = holdfast.load(whole().path)["model"]
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        name: tensor.whole.tolist() for name, tensor in tensors.items()
    }


def test_replicas_are_written_in_turn(save: Make, whole: Make, cut: Any, captured: Make) -> None:
    """Where two ranks hold the same cell, each writes half of the tensors."""
    tensors = {f"w{n}": cut(values((8, 8), n), SHARDINGS["rows, twice"]((8, 8))) for n in range(4)}
    save(lambda rank: captured(tensors, rank))
    sizes = {name: file.bytes for name, file in whole().files.items() if name.startswith("model")}
    assert len(sizes) == 4
    assert len(set(sizes.values())) == 1


def test_a_replicated_entry_is_plain_safetensors(
    save: Make, whole: Make, cut: Any, captured: Make, tmp_path: Path
) -> None:
    """One file, under parameter names, for any tool."""
    tensors = {"fc.weight": cut(values((4, 4)), None), "fc.bias": cut(values((4,)), None)}
    save(lambda rank: captured(tensors, rank))
    whole()
    with safe_open(tmp_path / "run" / "step-000000000003" / "model.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118 - no mapping
            name: tensor.whole.tolist() for name, tensor in tensors.items()
        }


def test_large_entries_are_spread_over_ranks(
    save: Make, whole: Make, cut: Any, captured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors in several files, with an index, none of them twice."""
    monkeypatch.setattr("holdfast.distributed.planning.SPLIT_BYTES", 1000)
    tensors = {f"w{n}": cut(values((10, 10), n), None) for n in range(8)}
    save(lambda rank: captured(tensors, rank))
    names = [name for name in whole().files if name.startswith("model")]
    assert len(names) == 5
    assert "model.safetensors.index.json" in names
    assert whole().read("model/w7").tolist() == tensors["w7"].whole.tolist()


def test_plain_values_that_differ(save: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """All ranks say which key is different on which of them, and nothing is written."""
    tensors = {"w": cut(values((2, 2)), None)}
    trees = {"w": {"$tensor": "w"}, "lr": 0.1, "name": "a"}
    results = save(lambda rank: captured(tensors, rank, {**trees, "lr": 0.2 if rank in (1, 3) else 0.1}))
    assert [type(result) for result in results] == [RanksDifferError] * 4
    assert "model.lr: ranks 0, 2: 0.1; ranks 1, 3: 0.2" in str(results[0])
    assert results[2].ranks == (1, 3)
    assert not (tmp_path / "run").exists()


def test_whole_tensors_that_differ(save: Make, cut: Any, captured: Make) -> None:
    """A replica that went its own way is no replica."""
    results = save(lambda rank: captured({"w": cut(values((2, 2), rank == 2), None)}, rank))
    assert [type(result) for result in results] == [RanksDifferError] * 4
    assert "model/w: ranks 0, 1, 3: float32 [2, 2]" in str(results[0])


@pytest.mark.parametrize("large", [False, True])
def test_replicas_at_later_saves(ranks: Make, cut: Any, captured: Make, tmp_path: Path, large: bool) -> None:
    """Small ones are compared at each save; all of them only at the first, for that takes time."""
    shape = (200, 200) if large else (2, 2)

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        for step in (1, 2):
            tensors = {"w": cut(values(shape, group.rank if step == 2 else 0), None)}
            save = saves.begin(lambda tensors=tensors: captured(tensors, group.rank), About(step=step))
            save.finish([f"step-{step:012d}"])
        return "saved"

    results = ranks(2).run(work)
    assert all((result == "saved") is large for result in results), results


def test_tensors_that_one_rank_has_not(save: Make, cut: Any, captured: Make) -> None:
    """The names are told."""
    results = save(
        lambda rank: captured({f"w{n}": cut(values((2, 2)), None) for n in range(2 if rank == 1 else 3)}, rank)
    )
    assert [type(result) for result in results] == [RanksDifferError] * 4
    assert "model.w2" in str(results[0])
    assert "rank 1: missing" in str(results[0])


def test_entries_that_one_rank_has_not(save: Make, cut: Any, captured: Make) -> None:
    """Likewise."""

    def capture(rank: int) -> Any:
        entries = captured({"w": cut(values((2, 2)), None)}, rank)
        return entries if rank else {**entries, "more": CapturedEntry(1, {}, {})}

    results = save(capture)
    assert [type(result) for result in results] == [RanksDifferError] * 4
    assert "more are not in the state of all" in str(results[0])


def test_a_capture_that_fails(save: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """One rank's state cannot be saved: all raise, and nothing is written."""

    def capture(rank: int) -> Any:
        if rank == 3:
            raise TypeError("model.hook: a function cannot be saved")
        return captured({"w": cut(values((2, 2)), None)}, rank)

    results = save(capture)
    assert [type(result) for result in results] == [RankError] * 4
    assert "rank 3: TypeError: model.hook: a function cannot be saved" in str(results[1])
    assert not (tmp_path / "run").exists()


def litter(run: Path) -> Iterator[str]:
    """What is in a run beside checkpoints."""
    return (path.name for path in run.iterdir() if not path.name.startswith("step-"))


@pytest.mark.parametrize("failing", [0, 2])
def test_a_write_that_fails(
    save: Make, cut: Any, captured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk of one rank is full: all raise one error that names it, and nothing is left."""
    original = LocalPending.write_files

    def write(pending: LocalPending, images: Mapping[str, Any]) -> Any:
        if any(name.startswith(f"_ranks-{failing + 1:05d}") for name in images):
            with holdfast.errors.storage_errors("cannot write", "there"):
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(pending, images)

    monkeypatch.setattr(LocalPending, "write_files", write)
    results = save(lambda rank: captured({"w": cut(values((8, 2)), sharded((8, 2)))}, rank))
    assert [type(result) for result in results] == [RankError] * 4, results
    assert {result.ranks for result in results} == {(failing,)}
    assert all(f"rank {failing}: DiskFullError: cannot write there: No space left" in str(error) for error in results)
    assert list(litter(tmp_path / "run")) == []
    assert holdfast.Run(tmp_path / "run").latest() is None


def test_a_commit_that_fails(
    save: Make, cut: Any, captured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have written, and the coordinator cannot commit: all raise that."""

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("holdfast.storage.durable.publish", fail)
    results = save(lambda rank: captured({"w": cut(values((8, 2)), sharded((8, 2)))}, rank))
    assert [type(result) for result in results] == [RankError] * 4
    assert all("the commit failed:\n  rank 0: StorageError: cannot commit" in str(error) for error in results)
    assert list(litter(tmp_path / "run")) == []


def test_one_that_dies_in_its_part(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """It never reports: all others say so when their time is over, and nothing is committed."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(4), LocalStore(tmp_path / "run"), {})
        tensors = {"w": cut(values((8, 2)), sharded((8, 2)))}
        save = saves.begin(lambda: captured(tensors, group.rank), About(step=3))
        return None if group.rank == 2 else save.finish(["step-000000000003"])

    results = ranks(4, timeout_s=0.5).run(work)
    assert [type(results[rank]) for rank in (0, 1, 3)] == [RankTimeoutError] * 3
    assert {results[rank].ranks for rank in (0, 1, 3)} == {(2,)}
    assert holdfast.Run(tmp_path / "run").names() == []


def test_the_coordinator_dies_in_its_part(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """Nobody is there to commit: the others give up, and what is left is litter that the next start removes."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(3), LocalStore(tmp_path / "run"), {})
        tensors = {"w": cut(values((8, 2)), sharded((8, 2), ranks=(0, 1, 2)))}
        save = saves.begin(lambda: captured(tensors, group.rank), About(step=3))
        return save if group.rank == 0 else save.finish(["step-000000000003"])

    results = ranks(3, timeout_s=0.3).run(work)
    assert [(type(result), result.ranks) for result in results[1:]] == [(RankTimeoutError, (0,))] * 2
    assert holdfast.Run(tmp_path / "run").names() == []
    results[0]._part.pending._directory.close()  # its lock goes with the process
    assert LocalStore(tmp_path / "run").clean()
    assert list((tmp_path / "run").iterdir()) == []


def test_whoever_gave_up_stops_the_commit(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """A rank that told its training that the save failed must not find it there later."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        save = saves.begin(lambda: captured({"w": cut(values((2, 2)), None)}, group.rank), About(step=3))
        group.agree("both have begun")
        if group.rank == 1:
            group.mailbox().settle("save/1/verdict", "given up")
            group.agree("given up")
        else:
            group.agree("given up")
        return save.finish(["step-000000000003"])

    results = ranks(2).run(work)
    assert [type(result) for result in results] == [RankTimeoutError] * 2, results
    assert "gave up waiting" in str(results[0])
    assert holdfast.Run(tmp_path / "run").names() == []


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_that_is_not_shared(ranks: Make, cut: Any, captured: Make, tmp_path: Path, made: bool) -> None:
    """One that writes somewhere else says so, and all raise it."""

    def work(group: Group) -> Any:
        store = LocalStore(tmp_path / f"disk of {group.rank}")
        if group.rank and made:
            (tmp_path / f"disk of {group.rank}").mkdir()
        saves = SharedSaves(group, range(2), store, {})
        save = saves.begin(lambda: captured({"w": cut(values((2, 2)), None)}, group.rank), About(step=3))
        return save.finish(["step-000000000003"])

    results = ranks(2, timeout_s=0.4).run(work)
    assert [isinstance(result, RankError) for result in results] == [True] * 2, results
    assert all("one directory of a file system that they share" in str(result) for result in results)


def test_a_directory_that_comes_to_be_seen(
    ranks: Make, cut: Any, captured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network it may take a moment until another machine sees a run that was just made, or a save in it."""
    parent, unseen = LocalStore._parent, [True, True]

    def look(store: LocalStore) -> Any:
        if os.fspath(store.path).endswith(".") and unseen:
            unseen.pop()
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return parent(store)

    monkeypatch.setattr(LocalStore, "_parent", look)

    def work(group: Group) -> Any:
        store = LocalStore(f"{tmp_path}/run" + ("/." if group.rank else ""))
        saves = SharedSaves(group, range(2), store, {})
        saves.begin(lambda: captured({"w": cut(values((2, 2)), None)}, group.rank), About(step=3)).finish(
            ["step-000000000003"]
        )
        return "saved"

    assert ranks(2).run(work) == ["saved"] * 2
    assert unseen == []


def in_group(ranks: Make, members: tuple[int, ...], path: Path, capture: Callable[[int], Any]) -> list[Any]:
    """What becomes of a save that some ranks of a larger world make."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, members, LocalStore(path), {})
        save = saves.begin(lambda: capture(members[group.rank]), About(step=3))
        return save.finish(["step-000000000003"])

    return list(ranks(len(members)).run(work))


def held_open(path: Path) -> list[str]:
    """What this process has open in a directory."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(entry.readlink())
    return [str(place) for place in found if place.is_relative_to(path)]


@pytest.mark.parametrize("how", ["rows, twice", "strided rows, twice"])
def test_a_group_that_holds_all(ranks: Make, whole: Make, cut: Any, captured: Make, tmp_path: Path, how: str) -> None:
    """Of a mesh of four, two hold everything: they save it, whichever rank their meshes call them."""
    shape = (8, 8) if how == "rows, twice" else (6, 3)
    sharding = (
        mesh(shape, REPLICATED, Placement(0))
        if how == "rows, twice"
        else Sharding(shape, (2, 1, 2), WORLD, (REPLICATED, Placement(0, 2), Placement(0)))
    )
    tensors = {f"w{n}": cut(values(shape, n), sharding) for n in range(4)}
    results = in_group(ranks, (2, 3), tmp_path / "run", lambda rank: captured(tensors, rank))
    assert [type(result).__name__ for result in results] == ["Checkpoint", "function"], results
    checkpoint = whole()
    for name, tensor in tensors.items():
        assert checkpoint.read(f"model/{name}").tolist() == tensor.whole.tolist()


def test_a_group_that_does_not(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """It is told which tensor lies elsewhere, and nothing is left: no file, and nothing open."""
    tensors = {"w": cut(values((8, 8)), mesh((8, 8), REPLICATED, Placement(0)))}
    results = in_group(ranks, (0, 2), tmp_path / "run", lambda rank: captured(tensors, rank))
    assert [type(result) for result in results] == [RankError] * 2
    assert "model.w: a part of it lies with rank 1, 3 alone, which is not in the group" in str(results[0])
    assert list((tmp_path / "run").iterdir()) == []
    assert held_open(tmp_path) == []


def test_the_coordinator_fails_before_others_join(
    ranks: Make, cut: Any, captured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find the directory all the same, and do not take it for one that they do not see."""
    failed, join = threading.Event(), LocalStore.join

    def fail(links: Links, *arguments: object) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

    def joining(store: LocalStore, name: str) -> LocalPending:
        assert failed.wait(20)
        return join(store, name)

    monkeypatch.setattr(LocalStore, "join", joining)

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        if group.is_coordinator:
            monkeypatch.setattr(saves._links, "unchanged", lambda *arguments: fail(saves._links))
        save = saves.begin(lambda: captured({"w": cut(values((2, 2)), None)}, group.rank), About(step=3))
        return save.finish(["step-000000000003"])

    results = ranks(2).run(work)
    assert [(type(result), result.ranks) for result in results] == [(RankError, (0,))] * 2, results
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (1, 2)], ids=str)
def test_each_sees_a_mesh_of_its_own(
    ranks: Make, whole: Make, cut: Any, captured: Make, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """FSDP2 within tensor parallelism: a norm is cut over ranks 0 and 2, and once more over 1 and 3."""
    owners = {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}

    def capture(rank: int) -> Any:
        tensors = {f"norm{n}": cut(values(shape, n), sharded(shape, 0, owners[rank])) for n in range(4)}
        tensors["linear"] = cut(values((8, 8)), mesh((8, 8), Placement(0), Placement(1)))
        return captured(tensors, rank)

    results = in_group(ranks, WORLD, tmp_path / "run", capture)
    assert [type(result).__name__ for result in results] == ["Checkpoint"] + ["function"] * 3, results
    checkpoint = whole()
    for n in range(4):
        assert checkpoint.read(f"model/norm{n}").tolist() == values(shape, n).tolist()
    assert checkpoint.read("model/linear").tolist() == values((8, 8)).tolist()
    names: list[str] = []
    for file in checkpoint.files:
        if file.endswith(".safetensors"):
            with safe_open(f"{checkpoint.path}/{file}", "pt") as opened:
                names += [name for name in opened.keys() if name.startswith("norm")]  # noqa: SIM118 - no mapping
    assert len(names) == 4 * min(2, shape[0]), "a cell is there twice"


def test_a_mesh_that_changes_on_one(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """Between two saves one rank's tensors come to lie in another mesh: all plan anew, from what each has now."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(4), LocalStore(tmp_path / "run"), {})
        for step in (1, 2, 3):
            # The order of the ranks is what each of them says it is; only at step 2 do pairs swap their rows.
            pair = (0, 2) if group.rank % 2 == 0 else (1, 3)
            pair = pair[::-1] if step == 2 and group.rank % 2 else pair
            tensors = {"w": cut(values((4, 2), step), sharded((4, 2), 0, pair))}
            save = saves.begin(lambda tensors=tensors: captured(tensors, group.rank), About(step=step))
            save.finish([f"step-{step:012d}"])
        return "saved"

    assert ranks(4).run(work) == ["saved"] * 4
    for checkpoint in holdfast.Run(tmp_path / "run"):
        assert checkpoint.read("model/w").tolist() == values((4, 2), checkpoint.step).tolist()


def test_messages_of_saves_are_forgotten(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """Those of saves that failed, too."""
    some = ranks(2)

    def work(group: Group) -> None:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        for step in range(1, 13):

            def capture(step: int = step) -> Any:
                if step % 3 == 0 and group.rank:
                    raise TypeError("not this time")
                return captured({"w": cut(values((2, 2)), None)}, group.rank)

            with contextlib.suppress(RankError):
                saves.begin(capture, About(step=step)).finish([f"step-{step:012d}"])

    assert some.run(work) == [None] * 2
    assert some._store.num_keys() <= 4 + 3


def test_frozen_tensors_are_linked(ranks: Make, cut: Any, captured: Make, tmp_path: Path) -> None:
    """What has not changed is not written again, by any rank."""
    import msgspec

    def frozen(entries: Any) -> Any:
        tensors = entries["model"].tensors
        tensors["w"] = msgspec.structs.replace(tensors["w"], frozen=True)
        return entries

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        linked = []
        for step in (1, 2, 3):
            weights = values((1024, 512), 1 if step == 3 else 0)
            tensors = {"w": cut(weights, sharded((1024, 512), ranks=(0, 1))), "b": cut(values((3,), step), None)}
            save = saves.begin(lambda tensors=tensors: frozen(captured(tensors, group.rank)), About(step=step))
            save.finish([f"step-{step:012d}"])
            linked.append(save.costs.bytes_linked > 2**20)
        return linked

    assert ranks(2).run(work) == [[False, True, False]] * 2
    run = holdfast.Run(tmp_path / "run")
    assert [checkpoint.read("model/w")[0, 0] for checkpoint in run] == [0, 0, 1]
    for checkpoint in run:
        checkpoint.verify()


def test_another_checkpoint_under_the_name(tmp_path: Path) -> None:
    """What rank 0 committed is known by its id: an older one that this machine still sees there is not it."""
    holdfast.save(tmp_path / "seen", {"x": 1})
    with pytest.raises(RankTimeoutError, match=r"it has the id [0-9a-f]{32}, expected 0{32}"):
        open_elsewhere(str(tmp_path / "seen"), "0" * 32, 0.1)


def test_a_checkpoint_that_was_removed(
    ranks: Make, cut: Any, captured: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for it long after the commit does not wait for it to be seen: another machine has had the time."""

    def work(group: Group) -> Any:
        saves = SharedSaves(group, range(2), LocalStore(tmp_path / "run"), {})
        tensors = {"w": cut(values((8, 2)), sharded((8, 2), ranks=(0, 1)))}
        return saves.begin(lambda: captured(tensors, group.rank), About(step=3)).finish(["step-000000000003"])

    _, opens = ranks(2, timeout_s=2).run(work)
    shutil.rmtree(tmp_path / "run")
    later_s = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(RankTimeoutError, match="Either it has been removed since"):
        opens()
