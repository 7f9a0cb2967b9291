"""Power cuts on real file systems: whatever was acknowledged is there when they are mounted again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lab.mutants import Mutant
from lab.powercut import PowerCuts
from lab.subject import Subjects
from lab.volumes import Volume
from lab.workloads import WORKLOADS

FILE_SYSTEMS = ["ext4", "xfs"]  # the two that can be cut off at any moment

Count = Callable[[int, int], int]
MakeVolume = Callable[[str], Volume]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_no_promise_is_broken_by_a_power_cut(
    kind: str,
    subjects: Subjects,
    volume: MakeVolume,
    scratch: Path,
    count: Count,
    record_property: Callable[[str, object], None],
) -> None:
    """Whatever is being done, and whenever it is cut: what was acknowledged is whole, and all else is as it may be."""
    power = PowerCuts(subjects, volume(kind), scratch, seed=1)
    names = list(WORKLOADS)
    rounds = count(25, 1000)
    cuts = [power.cut(names[index % len(names)]) for index in range(rounds)]
    assert [str(cut) for cut in cuts if cut.problems] == []
    record_property(f"count: power cuts on {kind}", rounds)


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_power_cuts_reveal_a_missing_sync(
    kind: str, subjects: Subjects, volume: MakeVolume, scratch: Path, needed_syncs: Callable[[str], list[str]]
) -> None:
    """Without any one sync of a file, or the last one of a directory, something is soon lost.

    The others are kept by what these file systems do beyond what they promise; :mod:`lab.explore` is for those.
    """
    workload = "save beside others"
    power = PowerCuts(subjects, volume(kind), scratch, seed=1)
    mutants = [Mutant("skip", place) for place in needed_syncs(workload)]
    missed = [mutant for mutant in mutants if not any(power.cut(workload, mutant).problems for _ in range(40))]
    assert (len(mutants), missed) == (3, [])
