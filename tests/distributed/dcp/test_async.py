"""DCP's saves in the background: in a thread, and in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import holdfast
from holdfast.distributed import HoldfastReader, HoldfastWriter


@pytest.mark.filterwarnings("ignore")
def test_a_thread_saves_what_was_there_at_the_call(tmp_path: Path) -> None:
    """In a single process, whatever becomes of the tensor."""
    value = torch.ones(1000)
    future = dcp.async_save({"x": {"a": value}}, storage_writer=HoldfastWriter(tmp_path / "c"), no_dist=True)
    value.zero_()
    future.result()

    assert torch.equal(holdfast.load(tmp_path / "c")["x"]["a"], torch.ones(1000))


def sharded(value: float) -> DTensor:
    """A tensor of which each of two ranks has a half."""
    return distribute_tensor(torch.full((6,), value), init_device_mesh("cpu", (2,)), [Shard(0)])


def test_threads_save_on_ranks(on_ranks: Any, tmp_path: Path) -> None:
    """Several saves with one writer; the state changes meanwhile."""

    def work(rank: int) -> list[Any]:
        value, writer = sharded(0.0), HoldfastWriter(tmp_path / "never")
        found = []
        for number in range(3):
            future = dcp.async_save({"x": {"a": value}}, storage_writer=writer, checkpoint_id=tmp_path / f"c{number}")
            value.to_local().add_(1)
            future.result()
            room = sharded(-1.0)
            dcp.load({"x": {"a": room}}, storage_reader=HoldfastReader(tmp_path / f"c{number}"))
            found.append(room.to_local()[0].item())
        return found

    assert on_ranks(2, work) == [[0.0, 1.0, 2.0]] * 2


def test_memory_that_is_kept_is_staged_into(on_ranks: Any, tmp_path: Path) -> None:
    """With a stager of the caller's own, which copies in a thread."""

    def work(rank: int) -> float:
        stager = DefaultStager(StagingOptions(False, False, True, False))
        response = dcp.async_save(
            {"x": {"a": sharded(3.0)}}, storage_writer=HoldfastWriter(tmp_path / "c"), async_stager=stager
        )
        response.staging_completion.result()
        response.upload_completion.result()
        stager.close()
        return float(holdfast.load(tmp_path / "c")["x"]["a"].sum())

    assert on_ranks(2, work) == [18.0] * 2


def test_a_process_of_its_own_saves(on_ranks: Any, tmp_path: Path) -> None:
    """The writer is handed to one on each rank, which have a group of their own."""

    def work(rank: int) -> float:
        future = dcp.async_save(
            {"x": {"a": sharded(2.0)}, "n": 4},
            storage_writer=HoldfastWriter(tmp_path / "c", step=9),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result()
        return float(holdfast.load(tmp_path / "c")["x"]["a"].sum())

    assert on_ranks(2, work) == [12.0] * 2
    assert holdfast.open(tmp_path / "c").step == 9
