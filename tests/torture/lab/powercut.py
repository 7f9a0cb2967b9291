"""Power cuts on real file systems: a process works, its file system is cut off, and what a new mount finds is judged.

A cut comes at a system call of the process, which brings it about itself (:mod:`lab.cutting`); or when the process has
said something, or at any time, and then it knows nothing of it.
"""

from __future__ import annotations

import enum
import random
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.storage.durable import open_directory
from lab.marks import GOING, Mark, Promises
from lab.mutants import Mutant
from lab.subject import Subjects
from lab.volumes import DROP_ALL, FLUSH_JOURNAL, Volume, cut_off, examine
from lab.workloads import WORKLOADS


class When(enum.Enum):
    """What a cut comes at."""

    BEFORE_CALL = "before system call"
    AFTER_CALL = "after system call"
    AT_MARK = "at mark"
    AT_TIME = "after microseconds"


@dataclass(frozen=True, slots=True)
class Length:
    """How much there is of a workload: system calls, marks, and time."""

    calls: int
    marks: int
    microseconds: int


@dataclass(frozen=True, slots=True)
class Plan:
    """When and how the power is cut.

    Attributes:
        when: what it comes at.
        moment: at which of those, from 0 on.
        flags: what still reaches the disk.
        kill: whether the process is killed, instead of going on against a dead disk.
    """

    when: When
    moment: int
    flags: int
    kill: bool

    @property
    def from_within(self) -> bool:
        """Whether the process under test does it."""
        return self.when in (When.BEFORE_CALL, When.AFTER_CALL)

    def fault(self, done: Path, mutant: list[str] | None) -> list[object] | None:
        """What is changed in the process under test; ``done`` is the file that says that the power is cut."""
        if not self.from_within:
            return None if mutant is None else ["mutate", *mutant]
        cut = [self.moment, self.when is When.AFTER_CALL, self.flags, self.kill, str(done)]
        return ["cut_power", *cut] if mutant is None else ["cut_power_of_mutant", mutant, *cut]


@dataclass(frozen=True, slots=True)
class Cut:
    """A power cut, and what came of it.

    Attributes:
        workload: what was being done.
        plan: when and how it was cut.
        options: what the file system was mounted with.
        failure: how the process ended, in its own words.
        problems: the promises that are broken.
    """

    workload: str
    plan: Plan
    options: str
    failure: str
    problems: list[str]

    def __str__(self) -> str:
        how = "the journal flushed" if self.plan.flags == FLUSH_JOURNAL else "nothing flushed"
        return (
            f"{self.workload}, cut {self.plan.when.value} {self.plan.moment}, {how}, mounted with '{self.options}', "
            f"ended with '{self.failure}': {'; '.join(self.problems)}"
        )


class PowerCuts:
    """Cuts, one after the other, on one volume.

    Args:
        subjects: starts the processes under test.
        volume: not mounted yet; it is mounted again after each cut.
        scratch: a directory elsewhere.
        seed: of everything that is left to chance. Only a cut at some time is not the same again with the same seed.
    """

    def __init__(self, subjects: Subjects, volume: Volume, scratch: Path, seed: int) -> None:
        self._subjects = subjects
        self._volume = volume
        self._scratch = scratch
        self._random = random.Random(seed)
        self._lengths: dict[str, Length] = {}
        self._options = volume.kind.options[0]
        volume.mount(self._options)

    def cut(self, workload: str, mutant: Mutant | None = None) -> Cut:
        """Cut the power while a workload, or a mutant of it, is being done, and judge what is left."""
        plan, options = self._plan(workload), self._options
        folder = Path(tempfile.mkdtemp(dir=self._volume.path))
        notes = Path(tempfile.mkdtemp(dir=self._scratch))
        changed = None if mutant is None else [mutant.kind, mutant.place, str(notes / "mutant")]
        watcher = _Watcher(plan, self._volume, notes / "cut")
        ended = self._subjects.run(
            workload,
            folder / "run",
            watch=watcher.watch,
            hear=watcher.hear,
            fault=plan.fault(notes / "cut", changed),
        )
        watcher.finish()
        self._volume.unmount()
        self._options = self._random.choice(self._volume.kind.options)
        self._volume.mount(self._options)
        promises = Promises.of([*ended.before, *watcher.said])
        problems = examine(WORKLOADS[workload].judge, folder / "run", promises)
        shutil.rmtree(folder)
        shutil.rmtree(notes)
        return Cut(workload, plan, options, ended.failure, problems)

    def _plan(self, workload: str) -> Plan:
        length = self._length(workload)
        when = self._random.choice(list(When))
        moments = {When.AT_MARK: length.marks, When.AT_TIME: length.microseconds}.get(when, length.calls)
        flags = self._random.choice([FLUSH_JOURNAL, DROP_ALL])
        return Plan(when, self._random.randrange(moments), flags, kill=self._random.random() < 0.5)

    def _length(self, workload: str) -> Length:
        """Learned by doing it once."""
        if workload not in self._lengths:
            folder = Path(tempfile.mkdtemp(dir=self._volume.path))
            notes = Path(tempfile.mkdtemp(dir=self._scratch))
            began: list[float] = []
            ended = self._subjects.run(
                workload,
                folder / "run",
                watch=lambda _: began.append(time.monotonic()),
                fault=["count_moments", str(notes / "calls")],
            )
            assert (ended.status, ended.failure) == (0, ""), f"{workload} fails by itself: {ended}"
            microseconds = int((time.monotonic() - began[0]) * 1e6)
            self._lengths[workload] = Length((notes / "calls").stat().st_size, len(ended.marks), microseconds)
            shutil.rmtree(folder)
            shutil.rmtree(notes)
        return self._lengths[workload]


class _Watcher:
    """Hears what a process says, and cuts its power where it does not do so itself.

    Attributes:
        said: what counts. An acknowledgement does even after the cut, since whoever gives one says that it is on the
            disk; only what was to go cannot be gone any more.
    """

    def __init__(self, plan: Plan, volume: Volume, done: Path) -> None:
        self.said: list[Mark] = []
        self._plan = plan
        self._volume = volume
        self._done = done
        self._ended = threading.Event()
        self._timer = threading.Thread(target=self._cut_in_time)

    def watch(self, _: int) -> None:
        """It begins."""
        if self._plan.when is When.AT_TIME:
            self._timer.start()

    def hear(self, mark: Mark) -> None:
        """It said something, and waits for an answer."""
        is_cut = self._done.exists()
        if mark.kind != GOING or not is_cut:
            self.said.append(mark)
        if self._plan.when is When.AT_MARK and len(self.said) > self._plan.moment and not is_cut:
            self._cut()

    def finish(self) -> None:
        """It ended; its power is cut now, where it did not come to the moment."""
        self._ended.set()
        if self._plan.when is When.AT_TIME:
            self._timer.join()
        if not self._done.exists():
            self._cut()

    def _cut_in_time(self) -> None:
        self._ended.wait(self._plan.moment / 1e6)
        self._cut()

    def _cut(self) -> None:
        with open_directory(str(self._volume.path)) as directory:
            cut_off(directory.fd, self._plan.flags)
        self._done.touch()
