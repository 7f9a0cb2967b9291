"""Writes checkpoints one at a time, in the background."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.checkpoint import Checkpoint
from holdfast.collector import collector_paused
from holdfast.company import Begin, Failed, SaveUnderWay
from holdfast.errors import SaveTimeoutError, StorageError
from holdfast.handle import SaveHandle, Stopwatch
from holdfast.run import Run
from holdfast.storage.arena import Arena

if TYPE_CHECKING:
    from holdfast.part import About
    from holdfast.state.capture import CapturedEntry
    from holdfast.state.guard import StepGuard
    from holdfast.state.unchanged import Unchanged

_logger = logging.getLogger("holdfast")
_NICE = 10
_WARM_UP_BYTES = 16 * 2**20  # less is made in no time


class Writer:
    """Writes checkpoints of a run, one at a time: the state is copied at the call, and written in the background.

    What fails in the background is raised by :meth:`check`, once, and by the handle.

    Args:
        run: where to.
        after_commit: called with each checkpoint that this process committed; retention runs there, and only there.
        begin: begins a save; by default one that this process makes alone.
        unchanged: what stood still so far, where it makes it alone; None writes everything each time.
        background: whether saves are finished by a thread. Otherwise at the call, without copying the state.
        guard: for overlapping saves, what holds back the optimizers of the state.
    """

    def __init__(
        self,
        run: Run,
        after_commit: Callable[[Checkpoint], None],
        *,
        begin: Begin | None = None,
        unchanged: Unchanged | None = None,
        background: bool = True,
        guard: StepGuard | None = None,
    ) -> None:
        self._run = run
        self._begin = begin or self._begin_alone
        self._unchanged = unchanged
        self._after_commit = after_commit
        self._arena = Arena() if background else None
        self._guard = guard
        self._thread: threading.Thread | None = None
        self._failures: list[Failed] = []
        self.number = 0
        self._told: set[int] = set()
        self._told_of_memory = False

    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, capture: Callable[[], Mapping[str, CapturedEntry]], about: About) -> SaveHandle:
        """Begin a save. Waits for the one before; blocks until the training may go on.

        Args:
            capture: captures the state; called when the save before has ended.
            about: what the checkpoint says of itself.
        """
        costs = Stopwatch(about.step, self._guard)
        self.drain()
        costs.waited()
        handle = SaveHandle(about.step, Future(), costs.report)
        self.number += 1

        def capture_it() -> Mapping[str, CapturedEntry]:
            captured = capture()
            costs.captured()
            return captured

        with collector_paused():
            try:
                save = self._begin(capture_it, about)
            except StorageError as error:  # what the state or its user did wrong is raised here and now
                self._fail(handle, error, known=True)
                return handle
            costs.planned(save)
            staged = self._stage(save, costs)
        if not staged:
            self._finish(save, handle, costs)
            costs.returned()
            return handle
        costs.returned()
        if not self._start(lambda: self._finish(save, handle, costs)):
            self._finish(save, handle, costs)
            costs.returned()
        return handle

    def warm_up(self, nbytes: int) -> None:
        """Make the memory for copies of a state of about so many bytes, in the background."""
        if self._arena is not None and self._thread is None and nbytes >= _WARM_UP_BYTES:
            self._start(lambda: self._reserve(nbytes))

    def check(self, *, known: bool = False) -> None:
        """Raise the first failure that was not raised yet; with ``known`` only one that all processes know of."""
        failure = self.failure
        if failure is not None and (failure.known or not known):
            self.told(failure.number)
            raise failure.error

    @property
    def failure(self) -> Failed | None:
        """The first failure that was not raised yet."""
        return self._failures[0] if self._failures else None

    def told(self, number: int) -> None:
        """That save ``number`` failed is known; nobody needs to hear of it again, not even when it turns out later."""
        self._told.add(number)
        self._failures = [failure for failure in self._failures if failure.number not in self._told]

    def note(self, error: BaseException) -> None:
        """Something else went wrong in this process, which all shall raise at their next meeting."""
        self._note(error, known=False, lost=False)

    def drain(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is under way.

        Raises:
            SaveTimeoutError: something still is after ``timeout_s``; it goes on.
        """
        thread = self._thread
        if thread is None:
            return
        thread.join(timeout_s)
        if thread.is_alive():
            raise SaveTimeoutError(
                f"{self._run.path}: a save is still being written after {timeout_s:g} s. The checkpoints before it are "
                "safe; look at whether the disk answers.",
                path=self._run.path,
            )
        self._thread = None

    def close(self) -> None:
        """Let go of the memory and the optimizers, when nothing is under way."""
        if self._arena is not None and not self.busy():
            self._arena.release()
        if self._guard is not None:
            self._guard.close()

    def _begin_alone(self, capture: Callable[[], Mapping[str, CapturedEntry]], about: About) -> SaveUnderWay:
        from holdfast.saving import Save  # torch is needed only here, not for reading a run

        return Save(self._run.store, capture(), about, unchanged=self._unchanged)

    def _stage(self, save: SaveUnderWay, costs: Stopwatch) -> bool:
        """Copy the state, as much of it as has to be; False where it must be written from where it is."""
        if self._arena is None:
            return False
        try:
            late = () if self._guard is None else self._guard.addresses()
            staging = save.stage(self._arena, late)
        except MemoryError as error:
            if not self._told_of_memory:
                self._told_of_memory = True
                _logger.warning(
                    "%s: no memory for a copy of the state (%s): saves block until they are durable.",
                    self._run.path,
                    error,
                )
            return False
        except BaseException:
            save.abort()
            raise
        costs.mode = "background"
        if self._guard is not None:
            costs.mode = "overlap"
            self._guard.hold(staging)
        return True

    def _start(self, work: Callable[[], None]) -> bool:
        """Do ``work`` in the background; False where no thread is to be had."""

        def run() -> None:
            time.sleep(0)  # lets go of Python's lock, so that the caller goes on first
            work()

        self._thread = threading.Thread(target=run, name="holdfast-writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            return False
        return True

    def _reserve(self, nbytes: int) -> None:
        assert self._arena is not None
        with contextlib.suppress(MemoryError):  # the save that needs it says so
            self._arena.reserve(nbytes)

    def _finish(self, save: SaveUnderWay, handle: SaveHandle, costs: Stopwatch) -> None:
        try:
            save.copy_rest()  # first, and as fast as it can: an optimizer may be waiting
            if threading.current_thread() is self._thread:
                _give_way()
            committed = save.finish(self._run.free_names(handle.step))
        except Exception as error:  # noqa: BLE001 - check() and the handle raise it
            self._fail(handle, error, known=self._arena is None)
            return
        except BaseException as error:
            handle._future.set_exception(error)  # an interrupt: nobody may wait for this save for ever
            raise
        costs.finished()
        handle._future.set_result(committed)
        if not isinstance(committed, Checkpoint):
            return  # the process that committed it does the rest
        try:
            self._after_commit(committed)
        except Exception as error:  # noqa: BLE001 - check() raises it
            # The checkpoint is safe, so the handle says so; that others could not be removed is raised by check().
            self._note(error, known=False, lost=False)
        self._tell(committed, handle)

    def _fail(self, handle: SaveHandle, error: BaseException, *, known: bool) -> None:
        self._note(error, known=known, lost=True)
        handle._future.set_exception(error)

    def _note(self, error: BaseException, *, known: bool, lost: bool) -> None:
        if not lost or self.number not in self._told:
            self._failures.append(Failed(self.number, error, known, lost))

    def _tell(self, checkpoint: Checkpoint, handle: SaveHandle) -> None:
        report = handle.report()
        _logger.info(
            "saved %s: step %d, epoch %d (%s): %s",
            checkpoint.path,
            checkpoint.step,
            checkpoint.epoch,
            checkpoint.reason,
            report,
        )
        event: dict[str, Any] = {
            "event": "save",
            "checkpoint": checkpoint.name,
            "reason": checkpoint.reason,
            "created_at": checkpoint.created_at.isoformat(),
            **asdict(report),
        }
        try:
            self._run.store.log(msgspec.json.encode(event))
        except StorageError as error:
            _logger.warning("%s", error)


def _give_way() -> None:
    """Let the training's threads go first from here on; a thread cannot take that back."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
