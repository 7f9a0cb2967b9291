"""A checkpointer between entering its block and leaving it: when it saves, how the saves went, how it ends.

:class:`holdfast.Checkpointer` says what each call means; here is what becomes of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.checkpoint import Checkpoint
from holdfast.company import Call, Company, Due, Verdict
from holdfast.errors import HoldfastError, UsageError
from holdfast.handle import SaveHandle
from holdfast.keeping import Keeper
from holdfast.pace import Pace
from holdfast.part import About
from holdfast.policies import Moment, SavePolicy, calm_steps, spacing_s
from holdfast.preemption.leaving import PreemptionWatch, Saver
from holdfast.state.kinds import estimated_nbytes
from holdfast.training import Training
from holdfast.writer import Writer

Event = Literal["step", "epoch", "batch"]

_logger = logging.getLogger("holdfast")
_OTHERS_MAY_BE_GONE_S = 30.0
_NEWS = 0.25  # a distance between saves that changed by less is not worth a line


@dataclass(frozen=True, slots=True)
class Writing:
    """How a training loop saves: the arguments of :class:`holdfast.Checkpointer`, which say what they mean.

    Raises:
        UsageError: they contradict each other.
    """

    background: bool
    overlap: bool
    when_busy: str
    share_unchanged: bool
    drain_s: float

    def __post_init__(self) -> None:
        if self.overlap and not self.background:
            raise UsageError(
                "overlap=True: only saves in the background overlap; expected background=True.", key="overlap"
            )
        if self.when_busy not in ("wait", "skip"):
            raise UsageError(f"when_busy=: expected 'wait' or 'skip', found {self.when_busy!r}.", key="when_busy")
        seconds = self.drain_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise UsageError(f"drain_s=: expected a positive number of seconds, found {seconds!r}.", key="drain_s")


class Block:
    """Saves a training while its block is open. Belongs to the thread that trains, in the process that entered it.

    Args:
        path: of the run, for messages.
        training: what is saved.
        company: the processes that train.
        writer: writes checkpoints; closed with the block.
        policy: when to save.
        keeper: gives metrics to checkpoints.
        writing: how to save.
        preemption: who wants the training to leave.
        run_id: of the run.
        resumed_from: the checkpoint that the training goes on from.

    Attributes:
        skipped: saves that were due, and not made since one was under way.
        metrics: what was measured of the present state, encoded.
        unsaved: whether the present state is in no checkpoint, nor on its way into one.
    """

    def __init__(
        self,
        path: str,
        training: Training,
        company: Company,
        writer: Writer,
        policy: SavePolicy,
        keeper: Keeper,
        writing: Writing,
        preemption: PreemptionWatch,
        *,
        run_id: str,
        resumed_from: Checkpoint | None,
    ) -> None:
        self.skipped = 0
        self.metrics: dict[str, Any] = {}
        self.unsaved = False
        self.writer = writer
        self._path = path
        self._training = training
        self._company = company
        self._policy = policy
        self._keeper = keeper
        self._writing = writing
        self._preemption = preemption
        self._run_id = run_id
        self._resumed_from = resumed_from
        self._pid = os.getpid()
        self._pace = Pace()
        self._saves = 0
        self._last: SaveHandle | None = None
        self._warmed_up = False
        self._told_spacing_s = 0.0

    # --------------------------------------------------------------------------------------------------- its borders

    @property
    def is_of_this_process(self) -> bool:
        """Whether this is the process that entered the block, and no fork of it."""
        return self._pid == os.getpid()

    def check_process(self) -> None:
        """UsageError in a fork."""
        if not self.is_of_this_process:
            raise UsageError(
                f"{self._path}: this process was forked from the one that writes the run, which alone can save."
            )

    def finish(self) -> None:
        """Save what is not saved yet, and wait until all is durable."""
        if self.unsaved:
            self.submit("end of training")
        with self._company.all_succeed("waiting for the last save"):
            self.writer.drain(self._writing.drain_s)
        self.meet("end")

    def finish_after(self, error: BaseException | None) -> None:
        """Finish what is under way without hiding ``error``, which is leaving the block.

        Of several processes others may be gone, and what starts them all again may be waiting for this one.
        """
        if self._preemption.left:
            return
        patience_s = self._writing.drain_s
        if self._company.size > 1:
            self._preemption.end(error)  # a signal shall end this process while it waits
            patience_s = min(patience_s, _OTHERS_MAY_BE_GONE_S)
        try:
            self.writer.drain(patience_s)
            self.writer.check()
        except Exception:
            _logger.exception("a save under way failed while an exception was leaving the block")

    def close(self, error: BaseException | None) -> None:
        """Listen no longer to who wants to preempt, and let go of the memory; ``error`` is what leaves the block."""
        self._preemption.end(error)
        self.writer.close()

    # --------------------------------------------------------------------------------------------------- at each call

    @contextmanager
    def standing_still(self, *, whole_step: bool = False) -> Iterator[None]:
        """The training called, and waits until it may go on."""
        if self._pace.stop(busy=self.writer.busy(), whole_step=whole_step):
            self._tell_spacing()
        try:
            yield
        finally:
            self._pace.go()

    def moved(self, metrics: Mapping[str, Any]) -> None:
        """The state is another one, of which ``metrics``, encoded, were measured."""
        self.metrics = dict(metrics)
        self.unsaved = True

    def warm_up(self) -> None:
        """Once, when the optimizers have their state, have the memory made that the first save will need."""
        if not self._warmed_up:
            self._warmed_up = True
            self.writer.warm_up(estimated_nbytes(self._training.state))

    def meet(self, event: Event | Literal["save", "evaluation", "end"]) -> Verdict:
        """What is to be done at this call. Raises what failed since the last one."""
        if self._company.rank == 0:
            self._preemption.measure(self._last)
        asked = None if event in ("save", "end") else self._preemption.asked()
        progress = self._training.progress
        call = Call(event, progress.step, progress.epoch, self.writer.failure, asked, self.metrics)
        verdict = self._company.meet(call, lambda: self._due(event))
        failed = verdict.failed
        if failed is not None:
            self.writer.told(failed.number)
            self.unsaved = self.unsaved or (failed.lost and failed.number == self.writer.number)
            raise failed.error
        return verdict

    def save_or_leave(self, event: Event) -> SaveHandle | None:
        """The policy's save, unless the training was asked to leave: before it, or while it began."""
        verdict = self.meet(event)
        self.leave_if_asked(verdict)
        if verdict.due.skipped:
            self.skipped += 1
            _logger.info(
                "%s: no save at step %d, since one is under way (%d skipped so far)",
                self._path,
                self._training.progress.step,
                self.skipped,
            )
        if verdict.due.reason is None:
            return None
        handle = self.submit(verdict.due.reason)
        if self._company.size == 1:  # several hear of it when they meet again
            self.leave_if_asked(Verdict(asked=self._preemption.asked()))
        return handle

    def leave_if_asked(self, verdict: Verdict) -> None:
        """Save, and raise Preempted, where ``verdict`` is to leave."""
        if verdict.asked is not None:
            self._preemption.adopt(verdict.asked)
            self._preemption.leave(self._saver())

    def submit(self, reason: str) -> SaveHandle:
        """Begin a save of the present state."""
        self._training.warn_of_forgotten()
        progress = self._training.progress
        parent = None if self._resumed_from is None else self._resumed_from.checkpoint_id
        about = About(progress.step, progress.epoch, self.metrics, reason, self._run_id, parent)
        with self._pace.saving():
            self._last = handle = self.writer.save(self._training.capture, about)
        self._saves += 1
        self.unsaved = False
        self._check()
        return handle

    def keep_metrics(self) -> None:
        """Give metrics for which no save was due to the checkpoint of this step, if there is one."""
        if self._company.rank != 0:
            return
        progress = self._training.progress
        try:
            if self._last is not None and self._last.step == progress.step:
                self.writer.drain()
                self._check()
            self._keeper.add_metrics(self._last, progress.step, progress.epoch, self.metrics)
        except HoldfastError as error:
            if self._company.size == 1:
                raise
            self.writer.note(error)

    # ---------------------------------------------------------------------------------------------------- what is due

    def _due(self, event: str) -> Due:
        """Whether the policy wants a save."""
        if event not in ("step", "epoch", "batch"):
            return Due()
        progress, busy = self._training.progress, self.writer.busy()
        moment = Moment(
            event,  # type: ignore[arg-type]  # one of these three
            progress.step,
            progress.epoch,
            self._pace.since_save_s,
            saves=self._saves,
            cost_s=self._pace.cost_s,
            busy=busy,
        )
        reason = self._policy.due(moment)
        calm = calm_steps(self._policy, progress.step)
        if reason is not None and self._writing.when_busy == "skip" and busy:
            return Due(skipped=True, calm=calm)
        return Due(reason, calm=calm)

    def _tell_spacing(self) -> None:
        """Say how far apart saves are, where that follows from what they cost, and it changed."""
        if self._company.rank != 0:
            return
        cost_s = self._pace.cost_s
        spacing = None if cost_s is None else spacing_s(self._policy, cost_s)
        if spacing is None or abs(spacing - self._told_spacing_s) <= _NEWS * self._told_spacing_s:
            return
        self._told_spacing_s = spacing
        _logger.info(
            "%s: a save takes %.3g s from the training; from now on one every %.3g s (%s)",
            self._path,
            cost_s,
            spacing,
            self._policy,
        )

    # ------------------------------------------------------------------------------------------------ how saves went

    def _saver(self) -> Saver:
        return Saver(
            saved=lambda: None if self.unsaved else self._last or self._resumed_from,
            save=self.submit,
            drain=self._drain_together,
            check=lambda: self._check(drained=True),
            patience_s=self._writing.drain_s,
            background=self._writing.background or self._company.size > 1,
            leads=self._company.rank == 0,
        )

    def _drain_together(self, timeout_s: float) -> None:
        with self._company.all_succeed("waiting for the save under way"):
            self.writer.drain(timeout_s)
        self._count_lost()

    def _check(self, *, drained: bool = False) -> None:
        """Raise what went wrong since the last look; when it was the last save, there is something to save again.

        Of several processes one may know already what the others learn when they meet: then nothing is raised here, and
        no save follows that the others would not make. Unless all have ``drained``: then each knows how it went.
        """
        try:
            self.writer.check(known=self._company.size > 1 and not drained)
        except BaseException:
            self._count_lost()
            raise

    def _count_lost(self) -> None:
        """When the last save failed, there is something to save again."""
        self.unsaved = self.unsaved or (self._last is not None and self._last.failed())
