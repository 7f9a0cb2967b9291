"""Runs a training script again and again, and signals it each time at the moment that it is told.

    python tests/kill_driver.py examples/digits.py --run runs/digits

Each line on standard input is an order, a JSON object, for one process that runs the script from its beginning. ``{}``
lets it live. ``{"step": 23}`` kills it with SIGKILL in its 23rd optimizer step; ``{"step": 23, "moment": 40}`` at the
40th moment after that step in which something happens to the disk: before each call that changes it, in the middle of
each write, and after each fsync. ``{"forward": 99}`` kills it in the 99th call of a module's forward, which may be
anywhere in a batch. ``"signal"`` is the number of another signal. After what the script prints comes a line of JSON:
the exit status and, of a process that came to its end, how many forwards it made, and how many moments on the disk
came after each of its steps.

The processes are forks of this one, which imports what the script needs and does nothing else: importing PyTorch takes
longer than the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TORN = ("write", "pwrite", "writev", "pwritev")
WATCHED = (
    *("open", "mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir"),
    *("ftruncate", "truncate", "posix_fallocate", *TORN, "fsync", "fdatasync"),
)


class Kill:
    """Counts steps, forwards and moments; signals the process when the right one has come."""

    def __init__(self) -> None:
        self.steps = 0
        self.forwards = 0
        self.moments: dict[int, int] = {}  # after each step
        self._pid = 0
        self._step = 0
        self._moments_left = 0
        self._forward = 0
        self._signal = int(signal.SIGKILL)

    def plan(self, step: int = 0, moment: int = 0, forward: int = 0, signal: int = signal.SIGKILL) -> None:
        """Say when; for this process alone, not for those that it forks."""
        self._step, self._moments_left, self._forward, self._signal = step, moment, forward, signal
        self._pid = os.getpid()

    def count_step(self, *_: Any) -> None:
        """An optimizer step is done."""
        self.steps += 1
        if self.steps == self._step and self._moments_left == 0:
            self._die()

    def count_forward(self, *_: Any) -> None:
        """A module is about to do its part."""
        self.forwards += 1
        if self.forwards == self._forward:
            self._die()

    def count_moment(self, torn: Callable[[], object] | None = None) -> None:
        """Something is about to happen to the disk, or has happened; ``torn`` does half of it."""
        if self.steps == 0 or os.getpid() != self._pid:
            return  # before the first step nothing is saved; and what a loader's worker does is its own affair
        self.moments[self.steps] = self.moments.get(self.steps, 0) + 1
        if self.steps >= self._step > 0 and self._moments_left > 0:
            self._moments_left -= 1
            if self._moments_left == 0:
                if torn is not None:
                    with contextlib.suppress(OSError):  # direct I/O takes no half blocks
                        torn()
                self._die()

    def _die(self) -> None:
        """End like a machine that loses its power, or be asked to end."""
        os.kill(os.getpid(), self._signal)


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


def run_script(kill: Kill, order: str) -> None:
    """Run the script that the command line names, in a process that ends with it."""
    kill.plan(**json.loads(order))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).absolute().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Follow the orders."""
    kill = Kill()
    for name in WATCHED:
        if hasattr(os, name):
            watch(name, kill)  # first of all: whoever imports a function by name gets this one

    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401 - the first optimizer imports it
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import holdfast.checkpointer
    import holdfast.data  # noqa: F401

    register_optimizer_step_post_hook(kill.count_step)
    register_module_forward_pre_hook(kill.count_forward)
    for order in sys.stdin:
        receiver, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(receiver)
            # A worker of a trainer that was killed lives on for a while, and must not hold up whoever reads.
            os.register_at_fork(after_in_child=lambda sender=sender: os.close(sender))  # type: ignore[misc]
            run_script(kill, order)
            os.write(sender, json.dumps({"forwards": kill.forwards, "moments": kill.moments}).encode())
            sys.exit()
        os.close(sender)
        with os.fdopen(receiver) as counts:
            told = counts.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        counted = {"forwards": 0, "moments": {}, **json.loads(told or "{}")}
        print(json.dumps({"status": status, **counted}), flush=True)


if __name__ == "__main__":
    main()
