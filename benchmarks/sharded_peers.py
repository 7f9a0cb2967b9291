"""Those who save a state that several processes share: each process has its part of every tensor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

import holdfast
from benchmarks import measures
from benchmarks.files import sync
from benchmarks.rounds import Figures
from benchmarks.workloads import gpt2_shapes, module_of


@dataclass(frozen=True, slots=True)
class State:
    """The state as one process has it: its objects, and the same tensors by name."""

    objects: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of all processes together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @torch.no_grad()
    def fill(self, value: float) -> None:
        """Give every element a value."""
        for tensor in self.tensors.values():
            tensor.fill_(value)

    @torch.no_grad()
    def change(self) -> None:
        """Change every element."""
        for tensor in self.tensors.values():
            tensor.add_(1)


def make_state(scale: str) -> State:
    """GPT-2 and AdamW, 1.49 GB on all processes together; 29 MB at the small scale. Random, of each its own part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())

    def make(*shape: int) -> Tensor:
        tensor = zeros(*shape, device_mesh=mesh, placements=[Shard(0)])
        tensor.to_local().uniform_()
        return tensor

    model = module_of((name, make(*shape)) for name, shape in gpt2_shapes(scale))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, foreach=False)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        slots = {"exp_avg": make(*parameter.shape), "exp_avg_sq": make(*parameter.shape)}
        optimizer.state[parameter] = {"step": torch.tensor(1000.0), **slots}
        tensors |= {f"model.{name}": parameter.detach()}
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    return State({"model": model, "optimizer": optimizer}, tensors)


class Peer(Protocol):
    """A way to save and load that is measured; every process makes the same calls."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    def save(self, state: State, directory: Path) -> None:
        """A first checkpoint in a directory of its own; returns when it is durable."""

    def stall(self, state: State, directory: Path) -> Figures:
        """Two saves in the background, of which the second is measured; all is changed between them."""

    def load(self, state: State, directory: Path) -> None:
        """Fill the state with the newest checkpoint there."""


@dataclass(frozen=True)
class Holdfast:
    """A :class:`holdfast.Checkpointer` on every process."""

    name: str = measures.HOLDFAST

    def save(self, state: State, directory: Path) -> None:
        """See :class:`Peer`."""
        with self._open(state, directory, background=False) as checkpointer:
            checkpointer.save().result()

    def stall(self, state: State, directory: Path) -> Figures:
        """See :class:`Peer`."""
        with self._open(state, directory) as checkpointer:

            def begin() -> Callable[[], object]:
                checkpointer.step()
                return checkpointer.save().result

            return _second(state, begin)

    def load(self, state: State, directory: Path) -> None:
        """See :class:`Peer`. Entering the block is what loads; no thread makes memory for copies beside it."""
        with self._open(state, directory, background=False):
            pass

    def _open(self, state: State, directory: Path, *, background: bool = True) -> holdfast.Checkpointer:
        return holdfast.Checkpointer(
            directory,
            state.objects,
            save=holdfast.Every(steps=10**9),
            keep=holdfast.KeepLast(1),
            background=background,
            preemption=None,
            per_rank="reassign",
        )


@dataclass(frozen=True)
class DCP:
    """DCP's own functions with its file system writer, which syncs its files; the folder is synced here."""

    threads: int

    @property
    def name(self) -> str:
        """With the number of threads."""
        return f"DCP, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def save(self, state: State, directory: Path) -> None:
        """See :class:`Peer`."""
        path = directory / "0"
        save(dict(state.tensors), storage_writer=self._writer(path))
        _sync(path)

    def stall(self, state: State, directory: Path) -> Figures:
        """See :class:`Peer`."""
        numbers = itertools.count(1)

        def begin() -> Callable[[], object]:
            path = directory / str(next(numbers))
            begun = async_save(dict(state.tensors), storage_writer=self._writer(path))
            future = begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun

            def wait() -> None:
                future.result()
                _sync(path)

            return wait

        return _second(state, begin)

    def load(self, state: State, directory: Path) -> None:
        """See :class:`Peer`."""
        newest = max(directory.iterdir(), key=lambda path: int(path.name))
        load(dict(state.tensors), storage_reader=FileSystemReader(newest))

    def _writer(self, path: Path) -> FileSystemWriter:
        return FileSystemWriter(path, thread_count=self.threads, sync_files=True)


PEERS: tuple[Peer, ...] = (Holdfast(), *(DCP(threads) for threads in (1, 2)))


def _second(state: State, begin: Callable[[], Callable[[], object]]) -> Figures:
    """The stall of the second of two saves, and how long it took until that was durable."""
    begin()()
    state.change()
    dist.barrier()
    start_s = time.perf_counter()
    wait = begin()
    stalled_s = time.perf_counter() - start_s
    wait()
    return {measures.STALL: slowest(stalled_s), measures.DURABLE: slowest(time.perf_counter() - start_s)}


def slowest(figure: float) -> float:
    """The greatest figure of all processes."""
    found = torch.tensor(figure, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def _sync(path: Path) -> None:
    if dist.get_rank() == 0:
        sync(path)
