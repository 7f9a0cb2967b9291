"""Mutants of the commit protocol: each breaks one thing that makes it safe. The laboratory has to notice every one.

They are found, not listed: a workload is run once to see from where it makes files and names durable or renames
something, and each such place gives its mutants. A place that is added to the protocol later is mutated without being
named here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.storage import durable
from holdfast.storage.durable import Descriptor

SYNCS = ("sync_file", "sync_directory")
RENAMES = ("_rename", "_renameat2")
ANY_TIME = ("make_directories",)
"""What they make durable has to be so when the save is acknowledged, and not before anything that is done meanwhile."""


@dataclass(frozen=True, slots=True, order=True)
class Mutant:
    """One thing broken: how, and where.

    Attributes:
        kind: ``skip`` or ``late`` for what makes something durable, ``torn`` for a rename.
        place: the functions that lead there, from within.
    """

    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}"


def mutants_of(place: str) -> Iterator[Mutant]:
    """How a place can be broken.

    - ``skip``: nothing is made durable there;
    - ``late``: only after the next rename;
    - ``torn``: instead of being renamed, it is copied piece by piece.
    """
    function = place.partition(" ")[0]
    if function in SYNCS:
        yield Mutant("skip", place)
        if not any(function in place for function in ANY_TIME):
            yield Mutant("late", place)
    else:
        yield Mutant("torn", place)


# --------------------------------------------------------------------------- what is done in the process under test


def note_places(_: Path, output: str) -> None:
    """Note each place that is come by, in a file."""
    for name in (*SYNCS, *RENAMES):
        _wrap(name, functools.partial(_noting, output))


def mutate(_: Path, kind: str, place: str, output: str) -> None:
    """Be the mutant; what is changed is noted in a file, to tell a mutant from one that was never met."""
    waiting: list[tuple[str, int]] = []

    def mutated(real: Callable[..., Any], name: str, *args: Any) -> Any:
        if name in RENAMES:
            result = _torn(output, real, name, *args) if (kind, place) == ("torn", _place(name)) else real(*args)
            while waiting and result is not False:
                _sync_late(waiting.pop(0)[1])
            return result
        if kind == "torn" or _place(name) != place:
            return real(*args)
        _note(output, name)
        if kind == "late":
            waiting.append((name, os.dup(args[0].fd)))
        return None

    for name in (*SYNCS, *RENAMES):
        _wrap(name, mutated)


def _wrap(name: str, wrapper: Callable[..., Any]) -> None:
    real = getattr(durable, name)
    setattr(durable, name, lambda *args: wrapper(real, name, *args))


def _noting(output: str, real: Callable[..., Any], name: str, *args: Any) -> Any:
    result = real(*args)
    if result is not False:  # a rename that this file system has not changes nothing
        _note(output, _place(name))
    return result


def _note(output: str, place: str) -> None:
    with Path(output).open("a", encoding="utf-8") as file:
        file.write(json.dumps(place) + "\n")


def _place(name: str) -> str:
    """The functions of the durable module that lead to ``name``, and the first beyond it."""
    frame = sys._getframe(1)
    names = [name]
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back  # type: ignore[assignment]
    while frame is not None:
        names.append(frame.f_code.co_qualname)
        if frame.f_code.co_filename != durable.__file__:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return " in ".join(names)


def _sync_late(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def _torn(
    output: str, real: Callable[..., Any], name: str, parent: Descriptor, old: str, new: str, flags: int = 0
) -> Any:
    """A rename as a copy: what it should replace goes first, then one part comes after the other."""
    if name == "_renameat2" and flags == durable._RENAME_NOREPLACE and durable.exists(parent, new):
        return real(parent, old, new, flags)
    _note(output, name)
    if flags == durable._RENAME_EXCHANGE:
        os.rename(new, new + ".away", src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        os.rename(old, new, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        os.rename(new + ".away", old, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        return True
    source = Path(f"/proc/self/fd/{parent.fd}", old)
    if source.is_dir():
        os.mkdir(new, dir_fd=parent.fd)
        for name in sorted((file.name for file in source.iterdir()), reverse=True):
            os.rename(f"{old}/{name}", f"{new}/{name}", src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
        os.rmdir(old, dir_fd=parent.fd)
    else:
        with Descriptor(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=parent.fd)) as file:
            os.write(file.fd, source.read_bytes())
            os.fsync(file.fd)
        os.unlink(old, dir_fd=parent.fd)
    return True
