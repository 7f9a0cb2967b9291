"""How much time a training has that was asked to leave, and how much of it a save takes.

Nothing here waits or looks at a clock by itself: moments are numbers of one monotonic clock, handed in.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

_REMEMBERED = 5  # saves; the slowest of them is what the next one is expected to take
_PARTS = ("capture_s", "plan_s", "stage_s", "write_s", "commit_s")  # of a save, in whatever mode it was made

# What leaving takes: finalizers, the interpreter, the scheduler that looks at the exit code.
_LEAVING_S = 1.0
_LEAVING_SHARE = 0.05

# Whoever still lives when its time is over has been given more than it was told: a short save may yet make it.
_LEAST_S = 1.0


def usable_s(grace_s: float) -> float:
    """How much of a grace period can be spent on saving: what leaving takes is off, but never more than half."""
    return grace_s - min(max(_LEAVING_S, grace_s * _LEAVING_SHARE), grace_s / 2)


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody wants the training to save and leave.

    Attributes:
        reason: who or what, in words, such as ``"SIGTERM"``.
        at_s: when that was known.
        deadline_s: when the process will be killed; None when nobody said.
        interrupt: whether it was a person at a terminal, who kills nothing and requeues by hand.
    """

    reason: str
    at_s: float
    deadline_s: float | None = None
    interrupt: bool = False

    def left_s(self, now_s: float) -> float | None:
        """Seconds that may be spent on saving, the time to leave taken off; None when there is no deadline."""
        if self.deadline_s is None:
            return None
        return max(usable_s(self.deadline_s - self.at_s) - (now_s - self.at_s), _LEAST_S)


class Flag:
    """Whether somebody wants the training to leave. Once it is up it stays up; the first reason counts.

    A later request can only bring the deadline forward, or turn a person's interrupt into a preemption. Safe to use
    from several threads and from signal handlers.

    Args:
        grace_seconds: the time between a signal and the kill; None when it is not known.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, grace_seconds: float | None, clock: Callable[[], float]) -> None:
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._lock = threading.RLock()  # a handler may interrupt the very thread that holds it
        self.request: Request | None = None

    def put_up(self, reason: str, *, in_seconds: float | None = None, interrupt: bool = False) -> None:
        """Ask the training to leave; ``in_seconds`` from now the process will be killed, where somebody said so."""
        now_s = self._clock()
        given = [] if interrupt else [s for s in (self._grace_seconds, in_seconds) if s is not None]
        deadline_s = now_s + max(min(given), 0.0) if given else None
        new = Request(reason, now_s, deadline_s, interrupt)
        with self._lock:
            self.request = new if self.request is None else _both(self.request, new)


def _both(first: Request, second: Request) -> Request:
    if first.interrupt and not second.interrupt:
        return second
    deadlines = [request.deadline_s for request in (first, second) if request.deadline_s is not None]
    return replace(first, deadline_s=min(deadlines, default=None))


class SaveTimes:
    """How long the last saves took, from the call until each was durable.

    Args:
        events: what a run's log says of saves, by earlier processes too; oldest first.
    """

    def __init__(self, events: Iterable[Mapping[str, object]] = ()) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        for event in events:
            self.add(event)

    def add(self, costs: Mapping[str, object]) -> None:
        """Take in what a save cost: the fields of a ``SaveReport``. What is no such thing is passed over."""
        parts = [costs.get(part) for part in _PARTS]
        seconds = [part for part in parts if isinstance(part, (int, float))]
        if len(seconds) == len(_PARTS):
            self._seconds.append(sum(seconds))

    @property
    def expected_s(self) -> float | None:
        """What the next save may take: the slowest of the last five; None when there was none."""
        return max(self._seconds, default=None)
