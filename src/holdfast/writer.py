"""Saves under way: what a checkpointer hands over, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from holdfast.checkpoint import Checkpoint
from holdfast.run import Run

if TYPE_CHECKING:
    from holdfast.saving import About
    from holdfast.state.capture import CapturedEntry


class SaveHandle:
    """A save under way. Safe to use from several threads."""

    def __init__(self, future: Future[Checkpoint]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether the save has ended, well or not. Does not block."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Checkpoint:
        """The committed checkpoint; blocks until it is durable.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: the save is still under way after ``timeout``.
            StorageError: the save failed; what was durable before is still there.
        """
        return self._future.result(timeout)


class Writer(Protocol):
    """Writes what was captured, now or later. What fails is raised by ``check``, once, and by the handle."""

    def submit(self, captured: Mapping[str, CapturedEntry], about: About) -> SaveHandle:
        """Begin a save of what was captured."""

    def check(self) -> None:
        """Raise the first failure that was not raised yet."""

    def drain(self) -> None:
        """Wait until nothing is under way."""


class BlockingWriter:
    """Writes at the call.

    Args:
        run: where to.
        after_commit: called with each committed checkpoint; retention runs there, and only there.
    """

    def __init__(self, run: Run, after_commit: Callable[[Checkpoint], None]) -> None:
        self._run = run
        self._after_commit = after_commit
        self._failure: BaseException | None = None

    def submit(self, captured: Mapping[str, CapturedEntry], about: About) -> SaveHandle:
        """Save, and return the ended save."""
        future: Future[Checkpoint] = Future()
        try:
            checkpoint = self._run.write(captured, about)
        except Exception as error:  # noqa: BLE001 - whatever it is, check() and the handle raise it
            self._failure = self._failure or error
            future.set_exception(error)
            return SaveHandle(future)
        future.set_result(checkpoint)
        try:
            self._after_commit(checkpoint)
        except Exception as error:  # noqa: BLE001 - check() raises it
            # The checkpoint is safe, so the handle says so; that others could not be removed is raised by check().
            self._failure = self._failure or error
        return SaveHandle(future)

    def check(self) -> None:
        """Raise the first failure that was not raised yet."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def drain(self) -> None:
        """Nothing is ever under way between calls."""
