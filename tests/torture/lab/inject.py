"""Errors and kills at each system call of a workload, put there by strace.

strace counts calls by name and by thread, so what is injected has to be done by one thread: see
:func:`lab.handling.in_one_thread`. Never with its ``--seccomp-bpf``: what it would not see is not injected either, and
nothing says so. Each run is therefore asked whether it met what was meant for it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.handling import HANDLED, Handling
from lab.marks import Promises
from lab.subject import Ended, Subjects
from lab.trace import Strace, StraceError, record_options
from lab.workloads import WORKLOADS

FULL = ("ENOSPC", "EDQUOT", "EFBIG")
ERRORS = (*FULL, "EIO", "EMFILE")
MORE_ERRORS = ("EACCES", "EROFS", "EINTR")

_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_HEX = re.compile(r"((?:\\x[0-9a-f]{2})+)")
_RANDOM = re.compile(r"[0-9a-f]{16}")
_HARMLESS = ("lseek", "sync_file_range")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One system call of a workload.

    Attributes:
        name: its name.
        number: the how manyth of that name it is, from 1.
        files: what it is about, without what differs from run to run.
        changes: whether it may change what is on the disk, or make it durable.
    """

    name: str
    number: int
    files: tuple[str, ...]
    changes: bool

    @property
    def kind(self) -> tuple[str, ...]:
        """Equal for calls that do the same to another checkpoint."""
        return (self.name, *(re.sub(r"\d+", "#", file) for file in self.files))

    def __str__(self) -> str:
        return f"{self.name} {self.number} ({', '.join(self.files)})"


@dataclass(slots=True)
class Outcome:
    """What came of injecting something.

    Attributes:
        ended: how the process ended.
        met: whether the call was come by.
        handling: what the process said of the error; None when it could not.
        problems: promises that are broken.
    """

    ended: Ended
    met: bool
    handling: Handling | None
    problems: list[str] = field(default_factory=list)


def places(subjects: Subjects, workload: str, scratch: Path) -> list[Place]:
    """The system calls of a workload that touch its directory, in order, when all goes well."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    output = folder / "calls"
    fault = ["in_one_thread", str(folder / "failures")]
    process, ended = _watched(subjects, workload, folder, record_options(), follow=True, fault=fault)
    if ended.status != 0 or (folder / "failures").exists():
        raise StraceError(f"{workload}: {ended.failure}")
    recording = output.read_text(encoding="ascii", errors="replace")
    found = list(_places(recording, process, str(folder / "run")))
    shutil.rmtree(folder)
    return found


def _places(recording: str, process: int, directory: str) -> Iterator[Place]:
    counts: Counter[str] = Counter()
    for line in recording.splitlines():
        match = _CALL.match(line)
        if match is None or int(match[1]) != process:
            continue  # of a process beside it, or a signal
        counts[match[2]] += 1
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in _HEX.findall(match[3])]
        if not any(text.startswith(directory.encode()) for text in texts) or match[2] == "sendto":
            continue
        paths = [text.decode() for text in texts if not text.startswith(b"{") and b"\0" not in text]  # no data
        files = tuple(_RANDOM.sub("*", path.replace(directory, "~")) for path in paths)
        changes = match[2] not in _HARMLESS and (match[2] != "openat" or "O_CREAT" in line)
        yield Place(match[2], counts[match[2]], files, changes)


def inject(
    subjects: Subjects, workload: str, place: Place, what: str, scratch: Path, *, threads: bool = False
) -> Outcome:
    """Inject something into a call of a workload, and have what is left judged.

    Args:
        subjects: what starts the process.
        workload: its name.
        place: the call.
        what: in the words of strace, such as ``error=EIO`` or ``signal=KILL``.
        scratch: a directory for it.
        threads: with all its threads, each of which counts for itself: several may be hit, and none need be.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    options = ["-e", f"trace={place.name}", "-e", f"inject={place.name}:{what}:when={place.number}"]
    fault = ["in_several_threads" if threads else "in_one_thread", str(folder / "failures")]
    afterwards = ["save_again", WORKLOADS[workload].run]
    _, ended = _watched(subjects, workload, folder, options, follow=threads, fault=fault, afterwards=afterwards)
    outcome = judged(workload, folder, ended)
    text = (folder / "calls").read_text(encoding="ascii", errors="replace")
    outcome.met = "(INJECTED)" in text or "killed by SIGKILL" in text
    shutil.rmtree(folder)
    return outcome


