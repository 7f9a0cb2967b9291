"""What a process under test says of what it does, and what follows from it for whoever looks at the disk later.

Each mark is a line to a socket, and is answered before the process goes on: it has its place among the system calls
before and after it, for whatever records those.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Lock
from typing import Any

PREFIX = '{"mark":'
READY, DONE, FAILED = "ready", "done", "failed"
MAY, MUST, REPLACING, GOING, PINNED = "may", "must", "replacing", "going", "pinned"


@dataclass(frozen=True, slots=True)
class Mark:
    """One thing that was said: its kind and the rest."""

    kind: str
    name: str = ""
    seed: int = 0

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps({"mark": self.kind, "name": self.name, "seed": self.seed}).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes | str) -> Mark:
        """As it was sent."""
        fields: dict[str, Any] = json.loads(line)
        return cls(fields["mark"], fields["name"], fields["seed"])


class Marks:
    """The side of the process under test.

    Args:
        connection: where to say it.
        lock: one for all processes that share the connection.
    """

    def __init__(self, connection: socket.socket, lock: Lock) -> None:
        self._connection = connection
        self._lock = lock

    def may(self, name: str, seed: int) -> None:
        """From here on, a checkpoint ``name``, or a generation of it, may hold the state number ``seed``."""
        self.say(Mark(MAY, name, seed))

    def must(self, name: str, seed: int) -> None:
        """From here on it must be found: the save was acknowledged."""
        self.say(Mark(MUST, name, seed))

    def replacing(self, name: str, seed: int) -> None:
        """From here on it must be found with the state it had or with the state number ``seed``."""
        self.say(Mark(REPLACING, name, seed))

    def going(self, name: str) -> None:
        """From here on the checkpoint ``name`` may be gone."""
        self.say(Mark(GOING, name))

    def pinned(self, name: str) -> None:
        """From here on the checkpoint ``name`` must be found pinned."""
        self.say(Mark(PINNED, name))

    def say(self, mark: Mark) -> None:
        """Say it, and wait until it was heard."""
        with self._lock:
            self._connection.sendall(mark.line())
            if not self._connection.recv(1):
                raise EOFError("nobody listens any more")


@dataclass(slots=True)
class Promises:
    """What must and what may be found, by what was said so far.

    Attributes:
        must: by name, what was acknowledged: the numbers of the states, one of which it holds.
        may: by name without the generation, the numbers of all states that were ever saved.
        pinned: must be found pinned.
    """

    must: dict[str, set[int]] = field(default_factory=dict)
    may: dict[str, set[int]] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, marks: Iterable[Mark]) -> Promises:
        """By these marks."""
        promises = cls()
        for mark in marks:
            promises.hear(mark)
        return promises

    def hear(self, mark: Mark) -> None:
        """One more mark."""
        if mark.kind in (MAY, MUST, REPLACING):
            self.may.setdefault(without_generation(mark.name), set()).add(mark.seed)
        if mark.kind == MUST:
            self.must[mark.name] = {mark.seed}
        elif mark.kind == REPLACING:
            self.must[mark.name].add(mark.seed)
        elif mark.kind == GOING:
            self.must.pop(mark.name, None)
            self.pinned.discard(mark.name)
        elif mark.kind == PINNED:
            self.pinned.add(mark.name)

    def key(self) -> str:
        """Equal for promises that ask for the same."""
        must = sorted((name, sorted(seeds)) for name, seeds in self.must.items())
        may = sorted((name, sorted(seeds)) for name, seeds in self.may.items())
        return repr((must, may, sorted(self.pinned)))


def without_generation(name: str) -> str:
    """``step-000000000003`` for ``step-000000000003.g2``."""
    return name.partition(".g")[0]
