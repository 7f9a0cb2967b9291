"""Whenever the machine stops, whatever of the unsynced changes had reached the disk: no promise is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lab.explore import explore, record
from lab.subject import Subjects
from lab.workloads import WORKLOADS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("strace")]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_promise_is_broken_on_any_disk_that_a_crash_may_leave(
    workload: str,
    subjects: Subjects,
    scratch: Path,
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """What was acknowledged loads bit for bit, nothing torn is seen, and the next start cleans up and saves.

    Where there are very many, the next start is made on every fifth.
    """
    states = 0
    for variant in range(count(1, 6)):
        recording = record(subjects, workload, scratch, variant)
        assert (recording.ended.status, recording.ended.failure, recording.unlike) == (0, "", [])
        findings = explore(recording, scratch, most=count(200, 1_500), aftermath_every=count(1, 5))
        assert [str(violation) for violation in findings.violations] == []
        states += findings.states
    record_property("count: crash states", states)
    assert states > 50
