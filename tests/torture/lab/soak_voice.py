"""What the processes of a soak say, and how it is heard: one message a packet, which a killed speaker cannot tear."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
_LIMIT_BYTES = 1 << 16


class Voice:
    """The side of a process under test. It survives errors that are injected into its writes: it sends."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def say(self, kind: str, **fields: Any) -> None:
        """Say it; what was said is heard even when the speaker is killed right after.

        With it goes the time by a clock that all processes share.
        """
        self._connection.send(json.dumps({"kind": kind, "at_s": time.monotonic(), **fields}).encode())


@dataclass(slots=True)
class Process:
    """A process of the soak, heard by the one that started it.

    Attributes:
        role: what it does.
        pid: its number, which is also that of its process group.
        status: how it ended; None as long as it lives.
        said: the last message of each kind.
    """

    role: str
    pid: int
    connection: socket.socket
    status: int | None = None
    said: dict[str, Message] = field(default_factory=dict)

    def hear(self) -> list[Message]:
        """What it said since, in order. Does not wait."""
        heard = []
        while True:
            try:
                data = self.connection.recv(_LIMIT_BYTES)
            except BlockingIOError:
                break
            if not data:
                break
            message: Message = json.loads(data)
            self.said[message["kind"]] = message
            heard.append(message)
        return heard

    def ended(self) -> bool:
        """Whether it has ended; what it said last may still be unheard."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def signal(self, number: int) -> None:
        """Send a signal to it, and to none of its children."""
        if not self.ended():
            os.kill(self.pid, number)

    def close(self) -> None:
        """End it, and whatever it left behind."""
        self.signal(signal.SIGKILL)
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # workers of its loader
        self.connection.close()


FAILED = 1
"""Exit status of a process that an error ended which nobody foresaw."""


def start(role: str, work: Callable[[Voice], int | None], strangers: list[socket.socket]) -> Process:
    """Fork a process that works and says what it does.

    Args:
        role: what it does.
        work: returns its exit status.
        strangers: what it must not keep open of its parent's.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = FAILED
        try:
            os.setpgid(0, 0)
            for connection in (here, *strangers):
                connection.close()
            status = work(Voice(there)) or 0
        except BaseException:  # noqa: BLE001 - its parent is told, and judges
            Voice(there).say("failed", why=traceback.format_exc()[-6000:])
        finally:
            os._exit(status)
    there.close()
    here.setblocking(False)
    return Process(role, pid, here)
