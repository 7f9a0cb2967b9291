"""What goes wrong on one rank: every rank hears of it, nobody waits, and nothing is left."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import holdfast
from holdfast.distributed import HoldfastReader, HoldfastWriter
from holdfast.storage import durable
from holdfast.storage.local import LocalStore


def state(value: float = 1.0) -> dict[str, Any]:
    """Something that each rank has a part of."""
    return {"x": {"a": distribute_tensor(torch.full((4,), value), init_device_mesh("cpu", (2,)), [Shard(0)])}}


def raised(work: Callable[[], Any]) -> dict[int, str]:
    """By rank, what DCP says went wrong there."""
    try:
        work()
    except CheckpointException as error:
        return {rank: type(failure[0]).__name__ for rank, failure in error.failures.items()}
    return {}


def names(path: Path) -> list[str]:
    """What the folder holds when nobody remembers the save any more."""
    gc.collect()
    return sorted(found.name for found in path.iterdir() if not found.name.startswith(".ranks"))


def test_one_rank_that_cannot_write_fails_all(on_ranks: Any, tmp_path: Path) -> None:
    """A value that cannot be written, on one of them."""

    def work(rank: int) -> Any:
        own = {"y": {"b": print}} if rank else {"y": {"c": 1}}
        return raised(lambda: dcp.save({**state(), **own}, storage_writer=HoldfastWriter(tmp_path / "c"))), names(
            tmp_path
        )

    assert on_ranks(2, work)[0] == ({1: "UnsupportedValueError"}, [])
    assert names(tmp_path) == []


@pytest.mark.parametrize("broken", [0, 1], ids=["coordinator", "other"])
def test_a_full_disk_of_one_rank_fails_all(broken: int, on_ranks: Any, tmp_path: Path) -> None:
    """And a save to the same path succeeds when there is room again."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(rank: int) -> Any:
        writer = HoldfastWriter(tmp_path / "c")
        with pytest.MonkeyPatch.context() as patch:
            if rank == broken:
                patch.setattr(durable, "preallocate", full)
            failed = raised(lambda: dcp.save(state(), storage_writer=writer))
        return failed, raised(lambda: dcp.save(state(2), storage_writer=writer))

    assert on_ranks(2, work) == [({broken: "DiskFullError"}, {})] * 2
    assert names(tmp_path) == ["c"]
    assert holdfast.load(tmp_path / "c")["x"]["a"].tolist() == [2.0] * 4


def test_ranks_that_save_elsewhere_are_told(on_ranks: Any, tmp_path: Path) -> None:
    """Nobody waits for a coordinator that never comes."""

    def work(rank: int) -> Any:
        failed = raised(lambda: dcp.save(state(), storage_writer=HoldfastWriter(tmp_path / f"c{rank}")))
        return failed, names(tmp_path) if rank == 0 else []

    assert on_ranks(2, work) == [({1: "UsageError"}, [])] * 2
    assert names(tmp_path) == []


def test_what_is_there_is_left_by_all(on_ranks: Any, tmp_path: Path) -> None:
    """A path that is taken: every rank says so."""
    (tmp_path / "c").mkdir()

    def work(rank: int) -> dict[int, str]:
        return raised(lambda: dcp.save(state(), storage_writer=HoldfastWriter(tmp_path / "c")))

    assert on_ranks(2, work) == [{0: "CheckpointExistsError"}] * 2
    assert names(tmp_path) == ["c"]


def test_a_missing_checkpoint_fails_all(on_ranks: Any, tmp_path: Path) -> None:
    """On every rank, each says what it did not find."""

    def work(rank: int) -> dict[int, str]:
        return raised(lambda: dcp.load(state(), storage_reader=HoldfastReader(tmp_path / "c")))

    assert on_ranks(2, work) == [{0: "CheckpointNotFoundError", 1: "CheckpointNotFoundError"}] * 2


def test_damage_that_one_rank_reads_fails_all(on_ranks: Any, tmp_path: Path) -> None:
    """A flipped bit in the file of the second rank."""
    on_ranks(2, lambda rank: dcp.save(state(), storage_writer=HoldfastWriter(tmp_path / "c")))
    file = tmp_path / "c" / "x-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def work(rank: int) -> dict[int, str]:
        return raised(lambda: dcp.load(state(), storage_reader=HoldfastReader(tmp_path / "c")))

    assert on_ranks(2, work) == [{1: "CorruptCheckpointError"}] * 2


def test_what_a_dead_coordinator_left_is_removed(in_a_fork: Any, tmp_path: Path) -> None:
    """By whoever cleans next, as with any save."""

    def die() -> None:
        writer, planner = HoldfastWriter(tmp_path / "c"), DefaultSavePlanner()
        planner.set_up_planner({"x": {"a": torch.ones(1)}}, None, True)
        writer.set_up_storage_writer(True)
        plans, _ = planner.create_global_plan([planner.create_local_plan()])
        [plan] = writer.prepare_global_plan(plans)
        writer.write_data(plan, planner).wait()
        os._exit(7)

    assert in_a_fork(die) == 7
    [left] = names(tmp_path)
    assert LocalStore(tmp_path).clean() == [left]
    assert names(tmp_path) == []
