"""Rounds: in each, everybody is measured once, in turning order, so that a slow minute of the disk hits all alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import raw
from benchmarks.peers import Peer, files, remove
from benchmarks.workloads import Workload

Samples = dict[str, dict[str, list[float]]]
"""Measure, then who, to one figure a round."""

SAVE, HOT, COLD = "durable save", "hot load", "cold load"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def run_rounds(
    peers: Sequence[Peer],
    make: Callable[[int], Workload],
    directory: Path,
    rounds: int,
    tell: Callable[[str], None],
) -> Samples:
    """Measure every peer and the bare machine in each round.

    Args:
        peers: whom.
        make: makes the workload from a seed.
        directory: where checkpoints are made and removed.
        rounds: how many.
        tell: is told what is being measured.
    """
    saved, live = make(1), make(2)
    for peer in peers:
        tell(f"checking {peer.name}")
        check(peer, saved, live, directory / "check")
    samples: Samples = {}
    for number in range(rounds):
        turn = number % len(peers)
        for peer in [*peers[turn:], *peers[:turn]]:
            tell(f"round {number + 1} of {rounds}: {peer.name}")
            for measure, seconds in measure_peer(peer, saved, live, directory / "checkpoint").items():
                samples.setdefault(measure, {}).setdefault(peer.name, []).append(seconds)
        tell(f"round {number + 1} of {rounds}: the bare machine")
        for (measure, name), figure in measure_machine(directory / "raw", saved.nbytes).items():
            if figure is not None:
                samples.setdefault(measure, {}).setdefault(name, []).append(figure)
    return samples


def measure_peer(peer: Peer, saved: Workload, live: Workload, path: Path) -> dict[str, float]:
    """One save, one load from the page cache, one load from the disk; in seconds."""
    os.sync()  # what others left to write is not this peer's
    try:
        times = {SAVE: _seconds(lambda: peer.save(saved, path))}
        _warm(path)
        times[HOT] = _seconds(lambda: peer.load(live, path))
        forget_cache(path)
        times[COLD] = _seconds(lambda: peer.load(live, path))
    finally:
        remove(path)
    return times


def measure_machine(path: Path, nbytes: int) -> dict[tuple[str, str], float | None]:
    """The bare disk and memory, under the measure that they bound."""
    os.sync()
    try:
        return {
            (SAVE, "raw: O_DIRECT + fsync"): raw.direct_write(path, nbytes),
            (COLD, "raw: O_DIRECT"): raw.direct_read(path, nbytes),
            (SAVE, "raw: write + fsync"): raw.buffered_write(path, nbytes),
            (HOT, "raw: memory copy"): raw.memory_copy(nbytes),
        }
    finally:
        remove(path)


def check(peer: Peer, saved: Workload, live: Workload, path: Path) -> None:
    """A wrong result does not compete: what is loaded must be what was saved, bit for bit."""
    with torch.no_grad():
        for tensor in live.tensors.values():
            tensor.zero_()
    try:
        peer.save(saved, path)
        peer.load(live, path)
    finally:
        remove(path)
    differing = [name for name in saved.tensors if not torch.equal(saved.tensors[name], live.tensors[name])]
    if differing:
        raise RuntimeError(f"{peer.name} loaded other values than were saved, first of {differing[0]}")


def forget_cache(path: Path) -> None:
    """Make the next reads come from the disk."""
    for file in files(path):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.access(DROP_CACHES, os.W_OK):
        try:
            DROP_CACHES.write_text("3")
        except OSError:  # in a container it may look writable; the advice above was given anyway
            return


def _warm(path: Path) -> None:
    for file in files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(raw.BLOCK):
                pass


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
