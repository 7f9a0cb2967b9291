"""Records a workload, builds the disks that a crash could leave, and has each judged."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.crashes import Crash, crashes
from lab.disk import Event, Recorder, Snapshot, differences
from lab.judge import Judge
from lab.states import use_variant
from lab.subject import Ended, Subjects
from lab.trace import Strace, StraceError, calls, record_options
from lab.workloads import WORKLOADS

ENDING = 0.05
"""When twice as many combinations give no more new disks than this share of what is wanted, there are hardly more."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What a workload did to its disk.

    Attributes:
        workload: its name.
        before: what was there before, durable.
        events: what happened.
        ended: how the process ended, and all that it said.
        unlike: where the model of the disk ended unlike the real one: must be empty.
        variant: how large its states are.
    """

    workload: str
    before: Snapshot
    events: list[Event]
    ended: Ended
    unlike: list[str]
    variant: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """A disk that breaks promises."""

    crash: Crash
    problems: list[str]

    def __str__(self) -> str:
        files = ", ".join(path for path, content in self.crash.files.items() if content is not None)
        return f"after {self.crash.moment} events, with {self.crash.choice}: {'; '.join(self.problems)}\n  {files}"


def record(subjects: Subjects, workload: str, scratch: Path, variant: int = 0, **order: Any) -> Recording:
    """Have a process do a workload under strace.

    Args:
        subjects: what starts it.
        workload: its name.
        scratch: a directory for what is recorded.
        variant: how large the states are.
        order: more for the process under test.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    directory, output = folder / "run", folder / "calls"
    directory.mkdir()
    watching: list[tuple[Recorder, Strace]] = []

    def watch(pid: int) -> None:
        watching.append((Recorder(directory), Strace(pid, record_options(), output)))

    ended = subjects.run(workload, directory, watch=watch, variant=variant, **order)
    if not watching:
        raise StraceError(f"{workload} ended before it began: {ended.failure}")
    [(recorder, strace)] = watching
    strace.end()
    for call in calls(output.read_text(encoding="ascii", errors="replace")):
        recorder.hear(call)
    unlike = differences(recorder.tree, directory)
    shutil.rmtree(folder)
    return Recording(workload, recorder.before, recorder.events, ended, unlike, variant)


@dataclass(slots=True)
class Findings:
    """What came of looking at many disks."""

    states: int = 0
    violations: list[Violation] = field(default_factory=list)


def explore(
    recording: Recording,
    scratch: Path,
    *,
    most: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    enough: int = 10,
    aftermath_every: int = 1,
) -> Findings:
    """Judge the disks that a crash may leave.

    Args:
        recording: of a workload.
        scratch: a directory in which they are built, best in memory.
        most: how many different ones, a sample where there are more; by default all of the plain cases.
        seed: of everything that is left to chance.
        judge: by default the workload's own.
        enough: stop after so many that break promises.
        aftermath_every: start again only on one of so many.
    """
    judge = WORKLOADS[recording.workload].judge if judge is None else judge
    judges = [judge, *[judge.at_first_sight()] * (aftermath_every - 1)]
    use_variant(recording.variant)
    findings = Findings()
    for crash in sample(recording, most, seed):
        folder = Path(tempfile.mkdtemp(dir=scratch))
        crash.build(folder)
        problems = judges[findings.states % len(judges)].problems(folder, crash.promises)
        shutil.rmtree(folder)
        findings.states += 1
        if problems:
            findings.violations.append(Violation(crash, problems))
            if len(findings.violations) >= enough:
                break
    return findings


def sample(recording: Recording, most: int | None, seed: int) -> Iterator[Crash]:
    """``most`` different disks, of all moments, or as many as there are."""

    def every(rounds: int) -> Iterator[Crash]:
        return crashes(recording.before, recording.ended.before, recording.events, seed, rounds)

    rounds = 0
    first_of = _distinct(every(rounds))
    if most is None:
        most = len(first_of)
    fresh = most
    while len(first_of) < most and fresh > ENDING * most:
        rounds = max(2 * rounds, 1 + 2 * (most - len(first_of)) // len(recording.events))
        fresh = -len(first_of)
        first_of = _distinct(every(rounds))
        fresh += len(first_of)
    chosen = set(random.Random(seed).sample(first_of, min(most, len(first_of))))
    return (crash for index, crash in enumerate(every(rounds)) if index in chosen)


def _distinct(found: Iterator[Crash]) -> list[int]:
    """The indexes of those that come for the first time."""
    seen: dict[bytes, int] = {}
    for index, crash in enumerate(found):
        seen.setdefault(crash.digest(), index)
    return list(seen.values())
