"""Blocking saves and loads: until durable, from the page cache, from the disk; and what the bare machine gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import measures, raw
from benchmarks.files import forget_cache, remove, warm_cache
from benchmarks.peers import Peer
from benchmarks.rounds import Figures, Samples, interleave, seconds
from benchmarks.workloads import Workload


def blocking_rounds(
    peers: Sequence[Peer], saved: Workload, live: Workload, directory: Path, rounds: int, tell: Callable[[str], None]
) -> Samples:
    """Measure every peer and the bare machine in each round.

    Args:
        peers: whom.
        saved: the state that is saved.
        live: another of the same structure, into which is loaded.
        directory: where checkpoints are made and removed.
        rounds: how many.
        tell: is told who is being measured.
    """
    turns: dict[str, Callable[[], Figures]] = {
        peer.name: partial(measure_peer, peer, saved, live, directory / "checkpoint") for peer in peers
    }
    turns |= machine_turns(directory / "raw", saved.nbytes)
    return interleave(turns, rounds, tell)


def measure_peer(peer: Peer, saved: Workload, live: Workload, path: Path) -> Figures:
    """One save, one load from the page cache, one load from the disk."""
    os.sync()  # what others left to write is not this peer's
    try:
        found = {measures.SAVE: seconds(lambda: peer.save(saved, path))}
        warm_cache(path)
        found[measures.HOT] = seconds(lambda: peer.load(live, path))
        forget_cache(path)
        found[measures.COLD] = seconds(lambda: peer.load(live, path))
    finally:
        remove(path)
    return found


def machine_turns(path: Path, nbytes: int) -> dict[str, Callable[[], Figures]]:
    """The bare disk and memory, under the measure that they bound."""
    return {
        measures.RAW_DIRECT: partial(_measure_disk, path, nbytes, raw.direct_write, raw.direct_read),
        measures.RAW_WRITE: partial(_measure_disk, path, nbytes, raw.buffered_write, None),
        measures.RAW_COPY: lambda: {measures.HOT: raw.memory_copy(nbytes, 1)},
    }


def _measure_disk(path: Path, nbytes: int, write: raw.Transfer, read: raw.Transfer | None) -> Figures:
    os.sync()
    try:
        figures = {measures.SAVE: write(path, nbytes), measures.COLD: read(path, nbytes) if read else None}
    finally:
        remove(path)
    return {measure: figure for measure, figure in figures.items() if figure is not None}
