"""Leaving in time: something asks for it, the next step makes one save, and an exception ends the training."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

from holdfast.checkpoint import Checkpoint
from holdfast.company import Asked
from holdfast.errors import SaveTimeoutError, StorageError, UsageError
from holdfast.notices import NoticeWatch
from holdfast.preemption import slurm
from holdfast.preemption.grace import Flag, Request, SaveTimes, usable_s
from holdfast.preemption.settings import Preempted, Preemption
from holdfast.preemption.signals import Signals
from holdfast.run import Run

_logger = logging.getLogger("holdfast")
_INTERRUPTED = 130  # what shells say of a program that SIGINT ended


class SaveUnderWay(Protocol):
    """What is asked of a save."""

    def done(self) -> bool:
        """Whether it has ended."""

    def failed(self) -> bool:
        """Whether it has ended and is not there."""

    def result(self, timeout: float | None = None) -> Checkpoint:
        """The checkpoint."""

    def report(self, timeout: float | None = None) -> Any:
        """What it cost: a data class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """What leaving needs of whoever saves.

    Attributes:
        saved: the save, or the checkpoint, that holds exactly the present state; None when there is none.
        save: begins one, for a reason in words.
        drain: waits so many seconds at most until none is under way; SaveTimeoutError when one still is.
        check: raises what failed since the last look.
        patience_s: how long to wait where no deadline is known.
        background: whether a save that takes too long can be left behind.
        leads: whether this process speaks for the training, of several that leave together.
    """

    saved: Callable[[], SaveUnderWay | Checkpoint | None]
    save: Callable[[str], SaveUnderWay]
    drain: Callable[[float], None]
    check: Callable[[], None]
    patience_s: float
    background: bool
    leads: bool = True


