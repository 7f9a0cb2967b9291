"""The laboratory can fail: each thing that makes a save safe, taken away or moved, is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.explore import explore, record
from lab.mutants import Mutant, mutants_of
from lab.subject import Subjects
from lab.workloads import WORKLOADS

pytestmark = pytest.mark.usefixtures("strace")


def places(subjects: Subjects, scratch: Path) -> dict[str, list[str]]:
    """Where something is made durable or renamed, and the workloads that come by there."""
    found: dict[str, list[str]] = {}
    for number, workload in enumerate(WORKLOADS):
        directory, output = scratch / f"places-{number}", scratch / f"places-{number}.json"
        directory.mkdir()
        ended = subjects.run(workload, directory, fault=["note_places", str(output)])
        assert ended.failure == ""
        for place in dict.fromkeys(map(json.loads, output.read_text().splitlines())):
            found.setdefault(place, []).append(workload)
    return found


def noticed(mutant: Mutant, workloads: list[str], subjects: Subjects, scratch: Path) -> Iterator[str]:
    """The promises that the mutant breaks, in words; none when it was not noticed."""
    met = scratch / "met"
    for workload in workloads:
        recording = record(subjects, workload, scratch, fault=["mutate", mutant.kind, mutant.place, str(met)])
        if recording.ended.failure:
            yield recording.ended.failure
        quick = WORKLOADS[workload].judge.at_first_sight()
        for violation in explore(recording, scratch, judge=quick, enough=1).violations:
            yield from violation.problems
    assert met.exists(), f"nothing came by {mutant.place}"
    met.unlink()


def test_every_mutant_of_the_commit_protocol_is_noticed(
    subjects: Subjects, scratch: Path, record_property: Callable[[str, object], None]
) -> None:
    """A sync left out or made too late, a rename that is not one step: each breaks a promise on some disk."""
    found = places(subjects, scratch)
    survivors = []
    mutants = 0
    for place, workloads in found.items():
        for mutant in mutants_of(place):
            mutants += 1
            if next(noticed(mutant, workloads, subjects, scratch), None) is None:
                survivors.append(str(mutant))
    record_property("count: mutants of the commit protocol", mutants)
    assert survivors == []
    assert mutants >= 20
