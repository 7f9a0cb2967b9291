"""The Checkpointer beside ``torch.distributed.checkpoint`` (DCP), on several processes that share one sharded state.

``python -m benchmarks.sharded --help``. In each round everybody has one turn, in turning order, on the same processes;
a figure is that of the slowest of them, and a ratio compares two figures of one round. The state is GPT-2 with AdamW,
every tensor cut along its first dimension.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from benchmarks import measures
from benchmarks.files import remove, warm_cache
from benchmarks.measures import Measure
from benchmarks.report import Result, summary
from benchmarks.rounds import Figures, Samples, interleave
from benchmarks.sharded_peers import PEERS, Peer, State, make_state, slowest
from benchmarks.tables import Table, table_of

RESHARDED = Measure("hot load on half as many ranks", measures.SECONDS)
MEASURES = (measures.SAVE, measures.STALL, measures.DURABLE, measures.HOT, RESHARDED)


def timed(work: Callable[[], object]) -> float:
    """Seconds until the last process has done it, from when all begin."""
    dist.barrier()
    start_s = time.perf_counter()
    work()
    return slowest(time.perf_counter() - start_s)


def first_only(work: Callable[[], object]) -> None:
    """Have one process do something, while the others wait."""
    if dist.get_rank() == 0:
        work()
    dist.barrier()


# ------------------------------------------------------------------------------------------------------------- turns


def saves_and_loads(peer: Peer, state: State, directory: Path) -> Figures:
    """One turn on as many processes as saved: a durable save, a load, two saves in the background, and a check."""
    first_only(lambda: remove(directory))
    first_only(os.sync)
    figures: Figures = {measures.SAVE: timed(lambda: peer.save(state, directory))}
    first_only(lambda: warm_cache(directory))
    figures[measures.HOT] = timed(lambda: peer.load(state, directory))
    return figures | peer.stall(state, directory)


def loads(peer: Peer, state: State, directory: Path) -> Figures:
    """One turn on another number of processes."""
    first_only(lambda: warm_cache(directory))
    return {RESHARDED: timed(lambda: peer.load(state, directory))}


def check(peer: Peer, state: State, directory: Path) -> None:
    """Whoever loads something else than was saved does not compete.

    Raises:
        AssertionError: a part that this process loaded is not what it saved.
    """
    expected = {name: local(tensor).clone() for name, tensor in state.tensors.items()}
    first_only(lambda: remove(directory))
    peer.save(state, directory)
    dist.barrier()
    state.fill(0)
    peer.load(state, directory)
    differing = [name for name, tensor in state.tensors.items() if not torch.equal(local(tensor), expected[name])]
    if differing:
        raise AssertionError(f"{peer.name}: {len(differing)} tensors differ, {differing[0]} for one")


def local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Task = Literal["save", "load"]


def _rank(rank: int, task: Task, world_size: int, scale: str, rounds: int, here: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)  # as torchrun has it
    with _group(rank, world_size, here / f"group-{task}-{world_size}"):
        state = make_state(scale)
        if task == "save":
            for peer in PEERS:
                check(peer, state, _place(here, peer))
        turn = saves_and_loads if task == "save" else loads
        turns: dict[str, Callable[[], Figures]] = {
            peer.name: partial(turn, peer, state, _place(here, peer)) for peer in PEERS
        }
        samples = interleave(turns, rounds, lambda _: None)
        if rank == 0:
            (here / f"{task}.json").write_text(json.dumps({"samples": samples, "nbytes": state.nbytes}))


def _place(here: Path, peer: Peer) -> Path:
    return here / peer.name.replace(", ", "-").replace(" ", "-")


@contextmanager
def _group(rank: int, world_size: int, path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    yield
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, scale: str, rounds: int, directory: Path) -> tuple[Samples, int]:
    """All figures of so many new processes, and the bytes of the state.

    Args:
        world_size: how many processes save; half as many load it too, where there are several.
        scale: ``"full"`` or ``"small"``.
        rounds: how often each is measured.
        directory: on the disk to be measured.
    """
    with tempfile.TemporaryDirectory(prefix=".sharded-", dir=directory) as name:
        here = Path(name).resolve()
        tasks: list[tuple[Task, int]] = [("save", world_size)]
        tasks += [("load", world_size // 2)] if world_size > 1 else []
        samples: Samples = {}
        nbytes = 0
        for task, size in tasks:
            spawn(_rank, (task, size, scale, rounds, here), nprocs=size)
            told = json.loads((here / f"{task}.json").read_text())
            samples |= told["samples"]
            nbytes = told["nbytes"]
    return samples, nbytes


def table(world_size: int, samples: Samples, nbytes: int) -> Table:
    """Median, least and greatest, and how many times Holdfast's figure of the same round it is."""
    title = f"{world_size} rank{'s' if world_size > 1 else ''}, {nbytes / 1e6:,.0f} MB"
    return table_of(title, Result(nbytes, samples), MEASURES)


def main() -> int:
    """Measure what the arguments ask for, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--scale", choices=["full", "small"], default="full", help="1.49 GB, or 29 MB to try it out")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--output", type=Path, help="write the figures to this file, as JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for world_size in options.ranks:
        samples, nbytes = measure(world_size, options.scale, options.rounds, options.directory)
        found[str(world_size)] = {"bytes": nbytes, "samples": samples, "summary": summary(samples)}
        print(table(world_size, samples, nbytes).markdown(), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
