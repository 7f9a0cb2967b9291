"""Power cuts that the process under test brings about itself, at a given one of its system calls.

The durable module sees a proxy of ``os`` whose calls that change a disk are counted, over all threads and processes;
before or after the call whose turn it is, the file system is cut off. The process then goes on against a dead disk, or
is killed at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from holdfast.storage import durable
from lab.mutants import mutate
from lab.volumes import cut_off

CALLS = ("mkdir", "write", "pwritev", "fsync", "link", "rename", "unlink", "rmdir")
"""Of ``os``: whatever the durable module changes a disk with, beside ``open``, which only sometimes does."""
FUNCTIONS = ("_renameat2", "_fallocate", "begin_writeback")
"""Of the durable module: what it has the C library do."""

Hook = Callable[[], None]


def count_moments(_: Path, output: str) -> None:
    """Append a byte to a file for each call, to learn how many there are."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def count() -> None:
        os.write(fd, b".")

    _surround(before=count, after=_nothing)


def cut_power(directory: Path, moment: int, after: bool, flags: int, die: bool, done: str) -> None:
    """Cut off the file system at a call.

    Args:
        directory: on the file system.
        moment: the number of the call, from 0 on.
        after: whether the call is made before.
        flags: what still reaches the disk.
        die: whether the process is killed then.
        done: the path of a file, elsewhere, that says that it was done.
    """
    fd = os.open(_existing(directory), os.O_RDONLY)
    calls = get_context("fork").Value("L", 0)

    def cut() -> None:
        cut_off(fd, flags)
        Path(done).touch()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        with calls.get_lock():
            turn = calls.value == moment
            calls.value += 1
        if turn and not after:
            cut()  # without the lock: others go on, and this process may be killed here

    def behind() -> None:
        if after and calls.value > moment and not Path(done).exists():
            cut()

    _surround(before=before, after=behind)


def cut_power_of_mutant(directory: Path, mutant: tuple[str, str, str], *cut: Any) -> None:
    """The same, of a process that is a mutant: how and where, and the file in which it is noted."""
    cut_power(directory, *cut)
    mutate(directory, *mutant)  # around what counts: a place is known by the functions right above it


class _Surrounded:
    """``os`` with something before and after the calls that change a disk."""

    def __init__(self, before: Hook, after: Hook) -> None:
        for name in CALLS:
            setattr(self, name, _around(getattr(os, name), before, after))
        self._create = _around(os.open, before, after)

    def open(self, path: str, flags: int, *args: Any, **options: Any) -> int:
        """Counts when it makes a file."""
        opened: int = (self._create if flags & os.O_CREAT else os.open)(path, flags, *args, **options)
        return opened

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _surround(before: Hook, after: Hook) -> None:
    vars(durable)["os"] = _Surrounded(before, after)
    for name in FUNCTIONS:
        setattr(durable, name, _around(getattr(durable, name), before, after))


def _around(real: Callable[..., Any], before: Hook, after: Hook) -> Callable[..., Any]:
    def surrounded(*args: Any, **options: Any) -> Any:
        before()
        result = real(*args, **options)
        after()
        return result

    return surrounded


def _nothing() -> None:
    pass


def _existing(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return path if path.exists() else _existing(path.parent)
