"""One peer under all tests."""

from __future__ import annotations

import copy
import importlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.crashes import Choice, Crash, Durable
from lab.disk import Sync
from lab.explore import Recording, record, sample
from lab.subject import Subjects

from peers.cuts import FILE_SYSTEMS, Cuts
from peers.peer import Peer, installed
from peers.verdict import Tally, harms

ADAPTERS = (
    *("with_torch", "with_safetensors", "with_dcp", "with_torch_checkpointing", "with_lightning", "with_accelerate"),
    *("with_torchsnapshot", "with_orbax", "with_holdfast"),
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is done.

    Attributes:
        states: after a power cut, a sample where there are more.
        seed: of the sample.
        cuts: real ones, on each file system.
        scratch: where it is done, best in memory.
    """

    states: int
    seed: int
    cuts: int
    scratch: Path


@dataclass(slots=True)
class Measured:
    """What came of one peer.

    Attributes:
        name: the peer's.
        package: and its version.
        possible: after a power cut that may leave whatever POSIX allows.
        killed: after a kill: whatever was done is there, up to some system call.
        cuts: after real power cuts, by file system.
        failure: why it could not be measured; empty when it could.
    """

    name: str
    package: str = ""
    possible: Tally = field(default_factory=Tally)
    killed: Tally = field(default_factory=Tally)
    cuts: dict[str, Tally] = field(default_factory=dict)
    failure: str = ""


def peers_of(adapter: str) -> tuple[Peer, ...]:
    """Those of one module; imports what they need."""
    peers: tuple[Peer, ...] = importlib.import_module(f"peers.adapters.{adapter}").PEERS
    return peers


def measure(adapter: str, bounds: Bounds) -> list[Measured]:
    """All peers of one module."""
    scratch = Path(tempfile.mkdtemp(dir=bounds.scratch))
    with Subjects(workloads=f"peers.adapters.{adapter}") as subjects:
        results = [_measure(peer, subjects, bounds, scratch) for peer in peers_of(adapter)]
    shutil.rmtree(scratch)
    return results


def _measure(peer: Peer, subjects: Subjects, bounds: Bounds, scratch: Path) -> Measured:
    measured = Measured(peer.name, f"{peer.package} {installed(peer.package)}")
    recording = record(subjects, peer.name, scratch)
    measured.failure = recording.ended.failure or "; ".join(recording.unlike)
    if measured.failure:
        return measured
    measured.possible = judged(peer, sample(recording, bounds.states, bounds.seed), scratch)
    measured.killed = judged(peer, distinct(kills(recording)), scratch)
    if bounds.cuts:
        cuts = Cuts(subjects, peer, scratch)
        measured.cuts = {kind: cuts.tally(kind, bounds.cuts) for kind in FILE_SYSTEMS}
    return measured


def judged(peer: Peer, crashes: Iterable[Crash], scratch: Path) -> Tally:
    """What states show."""
    tally = Tally()
    for crash in crashes:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        crash.build(folder)
        tally.add(harms(peer, folder, crash.promises))
        shutil.rmtree(folder)
    return tally


def kills(recording: Recording) -> Iterator[Crash]:
    """What a kill leaves after each event: all that was done before, in its order."""
    disk = Durable(recording.before)
    for moment, event in enumerate(recording.events, 1):
        disk.hear(event)
        disk.hear(Sync(None))
        files = disk.files(Choice(frozenset(), {}, {}))
        yield Crash(moment, "all that was done", files, copy.deepcopy(disk.promises))


def distinct(crashes: Iterable[Crash]) -> Iterator[Crash]:
    """Each different one once."""
    seen: set[bytes] = set()
    for crash in crashes:
        digest = crash.digest()
        if digest not in seen:
            seen.add(digest)
            yield crash
