"""Crashes of disks with volatile caches below real file systems: whatever was acknowledged is there afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.blocklog import Recording, record
from lab.mutants import Mutant
from lab.replay import replay
from lab.subject import Subjects
from lab.volumes import KINDS, Kind, Volume, VolumeError
from lab.workloads import WORKLOADS

Count = Callable[[int, int], int]
MakeVolume = Callable[[str], Volume]
NotePlaces = Callable[[str], list[str]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "full"), [("ext4", 4000), ("xfs", 3000), ("btrfs", 3000)])
def test_no_promise_is_broken_by_a_crash_of_the_disk(
    kind: str,
    full: int,
    subjects: Subjects,
    volume: MakeVolume,
    scratch: Path,
    count: Count,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever part of what was written since the last flush is there: what was acknowledged is whole."""
    mounted = volume(kind)
    recordings, states = count(1, 4), count(3, full)
    workloads = list(WORKLOADS)[: count(1, len(WORKLOADS))]
    options = itertools.cycle(KINDS[kind].options)
    broken: list[str] = []
    found = 0
    for seed in range(recordings):
        recording = _record(subjects, KINDS[kind], workloads, scratch, options=next(options))
        findings = replay(recording, mounted, most=states // recordings, seed=seed)
        broken += findings.broken
        found += findings.states
    assert (found, broken) == (states, [])
    record_property(f"count: block-log states on {kind}", states)


@pytest.mark.slow
def test_crashes_of_the_disk_reveal_a_missing_sync(
    subjects: Subjects, volume: MakeVolume, scratch: Path, count: Count, needed_syncs: NotePlaces
) -> None:
    """Without any one sync of a file, or the last one of a directory, something is soon lost."""
    workload = "save beside others"
    missed = []
    for kind in list(KINDS)[: count(1, len(KINDS))]:
        mounted = volume(kind)
        for place in needed_syncs(workload)[: count(1, 3)]:
            fault = ["mutate", "skip", place, str(scratch / "mutated")]
            recording = _record(subjects, KINDS[kind], [workload], scratch, fault=fault)
            findings = replay(recording, mounted, most=count(80, 200), seed=1, enough=1)
            if not findings.broken:
                missed.append((kind, str(Mutant("skip", place))))
    assert missed == []


def _record(
    subjects: Subjects, kind: Kind, workloads: list[str], scratch: Path, *, options: str = "", **order: object
) -> Recording:
    try:
        return record(subjects, kind, workloads, scratch, options=options, **order)
    except VolumeError as error:
        pytest.skip(str(error))
