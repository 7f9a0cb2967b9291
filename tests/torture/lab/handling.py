"""How a process under test comes through an error: what it says of the error, what it left, and whether it can go on.

What stands here runs in that process.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from holdfast import Run
from holdfast.errors import DiskFullError, HoldfastError, StorageError
from holdfast.storage import reading, writing
from holdfast.storage.local import LocalStore
from holdfast.writer import Writer
from lab import workloads
from lab.marks import Mark, Marks
from lab.states import numbered

T = TypeVar("T")

HANDLED = "handled"
AGAIN = 900
"""The step, and the number of the state, of the save after the error."""
LITTER = (".tmp-0", ".trash-", ".aside-", ".probe-", ".annotations.json.")
SHORT = ("one byte", "half", "all but one")

_descriptors: set[str] = set()


@dataclass(frozen=True, slots=True)
class Handling:
    """What a process says of an error and of itself after it.

    Attributes:
        kind: the name of the error's class; empty when there was none.
        message: the error in words.
        clear: whether it is an error of Holdfast that has a path and, where the file system refused, a cause.
        full: whether it says that the disk is full.
        litter: what lies in the run that belongs to no checkpoint.
        litter_in_the_end: the same, after this process cleaned up.
        descriptors: what is open that was not open before.
        again: why the next save failed; empty when it did not.
        where: the end of the traceback, for whoever looks at it.
    """

    kind: str
    message: str
    clear: bool
    full: bool
    litter: list[str]
    litter_in_the_end: list[str]
    descriptors: list[str]
    again: str
    where: str

    @classmethod
    def parse(cls, text: str) -> Handling:
        """As it was said."""
        return cls(**json.loads(text))


# ----------------------------------------------------------------------------------------------------- before it begins


def in_one_thread(_: Path, failures: str = "") -> None:
    """Everything is done by one thread, so that the n-th call of a name is the same in each run.

    Args:
        failures: a file that is made when a process beside this one fails.
    """
    writing.MAX_THREADS = 1
    reading.default_threads = lambda: 1  # type: ignore[attr-defined]
    Writer._start = _at_once  # type: ignore[assignment, method-assign]
    in_several_threads(_, failures)


def in_several_threads(_: Path, failures: str = "") -> None:
    """Everything is done as it always is; only what is open is noted."""
    if failures:
        workloads.traceback.print_exc = lambda: Path(failures).write_text(traceback.format_exc())  # type: ignore[attr-defined]
    gc.freeze()  # what is there before is no matter of whoever collects garbage later
    _descriptors.update(_open_now())


def with_short_writes(directory: Path, how: str, which: int | None = None) -> None:
    """The system writes less than it was asked to: at each write, or only at one.

    Args:
        directory: of the workload.
        how: one of :data:`SHORT`.
        which: the number of the write; all of them by default.
    """
    in_one_thread(directory)
    numbers = itertools.count()
    real_write, real_pwritev = os.write, os.pwritev

    def length(whole: int) -> int:
        if whole < 2 or which not in (None, next(numbers)):
            return whole
        return {"one byte": 1, "half": whole // 2, "all but one": whole - 1}[how]

    def write(fd: int, data: memoryview) -> int:
        return real_write(fd, memoryview(data)[: length(len(data))])

    def pwritev(fd: int, views: Sequence[memoryview], offset: int) -> int:
        left = length(sum(map(len, views)))
        some = []
        for view in views:
            some.append(memoryview(view)[:left])
            left -= len(some[-1])
        return real_pwritev(fd, some, offset)

    os.write, os.pwritev = write, pwritev  # type: ignore[assignment]


def _at_once(_: Writer, work: Callable[[], None]) -> bool:
    work()
    return True


# ----------------------------------------------------------------------------------------------------------- afterwards


def save_again(directory: Path, marks: Marks, error: BaseException | None, place: str = "") -> None:
    """Say how the error was handled, clean up, and save once more.

    Args:
        directory: of the workload.
        marks: where to say it.
        error: that ended the work; None when none did.
        place: the run, within the directory.
    """
    where = "" if error is None else "".join(traceback.format_exception(error)[-6:])
    kind, message = ("", "") if error is None else (type(error).__name__, str(error))
    clear, full = _is_clear(error), isinstance(error, DiskFullError)
    _forget(error)
    open_now = _twice(_open_now)
    descriptors = [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in open_now - _descriptors]
    run = Run(directory / place)
    litter = _twice(lambda: _litter(run.store))
    again = ""
    try:
        _twice(run.store.clean)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = workloads.name_of(AGAIN)
            marks.may(name, AGAIN)
            run.save(numbered(AGAIN), step=AGAIN)
            marks.must(name, AGAIN)
    except Exception as failure:  # noqa: BLE001 - whoever watches is told
        again = f"{type(failure).__name__}: {failure}"
    in_the_end = _twice(lambda: _litter(run.store))
    handling = Handling(kind, message, clear, full, litter, in_the_end, descriptors, again, where)
    marks.say(Mark(HANDLED, json.dumps(asdict(handling))))


def _twice(look: Callable[[], T]) -> T:
    """Look again after an error: where several threads count, what is injected may come only now, and comes once."""
    try:
        return look()
    except OSError:
        return look()


def _is_clear(error: BaseException | None) -> bool:
    """Whether it says what was refused, where, and why."""
    if error is None:
        return True
    if not isinstance(error, HoldfastError) or error.path is None or error.path not in str(error):
        return False
    if not isinstance(error, StorageError):
        return True
    code = error.errno
    return code in errno.errorcode and os.strerror(code or 0) in str(error) and str(error).startswith("cannot ")


def _forget(error: BaseException | None) -> None:
    """Let go of the frames that it holds, and with them of what they have open."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()


def _open_now() -> set[str]:
    names = os.listdir("/proc/self/fd")  # noqa: PTH208 - of descriptors there are only names
    return {name for name in names if Path(f"/proc/self/fd/{name}").is_symlink()}


def _litter(store: LocalStore) -> list[str]:
    """Of the run, and within its checkpoints."""
    names = store.names()
    inside: list[Any] = [path.name for name in names for path in Path(store.path, name).glob(".annotations.json.*")]
    return sorted(name for name in [*names, *inside] if name.startswith(LITTER))
