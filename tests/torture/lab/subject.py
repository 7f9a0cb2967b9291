"""Starts the processes under test, and hears what they say."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.marks import DONE, FAILED, READY, Mark

PATIENCE_S = 120.0
"""A process under test that says nothing for so long hangs."""

Watcher = Callable[[int], None]
"""Is given the process's number when it is ready, before it begins."""


@dataclass(slots=True)
class Ended:
    """How a process under test ended.

    Attributes:
        before: what it said until it was ready.
        marks: what it said from then on.
        status: its exit status; negative for a signal.
        failure: the error that ended it, in words; empty when none did.
    """

    before: list[Mark] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    status: int = 0
    failure: str = ""

    @property
    def said(self) -> list[Mark]:
        """Everything it said."""
        return [*self.before, *self.marks]


class Subjects:
    """One process after the other, forked from one that is warm. A context manager.

    Args:
        environment: of the processes; by default this one's.
        workloads: the module that has what they do.
    """

    def __init__(self, environment: dict[str, str] | None = None, workloads: str = "lab.workloads") -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "marks")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serve.py")), address, workloads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def run(
        self,
        workload: str,
        directory: Path,
        *,
        watch: Watcher | None = None,
        hear: Callable[[Mark], None] | None = None,
        **order: Any,
    ) -> Ended:
        """Have a process do a workload, and wait for its end.

        Args:
            workload: its name.
            directory: where.
            watch: called between preparation and beginning.
            hear: called with each mark before the process goes on.
            order: more for :mod:`lab.serve`.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"workload": workload, "directory": str(directory), **order}) + "\n")
        self._server.stdin.flush()
        connection, _ = self._listener.accept()
        ended = Ended()
        with connection, connection.makefile("rb") as lines:
            connection.settimeout(PATIENCE_S)
            ready = False
            for line in _until_closed(lines):
                mark = Mark.parse(line)
                if mark.kind == READY:
                    ready = True
                    if watch is not None:
                        watch(mark.seed)
                elif mark.kind == FAILED:
                    ended.failure = mark.name
                elif mark.kind != DONE:
                    (ended.marks if ready else ended.before).append(mark)
                    if ready and hear is not None:
                        hear(mark)
                try:
                    connection.sendall(b"!")
                except (BrokenPipeError, ConnectionResetError):  # killed since
                    break
        ended.status = json.loads(self._server.stdout.readline())["status"]
        return ended

    def close(self) -> None:
        """No more."""
        self._server.communicate()
        self._listener.close()
        self._folder.cleanup()

    def __enter__(self) -> Subjects:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _until_closed(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines until there are no more; a process that is killed with an answer unread resets the connection."""
    with contextlib.suppress(ConnectionResetError):
        yield from lines
