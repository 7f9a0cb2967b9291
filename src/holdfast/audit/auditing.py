"""The audit: three parts run, two compared with the third, and the causes of what differs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from holdfast.audit import where
from holdfast.audit.comparison import compare, pairs
from holdfast.audit.diagnosis import diagnose
from holdfast.audit.experiments import Evidence, Halves, Laboratory
from holdfast.audit.interpreters import Interpreter, refuse_inside
from holdfast.audit.records import Outcome, Where
from holdfast.audit.report import AuditReport, Cause, Counts
from holdfast.errors import AuditError, UsageError

Training = Callable[[], tuple[Any, Callable[[], Any]]]
"""Builds a fresh training; returns its state and what does one step."""


class Auditor:
    """Audits one training after another. It starts two interpreters, which import torch once for all of them.

    Use it as a context manager. Each part of each training still runs in a new process, forked from one of the two;
    their environment variables are those of the moment when the auditor was made. Threads may share one: they wait for
    each other.

    Raises:
        UsageError: this process is a part of an audit itself.
    """

    def __init__(self) -> None:
        refuse_inside()
        self._turn = threading.Lock()
        self._stack = ExitStack()
        self._directory = self._stack.enter_context(TemporaryDirectory(prefix="holdfast-audit-"))
        home, away = (self._stack.enter_context(Interpreter(self._directory, name)) for name in ("home", "away"))
        self._interpreters = home, away

    def audit(
        self,
        training: Training | str,
        *,
        before: int = 3,
        after: int = 3,
        progress: Callable[[str], None] = lambda doing: None,
    ) -> AuditReport:
        """Find out whether a training resumes exactly; see :func:`audit`."""
        for name, count in (("before", before), ("after", after)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UsageError(f"{name}: expected a number of steps of at least 1, found {count!r}.", key=name)
        place = where.parse(training) if isinstance(training, str) else where.of(training)
        target = training if isinstance(training, str) else f"{place.module or place.file}:{place.function}"
        with self._turn, TemporaryDirectory(dir=self._directory) as directory, ExitStack() as stack:
            start_s = time.monotonic()
            laboratory = Laboratory(stack, directory, self._interpreters, place, (before, after))
            progress(f"running {place.function}: without interruption, and up to a save and on from there")
            halves = laboratory.halves(laboratory.home, laboratory.away)
            if isinstance(halves, Outcome):
                raise _error(halves, place)
            return _report(laboratory, halves, target, start_s, progress)

    def close(self) -> None:
        """End the interpreters, with whatever they still run."""
        self._stack.close()

    def __enter__(self) -> Auditor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self.close()


def audit(
    training: Training | str,
    *,
    before: int = 3,
    after: int = 3,
    progress: Callable[[str], None] = lambda doing: None,
) -> AuditReport:
    """Find out whether a training resumes exactly. Blocks; everything runs in new processes.

    Args:
        training: builds a fresh training and returns ``(state, step)``: ``state`` as for :func:`holdfast.save`, and a
            function that does one step and returns its loss, or any plain value, or None. A function at the top level
            of a module, or where it is: ``"train.py:training"`` or ``"package.module:training"``.
        before: steps before the save.
        after: steps after the restore.
        progress: is told what is being done, in words.

    Returns:
        The report. A divergence is a result, not an error.

    Raises:
        UsageError: the function cannot be found by another process, or returns something else, or a count is below 1.
        AuditError: the training, or saving or restoring it, failed; it carries the traceback.
    """
    with Auditor() as auditor:
        return auditor.audit(training, before=before, after=after, progress=progress)


def assert_resumes_exactly(training: Training | str, *, before: int = 3, after: int = 3) -> None:
    """:func:`audit` for a test: an AssertionError with the whole report when something differs.

    Raises:
        AssertionError: it does not resume exactly.
        UsageError, AuditError: it could not be audited.
    """
    report = audit(training, before=before, after=after)
    if not report.exact:
        raise AssertionError(str(report))


def _report(
    laboratory: Laboratory, halves: Halves, target: str, start_s: float, progress: Callable[[str], None]
) -> AuditReport:
    causes: tuple[Cause, ...] = ()
    repeatable = True
    divergence = compare(halves.whole, halves.first) or compare(halves.whole, halves.second)
    if divergence is not None:
        progress(f"{divergence.moment}: {divergence.first.name} differs; looking for the cause")
        divergence, repeatable, causes = diagnose(Evidence(laboratory, halves, divergence))
    return AuditReport(
        target=target,
        before=laboratory.before,
        after=laboratory.after,
        counts=_counts(halves, time.monotonic() - start_s),
        divergence=divergence,
        repeatable=repeatable,
        causes=causes,
        notes=tuple(halves.second.notes),
    )


def _counts(halves: Halves, seconds: float) -> Counts:
    compared = [point for point, _ in pairs(halves.whole, halves.second)]
    return Counts(
        leaves=len(compared[0].state),
        nbytes=sum(leaf.nbytes for point in compared for leaf in point.state.values()),
        moments=len(compared),
        generators=tuple(compared[0].generators),
        seconds=seconds,
    )


def _error(outcome: Outcome, place: Where) -> Exception:
    failure = outcome.failure
    assert failure is not None
    if failure.usage:
        return UsageError(failure.message, key=place.function)
    text = f"{failure.doing} failed: {failure.message}"
    return AuditError(f"{text}\n\n{failure.traceback.rstrip()}" if failure.traceback else text, key=place.function)
