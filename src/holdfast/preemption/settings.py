"""What a user says of preemption, and what ends a training that was preempted."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.checkpoint import Checkpoint
from holdfast.errors import UsageError
from holdfast.notices import Notice

__all__ = ["Preempted", "Preemption"]

_EX_TEMPFAIL = 75  # sysexits.h: a temporary failure, try again later
_UNCATCHABLE = frozenset({signal.SIGKILL, signal.SIGSTOP})


@dataclass(frozen=True, slots=True)
class Preemption:
    """What asks a training to leave, and how it leaves. See docs/preemption.md.

    Args:
        signals: names or numbers of signals that ask for it. Those that are ignored when the block is entered stay
            ignored. SIGINT is a person at a terminal: a second one stops at once.
        grace_seconds: the time between the signal and the kill. With it the end waits no longer for a save than there
            is time, and a warning says ahead when saves take too long. None: not known; the end waits ``drain_s``.
        exit_code: how the process ends after a preemption: 75 (``EX_TEMPFAIL``) unless told otherwise; after SIGINT
            it is 130, whatever stands here.
        requeue: in a Slurm job, put it into the queue again after the save (never after SIGINT).
        notices: what to ask whether the machine is being taken away, such as ``holdfast.notices.AwsNotice()``; one or
            several.

    Raises:
        UsageError: an argument that cannot mean anything.
    """

    signals: tuple[str | int, ...] = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
    grace_seconds: float | None = None
    exit_code: int = _EX_TEMPFAIL
    requeue: bool = False
    notices: Notice | Sequence[Notice] = ()

    def __post_init__(self) -> None:
        _check_signals(self.signals)
        grace_s = self.grace_seconds
        if grace_s is not None and (
            isinstance(grace_s, bool) or not isinstance(grace_s, (int, float)) or not 0 < grace_s < float("inf")
        ):
            raise _refused("grace_seconds", "a positive number of seconds, or None", grace_s)
        if isinstance(self.exit_code, bool) or not isinstance(self.exit_code, int) or not 0 <= self.exit_code <= 255:
            raise _refused("exit_code", "a whole number from 0 to 255", self.exit_code)
        if not isinstance(self.requeue, bool):
            raise _refused("requeue", "True or False", self.requeue)
        for notice in self.asked:
            if isinstance(notice, type) or not callable(getattr(notice, "check", None)):
                raise _refused("notices", "something with a method check(), such as AwsNotice()", notice)

    @property
    def numbers(self) -> tuple[signal.Signals, ...]:
        """The signals, each once."""
        return tuple(dict.fromkeys(map(_signal, self.signals)))

    @property
    def asked(self) -> tuple[Notice, ...]:
        """The notices, however many were given."""
        return tuple(self.notices) if isinstance(self.notices, Sequence) else (self.notices,)


class Preempted(SystemExit):
    """The training was asked to leave and does. Left alone, it ends the interpreter with the exit code.

    It is no ``Exception``, so ``except Exception`` does not swallow it; every ``finally`` runs.

    Attributes:
        code: the exit code.
        reason: who or what asked, in words, such as ``"SIGTERM"``.
        checkpoint: what the next start continues from, exactly as things were; None when it did not become durable in
            time, and the next start continues from the one before.
    """

    def __init__(self, code: int, reason: str, checkpoint: Checkpoint | None) -> None:
        super().__init__(code)
        self.reason = reason
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"preempted ({self.reason}); exit code {self.code}"


def _check_signals(listed: object) -> None:
    if not isinstance(listed, tuple | list):
        raise _refused("signals", 'a tuple such as ("SIGTERM", "SIGUSR1")', listed)
    for item in listed:
        if _signal(item) in _UNCATCHABLE:
            raise _refused("signals", "signals that a process can handle", item)


def _signal(listed: object) -> signal.Signals:
    try:
        if isinstance(listed, str):
            return signal.Signals[listed]
        if isinstance(listed, int) and not isinstance(listed, bool):
            return signal.Signals(listed)
    except (KeyError, ValueError):
        pass
    raise _refused("signals", 'names such as "SIGTERM", or numbers of signals', listed)


def _refused(name: str, expected: str, found: object) -> UsageError:
    return UsageError(f"Preemption({name}=): expected {expected}; found {found!r}.", key=name)
