"""Runs a training script and kills the process, at a moment that comes in on standard input.

    echo "23 40" | python tests/kill_driver.py examples/digits.py --run runs/digits

``0 0`` lets it live. ``23 0`` kills it in its 23rd optimizer step, counted from this start; ``23 40`` at the 40th
moment after that step in which something happens to the disk: before each call that changes it, in the middle of each
write, and after each fsync. Nothing runs afterwards, as after any SIGKILL. A script that lives to its end tells on
standard error how many such moments came after each step, as JSON.

What takes long, the imports, is done before the moment is read: a parent that starts one process ahead does not wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

TORN = ("write", "pwrite", "writev", "pwritev")
WATCHED = (
    *("open", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir"),
    *("ftruncate", "truncate", "posix_fallocate", *TORN, "fsync", "fdatasync"),
)


class Kill:
    """Counts steps and moments; ends the process when both have come."""

    def __init__(self) -> None:
        self.steps = 0
        self.moments: dict[int, int] = {}  # after each step
        self._step = 0
        self._moments_left = 0

    def plan(self, step: int, moment: int) -> None:
        """Say when."""
        self._step, self._moments_left = step, moment

    def count_step(self, *_: Any) -> None:
        """An optimizer step is done."""
        self.steps += 1
        if self.steps == self._step and self._moments_left == 0:
            die()

    def count_moment(self, torn: Callable[[], object] | None = None) -> None:
        """Something is about to happen to the disk, or has happened; ``torn`` does half of it."""
        if self.steps == 0:
            return  # before the first step nothing is saved
        self.moments[self.steps] = self.moments.get(self.steps, 0) + 1
        if self.steps >= self._step > 0 and self._moments_left > 0:
            self._moments_left -= 1
            if self._moments_left == 0:
                if torn is not None:
                    with contextlib.suppress(OSError):  # direct I/O takes no half blocks
                        torn()
                die()


def die() -> None:
    """End like a machine that loses its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch(name: str, kill: Kill) -> None:
    """Count the calls of ``os.<name>`` as moments."""
    original: Callable[..., Any] = getattr(os, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return original(*args, **kwargs)
        kill.count_moment()
        if name in TORN:
            kill.count_moment(lambda: original(args[0], half_of(args[1]), *args[2:], **kwargs))
        result = original(*args, **kwargs)
        if name in ("fsync", "fdatasync"):
            kill.count_moment()  # what follows may be a system call that Python does not make: renameat2
        return result

    setattr(os, name, watched)


def half_of(data: Any) -> Any:
    """The first half of a buffer, or of each of a list of buffers."""
    if isinstance(data, list | tuple):
        return [half_of(buffer) for buffer in data]
    view = memoryview(data).cast("B")
    return view[: len(view) // 2]


def main() -> None:
    """Run the script that the command line names."""
    kill = Kill()
    for name in WATCHED:
        if hasattr(os, name):
            watch(name, kill)  # first of all: whoever imports a function by name gets this one

    # The examples' own imports, ahead of time.
    import sklearn.datasets  # noqa: F401
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import holdfast.checkpointer  # noqa: F401

    register_optimizer_step_post_hook(kill.count_step)
    step, moment = sys.stdin.readline().split()
    kill.plan(int(step), int(moment))

    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(json.dumps(kill.moments), file=sys.stderr)


if __name__ == "__main__":
    main()
