"""Counts what happens in one rank of a training, and kills the rank when the right moment has come.

Four kinds of moment are counted: an optimizer's ``step``; a module's ``forward``; something on the ``disk``, which is
before each call that changes it, in the middle of each write, and after each fsync and rename; and a ``message``, which
is before and after each call of the store through which the ranks talk. A fifth is the call of one function by name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch._C._distributed_c10d import Store
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from holdfast.storage import durable

TORN = ("write", "pwrite", "writev", "pwritev")
CHANGES = (
    *("open", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir"),
    *("ftruncate", "truncate", "posix_fallocate", *TORN, "fsync", "fdatasync"),
)
MESSAGES = ("set", "get", "add", "wait", "check", "compare_set", "multi_set", "multi_get", "append", "delete_key")
KINDS = ("step", "forward", "disk", "message")


@dataclass(frozen=True, slots=True)
class Kill:
    """When a rank is to be killed.

    Attributes:
        kind: one of :data:`KINDS`, or ``"before"`` or ``"after"`` a call.
        n: which of them, from 1.
        call: of what, as ``module:function`` or ``module:Class.method``; only with those two.
        number: the signal.
        first: counted from this optimizer step of the process on.
    """

    kind: str
    n: int = 1
    call: str = ""
    number: int = int(signal.SIGKILL)
    first: int = 0


@dataclass(slots=True)
class Moments:
    """Counts the moments of this process from :meth:`begin` on; not those of processes that it forks."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    _kill: Kill | None = None
    _pid: int = 0
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def install(self) -> None:
        """Watch; before anything is counted."""
        for name in CHANGES:
            _wrap(os, name, partial(self._disk_call, name))
        _wrap(durable, "_renameat2", partial(self._disk_call, "rename"))
        for name in MESSAGES:
            _wrap(Store, name, self._message_call)
        register_optimizer_step_post_hook(lambda *_: self._count("step"))
        register_module_forward_pre_hook(lambda *_: self._count("forward"))

    def begin(self, kill: Kill | None) -> None:
        """Count from here on, and kill this process when its moment has come."""
        self._pid = os.getpid()
        self._kill = kill
        self._left = 0 if kill is None else kill.n
        if kill is not None and kill.call:
            owner, name = find(kill.call)
            _wrap(owner, name, partial(self._call, kill.kind))

    def _count(self, kind: str, torn: Callable[[], object] | None = None) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            kill = self._kill
            if kill is None or kill.kind != kind or self.counts["step"] < kill.first:
                return
            self._left -= 1
            if self._left == 0:
                if torn is not None:
                    with contextlib.suppress(OSError):  # direct I/O takes no half blocks
                        torn()
                os.kill(self._pid, kill.number)

    def _disk_call(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return original(*args, **kwargs)
            self._count("disk")
            if name in TORN:
                self._count("disk", lambda: original(args[0], half_of(args[1]), *args[2:], **kwargs))
            result = original(*args, **kwargs)
            if name in ("fsync", "fdatasync", "rename", "replace"):
                self._count("disk")
            return result

        return watched

    def _message_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return self._around("message", "message", original)

    def _call(self, when: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return self._around("before" if when == "before" else "", "after" if when == "after" else "", original)

    def _around(self, before: str, after: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if before:
                self._count(before)
            result = original(*args, **kwargs)
            if after:
                self._count(after)
            return result

        return watched


def find(call: str) -> tuple[Any, str]:
    """What holds the function that ``module:Class.method`` names, and its name there."""
    module, _, path = call.partition(":")
    *above, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in above:
        owner = getattr(owner, part)
    return owner, name


def half_of(data: Any) -> Any:
    """The first half of a buffer, or of each of a list of buffers."""
    if isinstance(data, list | tuple):
        return [half_of(buffer) for buffer in data]
    view = memoryview(data).cast("B")
    return view[: len(view) // 2]


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name, None)
    if original is not None:
        setattr(owner, name, wrapper(original))
