"""The processes under test: forks of this one, which imports what they need and does nothing else.

    python tests/torture/lab/serve.py SOCKET WORKLOADS

WORKLOADS is the module that has what they do, by name.

Each line on standard input is an order, a JSON object: ``{"workload": "retention", "directory": "runs/x"}``. For each,
a process connects to SOCKET, prepares the directory, says that it is ready, and begins when that is answered. When it
has ended, a line on standard output gives its exit status. More in an order: ``"fault"``, the name of a function of
``lab.faults`` and its arguments, called between preparation and beginning; ``"afterwards"``, another, called at the end
with the directory, the marks, the error that ended the work (None when none did), and its arguments; ``"variant"``, how
large the states are; ``"prepared"``, true where the directory is to be taken as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab import faults
from lab.judge import RunJudge
from lab.marks import DONE, FAILED, READY, Mark, Marks, Promises
from lab.states import use_variant
from lab.workloads import WORKLOADS, Workload

PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, -1


def main() -> None:
    """Take orders until there are no more."""
    workloads: dict[str, Workload] = importlib.import_module(sys.argv[2]).WORKLOADS
    _warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 4
            try:
                status = _run(order, workloads[order["workload"]], sys.argv[1])
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(json.dumps({"status": status}) + "\n")
        sys.stdout.flush()


def _warm_up() -> None:
    """Import what is imported late, so that the processes make no system calls for it."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        WORKLOADS["save beside others"].prepare(run, _Mute())
        WORKLOADS["background saves"].act(run, _Mute())
        RunJudge().problems(run, Promises())


class _Mute(Marks):
    """Says nothing to nobody."""

    def __init__(self) -> None:
        pass

    def say(self, mark: Mark) -> None:
        """Nothing."""


def _run(order: dict[str, Any], workload: Workload, address: str) -> int:
    """One process under test; returns its exit status."""
    # Whoever watches is no ancestor of this process, which some systems ask for.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    marks = Marks(connection, multiprocessing.get_context("fork").Lock())
    use_variant(order.get("variant", 0))
    directory = Path(order["directory"])
    failure: BaseException | None = None
    try:
        if not order.get("prepared"):
            workload.prepare(directory, marks)
        _settle(directory)
        fault = order.get("fault")
        if fault is not None:
            getattr(faults, fault[0])(directory, *fault[1:])
        marks.say(Mark(READY, seed=os.getpid()))
        workload.act(directory, marks)
        marks.say(Mark(DONE))
    except BaseException as error:  # noqa: BLE001 - whoever watches is told
        failure = error
        with contextlib.suppress(OSError, EOFError):
            marks.say(Mark(FAILED, f"{type(error).__name__}: {error}"))
    afterwards = order.get("afterwards")
    if afterwards is not None:
        getattr(faults, afterwards[0])(directory, marks, failure, *afterwards[1:])
    return 0 if failure is None else 3


def _settle(directory: Path) -> None:
    """Make all of its file system durable, and of no other: beside this, others may be about to lose theirs."""
    while not directory.exists():
        directory = directory.parent
    fd = os.open(directory, os.O_RDONLY)
    ctypes.CDLL(None).syncfs(fd)
    os.close(fd)


if __name__ == "__main__":
    main()