class PreemptionWatch:
    """Watches for preemption during one block, and leaves it. It has no part in what is saved, or how.

    Args:
        config: what the user asked for; None listens to nothing but :meth:`request`.
        run: the run that is saved.
        clock: a monotonic clock, in seconds.

    Raises:
        UsageError: ``config`` is something else.
    """

    def __init__(self, config: Preemption | None, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(config, Preemption | None):
            raise UsageError(f"preemption=: expected a Preemption or None, found {config!r}.", key="preemption")
        self._config = config or Preemption(signals=())
        self._run = run
        self._clock = clock
        self._flag = Flag(self._config.grace_seconds, clock)
        self._signals = Signals(self._config.numbers, self._tell_of_signal)
        self._notices = NoticeWatch(self._config.asked, self._tell_of_notice)
        self._times = SaveTimes()
        self._measuring: list[SaveUnderWay] = []
        self._seen: SaveUnderWay | None = None
        self._newest: Checkpoint | None = None
        self._warned = False
        self._left = False
        self._ended = False

    @property
    def requested(self) -> bool:
        """Whether the training was asked to leave."""
        return self._flag.request is not None

    @property
    def left(self) -> bool:
        """Whether :meth:`leave` has done all that there was to do: the end of the block saves and waits no more."""
        return self._left

    def asked(self) -> Asked | None:
        """Who wants the training to leave; None when nobody does."""
        request = self._flag.request
        return None if request is None else Asked(request.reason, request.left_s(self._clock()), request.interrupt)

    def adopt(self, asked: Asked) -> None:
        """What another process of the training was asked, this one is asked too; none has more time than the others."""
        mine = self.asked()
        if mine is None or mine.interrupt > asked.interrupt or _sooner(asked.left_s, mine.left_s):
            self._flag.put_up(asked.reason, in_seconds=asked.left_s, interrupt=asked.interrupt)

    def request(self, reason: str) -> None:
        """Ask the training to leave at its next step. Safe to call from any thread."""
        self._flag.put_up(reason)

    def begin(self, resumed_from: Checkpoint | None) -> None:
        """Listen from here on."""
        if self._ended:  # the same object in another block
            self._flag = Flag(self._config.grace_seconds, self._clock)
            self._left = self._ended = False
        self._newest = resumed_from
        if resumed_from is not None and (self._config.grace_seconds is not None or self._config.asked):
            # How long saves take matters only where there may be a deadline; and a long run has a long log.
            self._times = SaveTimes(self._run.events())
            self._warn_of_slow_saves()
        if self._config.requeue and not slurm.in_job():
            _logger.warning("requeue=True, but this is no Slurm job (SLURM_JOB_ID is not set): nothing will requeue it")
        self._signals.install()
        self._notices.start()

    def end(self, error: BaseException | None) -> None:
        """Listen no longer; ``error`` is what leaves the block. The second time nothing happens."""
        if self._ended:
            return
        self._ended = True
        self._notices.stop()
        self._signals.restore()
        if self._flag.request is None or self._left:
            return
        reason = self._flag.request.reason
        if error is None:
            _logger.info("%s: preempted (%s), but the training was over and is saved", self._run.path, reason)
        else:
            _logger.warning(
                "%s: preempted (%s), but %s left the block before the next step could save; the next start continues "
                "from %s. If workers of a loader died of the same signal, see docs/preemption.md.",
                self._run.path,
                reason,
                type(error).__name__,
                self._before(),
            )

    def measure(self, save: SaveUnderWay | None) -> None:
        """Learn from ``save`` how long saves take, as soon as it is done. Cheap; does not block."""
        if save is not None and save is not self._seen:
            self._seen = save
            self._measuring.append(save)
        while self._measuring and self._measuring[0].done():
            self._learn(self._measuring.pop(0))

    def leave(self, saver: Saver) -> NoReturn:
        """Save, requeue where that was asked for, and raise. Blocks no longer than there is time, where that is known.

        Raises:
            Preempted: always, whether or not the save has become durable.
            HoldfastError: the state cannot be saved at all, now or at the next start.
        """
        checkpoint, failure = None, None
        try:
            checkpoint = self._save(saver)
            _logger.info("%s: preempted (%s): saved as %s", self._run.path, self._request.reason, checkpoint.name)
        except (StorageError, SaveTimeoutError) as error:
            failure = error
            _logger.error(
                "%s: preempted (%s), and what was done since the last checkpoint is lost: %s The next start continues "
                "from %s.",
                self._run.path,
                self._request.reason,
                error,
                self._before(),
            )
        request = self._request
        if self._config.requeue and not request.interrupt and saver.leads:
            slurm.requeue()
        self._left = True
        code = _INTERRUPTED if request.interrupt else self._config.exit_code
        raise Preempted(code, request.reason, checkpoint) from failure

    @property
    def _request(self) -> Request:
        """What is asked at this moment: while the training leaves, a signal may come that leaves it less time."""
        assert self._flag.request is not None
        return self._flag.request

    def _save(self, saver: Saver) -> Checkpoint:
        """The present state, durable."""
        _logger.info("%s: preempted (%s): saving", self._run.path, self._request.reason)
        self._wait(saver)
        self._tell_of_failures(saver)  # they must not cost this save
        saved = saver.saved()
        if saved is None:
            self._weigh(saver)
            saved = saver.save(f"preempted ({self._request.reason})")
            self._wait(saver)
        checkpoint = saved if isinstance(saved, Checkpoint) else saved.result(0)
        self._tell_of_failures(saver)  # of the pruning, if any
        return checkpoint

    def _tell_of_failures(self, saver: Saver) -> None:
        try:
            saver.check()
        except Exception:
            _logger.exception("%s: a save under way failed", self._run.path)

    def _wait(self, saver: Saver) -> None:
        """Until no save is under way, or time is over."""
        left_s = self._request.left_s(self._clock())
        saver.drain(saver.patience_s if left_s is None else left_s)
        self.measure(None)

    def _weigh(self, saver: Saver) -> None:
        """Say when a save will hardly fit. Trying costs nothing, unless it cannot be given up half-way."""
        left_s, expected_s = self._request.left_s(self._clock()), self._times.expected_s
        if left_s is None or expected_s is None or expected_s <= left_s:
            return
        if not saver.background and self._newest is not None:
            raise SaveTimeoutError(
                f"a save takes {expected_s:.1f} s, {left_s:.1f} s are left, and a save that blocks cannot be given up: "
                "none was begun.",
                path=self._run.path,
            )
        _logger.warning(
            "%s: a save takes %.1f s, and %.1f s are left: trying all the same", self._run.path, expected_s, left_s
        )

    def _learn(self, save: SaveUnderWay) -> None:
        if not save.failed():
            self._newest = save.result(0)
            self._times.add(asdict(save.report(0)))
            self._warn_of_slow_saves()

    def _warn_of_slow_saves(self) -> None:
        """Once, while something can be done about it."""
        grace_s, expected_s = self._config.grace_seconds, self._times.expected_s
        if self._warned or grace_s is None or expected_s is None or expected_s <= usable_s(grace_s):
            return
        self._warned = True
        _logger.warning(
            "%s: a save takes %.1f s, the grace period is %g s, of which %.1f s can be used: when this training is "
            "preempted, it will probably lose what was done since the last checkpoint. Ask for more time (Slurm: "
            "--signal=USR1@SECONDS; Kubernetes: terminationGracePeriodSeconds), save more often, or save less.",
            self._run.path,
            expected_s,
            grace_s,
            usable_s(grace_s),
        )

    def _before(self) -> str:
        """Where the next start continues, from memory: the disk may be what does not answer."""
        return "the beginning" if self._newest is None else self._newest.path

    def _tell_of_signal(self, number: signal.Signals) -> None:
        self._flag.put_up(number.name, interrupt=number == signal.SIGINT)

    def _tell_of_notice(self, reason: str, in_seconds: float | None) -> None:
        self._flag.put_up(reason, in_seconds=in_seconds)
        _logger.warning("%s: %s; saving at the next step", self._run.path, reason)


def _sooner(left_s: float | None, other_s: float | None) -> bool:
    return left_s is not None and (other_s is None or left_s < other_s)
