"""Holdfast's storage for PyTorch's distributed checkpoint (DCP) beside DCP's own, on several processes of one machine.

``python -m benchmarks.ranks --help``. All save and load the same sharded state through ``dcp.save`` and ``dcp.load``,
in turning order, each once a round; a ratio compares two figures of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

from benchmarks import raw
from benchmarks.files import forget_cache, remove, sync, warm_cache
from holdfast.distributed import HoldfastReader, HoldfastWriter

COLUMNS = 1024
MIB_A_TENSOR = 8
SMALL_TENSORS = 32
HOLDFAST = "holdfast"
RAW = "*raw: O_DIRECT*"
"""What the disk gives one process without any file format, where it takes such writes and reads."""
MEASURES = ("durable save", "hot load", "cold load", "hot load, cut otherwise")
Samples = dict[str, dict[str, list[float]]]
"""A measure, then who, to one figure a round, in seconds."""


@dataclass(frozen=True)
class Peer:
    """One who stores what DCP saves: what makes a writer and a reader, and whether its folders have to be synced."""

    writer: Callable[[Path], StorageWriter]
    reader: Callable[[Path], StorageReader]
    syncs_folders: bool


PEERS: Mapping[str, Peer] = {
    HOLDFAST: Peer(HoldfastWriter, HoldfastReader, True),
    "DCP, 1 thread": Peer(FileSystemWriter, FileSystemReader, False),
    "DCP, 2 threads": Peer(lambda path: FileSystemWriter(path, thread_count=2), FileSystemReader, False),
}


def state(mib: int, shard: int, seed: int | None) -> dict[str, Any]:
    """So many MiB of float32 in all, each tensor cut along dimension ``shard``, and some small ones.

    Random numbers by ``seed``, which each rank makes for its part; zeros where it is None.
    """
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    count = max(1, mib // MIB_A_TENSOR)
    rows = max(size, mib * 2**18 // count // COLUMNS // size * size)
    shape = (rows // size, COLUMNS) if shard == 0 else (rows, COLUMNS // size)
    if seed is not None:
        torch.manual_seed(seed * size + dist.get_rank())
    make = torch.zeros if seed is None else torch.randn
    tensors: dict[str, Any] = {
        f"layer{n}.weight": DTensor.from_local(make(*shape), mesh, [Shard(shard)]) for n in range(count)
    }
    tensors |= {f"layer{n}.bias": torch.full((COLUMNS,), float(seed or 0)) for n in range(SMALL_TENSORS)}
    return {"model": tensors, "step": seed or 0}


def measure(mib: int, rounds: int, directory: Path) -> Samples:
    """Measure everybody, on every rank of the process group; the figures are those of the slowest rank."""
    samples: Samples = {measure: {name: [] for name in PEERS} for measure in MEASURES}
    saved, room, columns = state(mib, 0, 1), state(mib, 0, None), state(mib, 1, None)
    names = list(PEERS)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            path = directory / "checkpoint"
            for measure, figure in _turn(PEERS[name], path, saved, room, columns).items():
                samples[measure][name].append(figure)
            if dist.get_rank() == 0:
                remove(path)
        for measure, figure in _raw(directory / "raw", mib * 2**20).items():
            samples[measure].setdefault(RAW, []).append(figure)
    return samples


def _raw(path: Path, nbytes: int) -> dict[str, float]:
    """What rank 0 finds that the disk can do, while the others wait; nothing elsewhere."""
    figures: dict[str, float | None] = {}
    if dist.get_rank() == 0:
        os.sync()
        figures = {"durable save": raw.direct_write(path, nbytes), "cold load": raw.direct_read(path, nbytes)}
        path.unlink(missing_ok=True)
    dist.barrier()
    return {measure: figure for measure, figure in figures.items() if figure is not None}


def _turn(peer: Peer, path: Path, saved: Any, room: Any, columns: Any) -> dict[str, float]:
    is_first = dist.get_rank() == 0

    def save_all() -> None:
        save(saved, storage_writer=peer.writer(path))
        if is_first and not peer.syncs_folders:
            sync(path)

    def load_all(into: Any) -> Callable[[], None]:
        return lambda: load(into, storage_reader=peer.reader(path))

    def prepare(work: Callable[[Path], None]) -> None:
        if is_first:
            work(path)

    figures = {"durable save": _slowest_s(save_all)}
    prepare(warm_cache)
    figures["hot load"] = _slowest_s(load_all(room))
    _check(saved, room)
    figures["hot load, cut otherwise"] = _slowest_s(load_all(columns))
    prepare(forget_cache)
    figures["cold load"] = _slowest_s(load_all(room))
    return figures


def _check(saved: Any, found: Any) -> None:
    """Whoever loads something else does not compete. Clears what was loaded."""
    for name, value in found["model"].items():
        own = value.to_local() if isinstance(value, DTensor) else value
        other = saved["model"][name]
        if not torch.equal(own, other.to_local() if isinstance(other, DTensor) else other):
            raise AssertionError(f"{name} is not what was saved")
        own.zero_()


def _slowest_s(work: Callable[[], None]) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def run(world_size: int, mib: int, rounds: int, directory: Path) -> Samples:
    """Measure on so many new processes."""
    with tempfile.TemporaryDirectory(prefix=".ranks-", dir=directory) as name:
        here = Path(name)
        spawn(_rank, (world_size, mib, rounds, here), nprocs=world_size)
        samples: Samples = json.loads((here / "samples.json").read_text())
    return samples


def _rank(rank: int, world_size: int, mib: int, rounds: int, here: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)  # as torchrun has it
    dist.init_process_group("gloo", init_method=f"file://{here / 'init'}", rank=rank, world_size=world_size)
    samples = measure(mib, rounds, here)
    if rank == 0:
        (here / "samples.json").write_text(json.dumps(samples))
    dist.barrier()
    dist.destroy_process_group()


def table(samples: Mapping[int, Samples], mib: int) -> str:
    """Medians in seconds, and the median of the ratios to Holdfast of the same rounds, as Markdown."""
    lines = [f"| {mib} MiB on | measure | who | s, median (least to greatest) | x Holdfast |", "|---|---|---|---|---|"]
    for ranks, measured in samples.items():
        for measure, by_name in measured.items():
            for name, figures in by_name.items():
                spread = f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"
                ratio = statistics.median(
                    theirs / ours for theirs, ours in zip(figures, by_name[HOLDFAST], strict=True)
                )
                lines.append(f"| {ranks} | {measure} | {name} | {spread} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what the arguments ask for, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description="DCP's storage and Holdfast's.")
    parser.add_argument("--mib", type=int, default=512, help="of the whole state")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    options = parser.parse_args()
    samples = {ranks: run(ranks, options.mib, options.rounds, options.directory) for ranks in options.ranks}
    print(table(samples, options.mib))
    return 0


if __name__ == "__main__":
    sys.exit(main())
