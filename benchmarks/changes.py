"""A state of which little changes: what the second save writes, and how long it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import measures
from benchmarks.background import BackgroundPeer
from benchmarks.checks import clear, compare
from benchmarks.files import remove, warm_cache
from benchmarks.rounds import Figures, Samples, interleave, seconds
from benchmarks.workloads import Workload


def changes_rounds(
    peers: Sequence[BackgroundPeer],
    saved: Workload,
    live: Workload,
    directory: Path,
    rounds: int,
    tell: Callable[[str], None],
) -> Samples:
    """Measure every peer in each round; arguments as for the blocking ones."""
    turns: dict[str, Callable[[], Figures]] = {
        peer.name: partial(measure_peer, peer, saved, live, directory / "changes") for peer in peers
    }
    return interleave(turns, rounds, tell)


def measure_peer(peer: BackgroundPeer, saved: Workload, live: Workload, directory: Path) -> Figures:
    """Two saves until durable, a change between them, and a load of the second one, which is compared."""
    os.sync()
    try:
        with peer.open(saved, directory) as session:
            first_s, _ = _save(session.save)
            saved.change()
            session.stepped()
            second_s, written = _save(session.save)
            clear(live)
            warm_cache(session.newest)
            load_s = seconds(lambda: session.load(live))
            compare(saved.tensors, live.tensors)
    finally:
        remove(directory)
    return {
        measures.FIRST_SAVE: first_s,
        measures.SECOND_SAVE: second_s,
        measures.SECOND_BYTES: written / saved.changing_bytes,
        measures.HOT: load_s,
    }


def _save(save: Callable[[], Callable[[], int]]) -> tuple[float, int]:
    start = time.perf_counter()
    written = save()()
    return time.perf_counter() - start, written