def cut_short(subjects: Subjects, workload: str, how: str, which: int | None, scratch: Path) -> Outcome:
    """Have the system write less than it is asked to, see :func:`lab.handling.with_short_writes`."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    (folder / "run").mkdir()
    fault = ["with_short_writes", how, which]
    afterwards = ["save_again", WORKLOADS[workload].run]
    ended = subjects.run(workload, folder / "run", fault=fault, afterwards=afterwards)
    outcome = judged(workload, folder, ended)
    shutil.rmtree(folder)
    return outcome


def _watched(
    subjects: Subjects, workload: str, folder: Path, options: list[str], *, follow: bool, **order: Any
) -> tuple[int, Ended]:
    """The process that did it, and how it ended."""
    (folder / "run").mkdir()
    watching: list[tuple[int, Strace]] = []

    def watch(pid: int) -> None:
        watching.append((pid, Strace(pid, options, folder / "calls", follow=follow)))

    ended = subjects.run(workload, folder / "run", watch=watch, **order)
    if not watching:
        raise StraceError(f"{workload} ended before it began: {ended.failure}")
    [(process, strace)] = watching
    strace.end()
    return process, ended


def judged(workload: str, folder: Path, ended: Ended) -> Outcome:
    """What the workload's judge says of what a process left in ``folder / "run"``."""
    said = [mark.name for mark in ended.marks if mark.kind == HANDLED]
    handling = Handling.parse(said[-1]) if said else None
    problems = WORKLOADS[workload].judge.problems(folder / "run", Promises.of(ended.said))
    failures = folder / "failures"
    if failures.exists():
        problems.append(f"the process beside it failed: {failures.read_text()}")
    return Outcome(ended, True, handling, problems)


# ------------------------------------------------------------------------------------------------------ what must hold


def wrong_after_error(workload: str, place: Place, code: str, outcome: Outcome) -> list[str]:
    """What is wrong with how a process came through one error; nothing when all is as it must be."""
    problems = list(outcome.problems)
    if not outcome.met:
        problems.append("the call was not come by")
    handling = outcome.handling
    if handling is None:
        return [*problems, f"it ended with {outcome.ended.status}"]
    if not handling.kind and not _may_succeed(place, code):
        problems.append("it succeeded")
    if not handling.clear:
        problems.append("the error is not clear")
    if code in FULL and place.changes and handling.kind and not handling.full:
        problems.append("it does not say that the disk is full")
    if handling.again:
        problems.append(f"the next save failed: {handling.again}")
    if handling.descriptors:
        problems.append(f"left open: {handling.descriptors}")
    unexpected = [name for name in handling.litter if not _may_be_left(workload, name)]
    if unexpected or handling.litter_in_the_end:
        problems.append(f"left behind: {unexpected}, after cleaning up: {handling.litter_in_the_end}")
    if problems:
        problems.append(f"the error was {handling.kind}: {handling.message}\n{handling.where}")
    return problems


def _may_succeed(place: Place, code: str) -> bool:
    """Whether the call is one that a save can do without, or that is tried again."""
    if code == "EINTR" or not place.changes:
        return True
    of_the_log = any(file.endswith("events.jsonl") for file in place.files)
    return of_the_log or (place.name == "linkat" and code == "EACCES")


def _may_be_left(workload: str, name: str) -> bool:
    """A removal that failed is finished at the next start; so is that of what was replaced. A save leaves nothing."""
    return name.startswith((".trash-", ".aside-")) or (workload.startswith("replacing") and name.startswith(".tmp-"))
