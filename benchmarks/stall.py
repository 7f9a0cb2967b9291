"""Background saves without a training beside them: how long ``save()`` keeps the caller, and when all is durable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import measures, raw
from benchmarks.background import BackgroundPeer
from benchmarks.files import remove
from benchmarks.rounds import Figures, Samples, interleave
from benchmarks.workloads import Workload


def background_rounds(
    peers: Sequence[BackgroundPeer], saved: Workload, directory: Path, rounds: int, tell: Callable[[str], None]
) -> Samples:
    """Measure every peer and the memory in each round; arguments as for the blocking ones."""
    turns: dict[str, Callable[[], Figures]] = {
        peer.name: partial(measure_peer, peer, saved, directory / "background") for peer in peers
    }
    turns[measures.RAW_COPY] = lambda: {measures.STALL: raw.memory_copy(saved.nbytes, 1)}
    turns[measures.RAW_COPY_2] = lambda: {measures.STALL: raw.memory_copy(saved.nbytes, 2)}
    return interleave(turns, rounds, tell)


def measure_peer(peer: BackgroundPeer, saved: Workload, directory: Path) -> Figures:
    """A first save, which makes what later ones reuse, and a second one, of other values."""
    os.sync()
    found: Figures = {}
    try:
        with peer.open(saved, directory) as session:
            for stall in (measures.FIRST_STALL, measures.STALL):
                saved.change()
                session.stepped()
                start = time.perf_counter()
                wait = session.save()
                found[stall] = time.perf_counter() - start
                wait()
                found[measures.DURABLE] = time.perf_counter() - start
    finally:
        remove(directory)
    return found
