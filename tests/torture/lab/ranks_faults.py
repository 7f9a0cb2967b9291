"""What can be otherwise for one rank alone, from before its work begins; see :class:`lab.ranks.Ranks`."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from holdfast.pace import Pace
from lab.ranks_moments import find

WRITES = ("write", "pwrite", "writev", "pwritev", "posix_fallocate")


def full_disk(directory: str, after: int = 0, times: int = 10**9) -> None:
    """No space for what this rank writes into files below a directory, after so many writes, for so many."""
    state = {"seen": 0}

    def refused(fd: int) -> bool:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if not path.startswith(directory) or not path.endswith(".safetensors"):
            return False
        state["seen"] += 1
        return after < state["seen"] <= after + times

    for name in WRITES:
        _replace(os, name, lambda original: _refusing(original, refused))


def _refusing(original: Callable[..., Any], refused: Callable[[int], bool]) -> Callable[..., Any]:
    def write(fd: int, *args: Any) -> Any:
        if refused(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(fd, *args)

    return write


def failing_call(call: str, n: int = 1, message: str = "it was told to fail") -> None:
    """The ``n``-th call of ``module:function`` raises."""
    state = {"left": n}

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            state["left"] -= 1
            if state["left"] == 0:
                raise RuntimeError(message)
            return original(*args, **kwargs)

        return failing

    owner, name = find(call)
    _replace(owner, name, wrapper)


def long_since_save() -> None:
    """By its own clock this rank has saved an hour ago, whenever it looks."""
    setattr(Pace, "since_save_s", property(lambda pace: 3600.0))  # noqa: B010 - the type says that it cannot be set


def unseen(directory: str, beginnings: list[str]) -> None:
    """Listings of a directory leave out what begins like this, as a slow network file system might."""
    hidden = tuple(beginnings)

    def place(of: Any) -> str:
        path = str(Path(f"/proc/self/fd/{of}").readlink()) if isinstance(of, int) else os.fspath(of)
        return os.path.realpath(path)

    def listdir(original: Callable[..., Any]) -> Callable[..., Any]:
        def listing(of: Any = ".") -> list[Any]:
            names: list[Any] = original(of)
            return [name for name in names if not (place(of) == directory and str(name).startswith(hidden))]

        return listing

    _replace(os, "listdir", listdir)


def signalled(number: int, step: int) -> None:
    """A signal comes to this rank alone, right after one of its optimizer's steps."""
    state = {"left": step}

    def count(*_: Any) -> None:
        state["left"] -= 1
        if state["left"] == 0:
            signal.raise_signal(number)

    register_optimizer_step_post_hook(count)


def _replace(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))
