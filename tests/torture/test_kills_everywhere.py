"""SIGKILL at each call that changes something: what was acknowledged is there, and the next process goes on.

A kill loses nothing that was written. What is at stake is the order of things, locks, and what is left behind.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab.inject import Outcome, Place, inject, places
from lab.marks import MUST
from lab.subject import Subjects
from lab.workloads import WORKLOADS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("strace")]

TWO_WRITERS = "two writers"
BESIDE = (TWO_WRITERS, "a reader beside")
"""One process is killed, and the one beside it goes on."""


def shots(workload: str, found: list[Place], many: int) -> Iterator[tuple[Place, bool]]:
    """Where to kill, and whether with all threads: each place once by itself, then as long as it takes with threads."""
    order = random.Random(workload)
    for again in itertools.count():
        for place in order.sample(found, len(found)):
            many -= 1
            if many < 0:
                return
            yield place, again > 0 and workload not in BESIDE


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_kill_at_each_call(
    workload: str,
    subjects: Subjects,
    scratch: Path,
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """Nothing acknowledged is lost, nothing half is seen, the next start cleans up and saves; who is beside goes on."""
    found = [place for place in places(subjects, workload, scratch) if place.changes]
    wrong = {}
    killed = 0
    for place, threads in shots(workload, found, count(5, 480)):
        outcome = inject(subjects, workload, place, "signal=KILL", scratch, threads=threads)
        problems = [*outcome.problems, *wrong_beside(workload, outcome)]
        killed += outcome.ended.status == -9
        if problems:
            wrong[f"{place}{' with threads' if threads else ''}"] = problems
        if not threads and workload not in BESIDE:
            assert (outcome.met, outcome.ended.status) == (True, -9), place
    assert wrong == {}
    assert killed > 0
    record_property("count: SIGKILLs", killed)


def wrong_beside(workload: str, outcome: Outcome) -> list[str]:
    """Whether the process beside the one that was killed did all of its work."""
    acknowledged = {mark.seed for mark in outcome.ended.marks if mark.kind == MUST}
    if workload == TWO_WRITERS and not {34, 35} <= acknowledged:
        return [f"the other writer did not come to its end: {sorted(acknowledged)}"]
    return []
