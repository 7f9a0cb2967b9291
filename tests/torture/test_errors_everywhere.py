"""An error of the file system at each call of a save, of retention, of a replacement, and of reading.

Whatever fails, and wherever: a clear error, no promise broken, nothing left open or behind, and the process goes on.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.handling import SHORT
from lab.inject import ERRORS, MORE_ERRORS, Outcome, Place, cut_short, inject, places, wrong_after_error
from lab.states import new_state, number_of, numbered
from lab.subject import Subjects
from lab.workloads import WORKLOADS, name_of

import holdfast
from holdfast import Run
from holdfast.errors import CorruptCheckpointError, StorageError

Count = Callable[[int, int], int]
RecordProperty = Callable[[str, object], None]

EVERYTHING = ("pins and metrics", "frozen data linked", "replacing")
"""Between them they do all that there is to do to a disk; the others do it in other orders, and more often."""
LIKE_ENOSPC = ("EDQUOT", "EFBIG")
"""Treated like it everywhere, so that a sample does where there is little time."""
SEVERAL_PROCESSES = ("two writers", "a reader beside")
"""How often they call what depends on how far the other is: an error may come late, in the save afterwards, or not."""
SEVERAL_THREADS = ("background saves", "fall-back")


def chosen(workload: str, code: str, found: list[Place], full: bool) -> list[Place]:
    """Where to inject: at all calls in `make torture`; by default at all kinds of calls of the main workloads."""
    changes = [place for place in found if place.changes]
    if full:
        return found if code in ERRORS else changes
    if workload not in EVERYTHING or code not in ERRORS or code in LIKE_ENOSPC:
        return random.Random(workload + code).sample(changes, 2)
    kinds = {(before.name, place.kind): place for before, place in itertools.pairwise([changes[-1], *changes])}
    if code in ("EIO", "EMFILE"):  # nothing else can come of opening what is there
        kinds.update({("", place.kind): place for place in found if place.name == "openat" and not place.changes})
    return list(kinds.values())


@pytest.mark.slow
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("code", [*ERRORS, *MORE_ERRORS])
@pytest.mark.parametrize("workload", [workload for workload in WORKLOADS if WORKLOADS[workload].ours])
def test_an_error_at_each_call(
    workload: str, code: str, subjects: Subjects, scratch: Path, count: Count, record_property: RecordProperty
) -> None:
    """One call fails: the error says so or the call was one to do without, and then everything works again."""
    found = chosen(workload, code, places(subjects, workload, scratch), full=count(0, 1) == 1)
    wrong = {}
    for place in found:
        outcome = inject(subjects, workload, place, f"error={code}", scratch)
        if workload in SEVERAL_PROCESSES:
            problems = [*outcome.problems, *unclear(outcome)]
        else:
            problems = wrong_after_error(workload, place, code, outcome)
        if problems:
            wrong[str(place)] = problems
    record_property("count: errors injected", len(found))
    assert wrong == {}


@pytest.mark.slow
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("workload", SEVERAL_THREADS)
def test_errors_in_several_threads(
    workload: str, subjects: Subjects, scratch: Path, count: Count, record_property: RecordProperty
) -> None:
    """Each thread counts for itself, so an error comes again in each save: none of them breaks a promise."""
    found = [place for place in places(subjects, workload, scratch) if place.changes]
    cases = list(itertools.product(found, ERRORS))
    wrong = {}
    for place, code in random.Random(workload).sample(cases, min(count(15, 1000), len(cases))):
        outcome = inject(subjects, workload, place, f"error={code}", scratch, threads=True)
        problems = [*outcome.problems, *unclear(outcome)]
        if problems:
            wrong[f"{place} {code}"] = problems
        record_property("count: errors injected", 1)
    assert wrong == {}


def unclear(outcome: Outcome) -> list[str]:
    """What is wrong with an error that may have come more than once, late, or not at all."""
    handling = outcome.handling
    if handling is None:
        return [f"it ended with {outcome.ended.status}"]
    problems = [] if handling.clear else [f"not clear: {handling.kind}: {handling.message}\n{handling.where}"]
    if handling.again and not handling.again.startswith(("StorageError", "DiskFullError")):
        problems.append(f"the next save failed: {handling.again}")
    return problems + ([f"left open: {handling.descriptors}"] if handling.descriptors else [])


@pytest.mark.slow
@pytest.mark.parametrize("how", SHORT)
@pytest.mark.parametrize("workload", [workload for workload in WORKLOADS if WORKLOADS[workload].ours])
def test_short_writes(
    workload: str, how: str, subjects: Subjects, scratch: Path, count: Count, record_property: RecordProperty
) -> None:
    """The system writes less than it was asked to, always or once: the rest is written too."""
    wrong = {}
    cases: list[int | None] = [None, *range(count(1, 30))]
    for which in cases:
        outcome = cut_short(subjects, workload, how, which, scratch)
        assert outcome.handling is not None
        if outcome.problems or outcome.ended.failure or outcome.handling.again:
            wrong[which] = [*outcome.problems, outcome.ended.failure, outcome.handling.again]
    record_property("count: short writes", len(cases))
    assert wrong == {}


# ------------------------------------------------------------------------------------------------------------- reading

READING = ("open", "preadv", "listdir", "fstat", "flock")
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Refusing:
    """Lets one of the calls that read fail: the how manyth, and with which error."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.met = 0
        self.at = -1
        self.code = 0
        for name in READING:
            module = fcntl if name == "flock" else os
            patch.setattr(module, name, self._wrapped(getattr(module, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.met += 1
            if self.met - 1 == self.at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def newest(run: Path) -> int | None:
    """The number of the state of the newest checkpoint."""
    found = Run(run).latest()
    return None if found is None else found.step


def loaded(run: Path) -> int | None:
    """The number of the state that is loaded."""
    return number_of(holdfast.load(run / name_of(3)))


def mapped(run: Path) -> int | None:
    """The same, mapped."""
    return number_of(holdfast.load(run / name_of(3), mmap=True))


def restored(run: Path) -> int | None:
    """The number of the state that is restored."""
    state = new_state()
    holdfast.restore(run / name_of(3), state)
    return number_of({**state, "model": state["model"].state_dict()})


def verified(run: Path) -> int | None:
    """The step of the checkpoint that is verified."""
    checkpoint = Run(run)[3]
    checkpoint.verify()
    return checkpoint.step


@pytest.fixture
def run(scratch: Path) -> Path:
    """Three checkpoints."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    for seed in (1, 2, 3):
        Run(directory).save(numbered(seed), step=seed)
    return directory


@pytest.fixture
def _quiet() -> Iterator[None]:
    """What is passed over is warned of."""
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("holdfast").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("code", [*LIMITS, errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("use", [newest, loaded, mapped, restored, verified], ids=lambda use: use.__name__)
def test_an_error_at_each_call_of_reading(
    use: Callable[[Path], int | None],
    code: int,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: RecordProperty,
) -> None:
    """What cannot be read is said, and nothing else is given for it; a newest one that is broken is passed over."""
    open_descriptors = functools.partial(os.listdir, "/proc/self/fd")  # the real one
    calls = Refusing(monkeypatch)
    assert use(run) == 3
    total = calls.met
    calls.code = code
    outcomes = []
    for at in range(total):
        calls.at = -1
        descriptors = open_descriptors()
        calls.met, calls.at = 0, at
        try:
            outcomes.append(use(run))
        except StorageError as error:
            outcomes.append(None if os.strerror(code) in str(error) and str(run) in str(error.path) else -1)
        except CorruptCheckpointError:
            outcomes.append(None if code == errno.EIO else -1)  # a lost sector is damage
        calls.at = -1
        assert open_descriptors() == descriptors
    passed_over = {2} if use is newest and code not in LIMITS else set()
    assert set(outcomes) <= {3, None} | passed_over
    assert None in outcomes
    assert use(run) == 3
    record_property("count: errors injected", total)
