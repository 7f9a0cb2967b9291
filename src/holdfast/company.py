"""Whether a training is one process or several, seen from its loop.

At each call the loop asks what is to be done. One process decides by itself. Several meet, and do the same: see
:mod:`holdfast.distributed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.checkpoint import Checkpoint
from holdfast.run import Run

if TYPE_CHECKING:
    from holdfast.part import About, Costs
    from holdfast.state.capture import CapturedEntry
    from holdfast.state.leaves import Fill
    from holdfast.state.staging import Staging
    from holdfast.storage.arena import Arena

_logger = logging.getLogger("holdfast")

Open = Callable[[], Checkpoint]
"""Opens a checkpoint that another process of the training committed."""


class SaveUnderWay(Protocol):
    """A save as its writer sees it: :class:`holdfast.saving.Save`, or one that several processes make."""

    costs: Costs

    def stage(self, arena: Arena, late: Container[int] = ()) -> Staging:
        """Copy what is to be written; MemoryError where there is no room."""

    def copy_rest(self) -> None:
        """Copy what was left for later."""

    def finish(self, names: Iterable[str]) -> Checkpoint | Open:
        """Write and commit."""

    def abort(self) -> None:
        """Remove what was written."""


Begin = Callable[[Callable[[], Mapping[str, "CapturedEntry"]], "About"], SaveUnderWay]
"""Begins a save of what is captured when it is called."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Something that went wrong in the background.

    Attributes:
        number: of the save that it was about; saves count from 1.
        error: what it was.
        known: whether all processes know of it by now.
        lost: whether what was to be saved is not there.
    """

    number: int
    error: BaseException
    known: bool
    lost: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants the training to leave: who, in how many seconds at most, and whether by hand."""

    reason: str
    left_s: float | None = None
    interrupt: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """What the policies say.

    Attributes:
        reason: why a save is due; None when it is not.
        skipped: whether one would be, were it not for the one that is under way.
        calm: for how many more calls of ``step()`` none becomes due but for the time that goes by.
    """

    reason: str | None = None
    skipped: bool = False
    calm: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the loop, as one process sees it.

    Attributes:
        event: ``"step"``, ``"batch"``, ``"epoch"``, ``"save"``, ``"evaluation"`` or ``"end"``.
        step: optimizer steps done.
        epoch: epochs done.
        failed: what failed here, and was not raised yet.
        asked: who wants this process to leave.
        metrics: what was measured, encoded.
    """

    event: str
    step: int
    epoch: int
    failed: Failed | None = None
    asked: Asked | None = None
    metrics: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What every process does at a call: raise, or leave, or save; or nothing."""

    failed: Failed | None = None
    asked: Asked | None = None
    due: Due = Due()


class Company(Protocol):
    """The processes of a training."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """How many they are."""

    def enter(self, run: Run, arguments: Mapping[str, Any]) -> None:
        """Take the run for writing, and remove what dead writers left there.

        ``arguments`` are those that all processes must have been given alike, in what JSON can say.
        """

    def exit(self, run: Run, error: BaseException | None) -> None:
        """Let go of it; ``error`` is what leaves the block."""

    def resumed(self, run: Run, state: Mapping[str, Any]) -> None:
        """They go on with a state that was restored: warns of what will not be as in one process that never ended."""

    def decided(self, what: str, decide: Callable[[], Any]) -> Any:
        """What one of them decides, in what JSON can say. All raise what ``decide`` raises."""

    def candidates(self, find: Callable[[], Iterator[Checkpoint]]) -> Iterator[Open]:
        """What opens the checkpoints to try, one after the other: those that one of them finds."""

    def all_succeed(self, what: str) -> Any:
        """A context that all leave well, or all with an error: CorruptCheckpointError if one of them raised that."""

    @property
    def fill(self) -> Fill:
        """What reads the tensors of a checkpoint that all restore."""

    def saves(
        self, run: Run, state: Mapping[str, Any], last: Checkpoint | None, *, share_unchanged: bool
    ) -> Begin | None:
        """What begins saves; None where one process makes them alone."""

    def meet(self, call: Call, due: Callable[[], Due]) -> Verdict:
        """What is to be done at a call."""


class Alone:
    """One process: it decides by itself, and at once."""

    rank = 0
    size = 1

    @property
    def fill(self) -> Fill:
        """See :class:`Company`."""
        from holdfast.state.leaves import fill  # torch is needed only here

        return fill

    def enter(self, run: Run, arguments: Mapping[str, Any]) -> None:
        """See :class:`Company`."""
        take(run)

    def exit(self, run: Run, error: BaseException | None) -> None:
        """See :class:`Company`."""
        run.store.release()

    def resumed(self, run: Run, state: Mapping[str, Any]) -> None:
        """See :class:`Company`."""

    def decided(self, what: str, decide: Callable[[], Any]) -> Any:
        """See :class:`Company`."""
        return decide()

    def candidates(self, find: Callable[[], Iterator[Checkpoint]]) -> Iterator[Open]:
        """See :class:`Company`."""
        for found in find():
            yield lambda found=found: found  # type: ignore[misc]  # a lambda with a default

    @contextmanager
    def all_succeed(self, what: str) -> Iterator[None]:
        """See :class:`Company`."""
        yield

    def saves(
        self, run: Run, state: Mapping[str, Any], last: Checkpoint | None, *, share_unchanged: bool
    ) -> Begin | None:
        """See :class:`Company`."""
        return None

    def meet(self, call: Call, due: Callable[[], Due]) -> Verdict:
        """See :class:`Company`."""
        if call.failed is not None:
            return Verdict(failed=call.failed)
        if call.asked is not None:
            return Verdict(asked=call.asked)
        return Verdict(due=due())


def take(run: Run) -> None:
    """Become the only writer of a run, and remove what dead ones left; RunBusyError when there is another."""
    run.store.hold()
    try:
        for name in run.store.clean():
            _logger.info("removed %s, left by a save that did not end", os.path.join(run.path, name))
    except BaseException:
        run.store.release()
        raise
