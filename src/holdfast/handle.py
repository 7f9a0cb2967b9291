"""A save as the training sees it: a handle of it, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.checkpoint import Checkpoint
from holdfast.company import Open, SaveUnderWay

if TYPE_CHECKING:
    from holdfast.state.guard import StepGuard


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save cost. All times in seconds.

    Attributes:
        step: optimizer steps done when it was saved.
        mode: ``"background"``, ``"overlap"`` or ``"blocking"``.
        stall_s: for how long the training stood still: in the call, and in the optimizer's step where that waited.
        waited_s: of that, for an earlier save to end.
        capture_s: describing the state.
        plan_s: planning the files, and finding out what has not changed.
        stage_s: copying the tensors to where the training cannot reach them; 0 where they were written from where
            they are.
        write_s: writing the data files until they were durable.
        commit_s: the manifest, and the renaming that makes the checkpoint visible.
        bytes_written: what was written.
        bytes_linked: what had not changed and was not written again.
    """

    step: int
    mode: str
    stall_s: float
    waited_s: float
    capture_s: float
    plan_s: float
    stage_s: float
    write_s: float
    commit_s: float
    bytes_written: int
    bytes_linked: int

    @property
    def bandwidth(self) -> float:
        """Bytes written per second of writing."""
        return self.bytes_written / self.write_s if self.write_s else 0.0

    def __str__(self) -> str:
        linked = f", {self.bytes_linked / 1e6:.1f} MB linked" if self.bytes_linked else ""
        return (
            f"{self.bytes_written / 1e6:.1f} MB written at {self.bandwidth / 1e6:.0f} MB/s{linked}; {self.mode}: "
            f"training stood still for {self.stall_s * 1e3:.1f} ms; staging {self.stage_s:.3f} s, "
            f"writing {self.write_s:.3f} s, commit {self.commit_s:.3f} s"
        )


class SaveHandle:
    """A save under way. Safe to use from several threads."""

    def __init__(self, step: int, future: Future[Checkpoint | Open], report: Callable[[], SaveReport]) -> None:
        self.step = step
        self._future = future
        self._report = report
        self._opened: Checkpoint | None = None

    def done(self) -> bool:
        """Whether the save has ended, well or not. Does not block."""
        return self._future.done()

    def failed(self) -> bool:
        """Whether the save has ended and is not there. Does not block."""
        return self._future.done() and self._future.exception() is not None

    def result(self, timeout: float | None = None) -> Checkpoint:
        """The committed checkpoint; blocks until it is durable.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: the save is still under way after ``timeout``.
            StorageError: the save failed; what was durable before is still there.
            StrayWriteError: an overlapping save found that a tensor was written while it was copied.
            RankError: another process of the training could not do its part of the save.
        """
        found = self._future.result(timeout)
        if isinstance(found, Checkpoint):
            return found
        if self._opened is None:
            self._opened = found()
        return self._opened

    def report(self, timeout: float | None = None) -> SaveReport:
        """What the save cost; blocks until it is durable, and raises as :meth:`result` does."""
        self._future.result(timeout)
        return self._report()


class Stopwatch:
    """The parts of a save as they go by, seen from the training."""

    def __init__(self, step: int, guard: StepGuard | None) -> None:
        self.step = step
        self.mode = "blocking"
        self._guard = guard
        self._start_s = time.perf_counter()
        self._waited_s = 0.0
        self._capture_s = 0.0
        self._plan_s = 0.0
        self._guarded_s = 0.0
        self._stall_s: float | None = None
        self._save: SaveUnderWay | None = None

    def waited(self) -> None:
        """The save before has ended."""
        self._waited_s = time.perf_counter() - self._start_s

    def captured(self) -> None:
        """The state is described."""
        self._capture_s = time.perf_counter() - self._start_s - self._waited_s

    def planned(self, save: SaveUnderWay) -> None:
        """The files are planned."""
        self._save = save
        self._plan_s = time.perf_counter() - self._start_s - self._waited_s - self._capture_s

    def returned(self) -> None:
        """The training goes on."""
        self._stall_s = time.perf_counter() - self._start_s

    def finished(self) -> None:
        """It is durable, and no optimizer waits for it any more."""
        if self.mode == "overlap" and self._guard is not None:
            self._guarded_s = self._guard.waited_s

    def report(self) -> SaveReport:
        """What it was in all."""
        assert self._save is not None
        parts = self._save.costs
        stall_s = time.perf_counter() - self._start_s if self._stall_s is None else self._stall_s
        return SaveReport(
            step=self.step,
            mode=self.mode,
            stall_s=stall_s + self._guarded_s,
            waited_s=self._waited_s,
            capture_s=self._capture_s,
            plan_s=self._plan_s,
            stage_s=parts.stage_s,
            write_s=parts.write_s,
            commit_s=parts.commit_s,
            bytes_written=parts.bytes_written,
            bytes_linked=parts.bytes_linked,
        )
