"""The training loop's side: counts steps and epochs, resumes on entry, saves when a policy says so."""

from __future__ import annotations

import logging
import os
import secrets
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from holdfast.checkpoint import Checkpoint
from holdfast.errors import MissingMetricError, UsageError
from holdfast.policies import Every, KeepLast, Moment, SavePolicy, ranking_metrics
from holdfast.resume import Resume, resume_run
from holdfast.run import Retention, Run
from holdfast.saving import About, encode_metrics
from holdfast.state.capture import LOOP_ENTRY, CapturedEntry, capture
from holdfast.state.forgotten import forgotten
from holdfast.state.guard import StepGuard
from holdfast.state.kinds import estimated_nbytes
from holdfast.state.report import RestoreReport
from holdfast.state.unchanged import Unchanged
from holdfast.writer import SaveHandle, Writer

_logger = logging.getLogger("holdfast")


class Checkpointer:
    """Saves a training as it goes and resumes it where it stopped. Use it in a ``with`` block.

    On entry the newest intact checkpoint of the run is restored into ``state``, in place; broken ones are passed over
    with a warning. On leaving the block normally, what is not saved yet is saved. When an exception leaves it nothing
    is saved, since the state may be in the middle of a step.

    Saves run in the background: a call copies the state and returns; a thread writes the copy. One save is under way at
    a time. When it fails, the next ``step()``, ``end_epoch()`` or ``save()``, or the end of the block, raises what went
    wrong. The copy takes as much memory as the state; where there is not that much, it says so once, and saves block.

    Not thread-safe: it belongs to the thread that trains. A forked process, such as a loader's worker, cannot save.

    Args:
        path: the directory of the run; made when it is missing. One process at a time writes a run.
        state: names to everything that the training is made of, as for :func:`holdfast.save`. Random-number
            generators, step and epoch are saved without being named.
        save: when to save; every ten minutes by default.
        keep: what to keep; the last three checkpoints by default.
        resume: ``"latest"``, ``"never"``, ``"best:<metric>"``, a step, or the path of a checkpoint or run to start
            from. A path counts only as long as this run has no checkpoint of its own.
        background: ``False`` writes at the call, without a copy of the state.
        overlap: copy parameters and optimizer state beside the next forward and backward, instead of at the call; the
            optimizers of ``state`` wait in their ``step()`` for what is left. Everything else is copied at the call.
            **Until the next optimizer step nothing else may write the weights.** Most such writes are noticed, and
            fail the save with ``StrayWriteError``; writes through ``.data``, numpy or fused kernels are not, and would
            be saved. See docs/saving.md.
        when_busy: ``"wait"`` for the save under way when the next one is due, or ``"skip"`` the one that is due, which
            ``skipped`` counts. What is asked for with ``save()`` always waits.
        share_unchanged: store what did not change since the last checkpoint, such as frozen parameters, once: it lies
            in a file of its own, which the next checkpoint links. A bit that flips in there damages them all.
        drain_s: how long the end of the block waits for the save under way.

    Raises (on entry):
        RunBusyError: another process writes this run.
        StateMismatchError: the checkpoint does not fit ``state``; nothing was touched.
        CorruptCheckpointError: there are checkpoints and not one is intact.
        CheckpointNotFoundError: the checkpoint asked for does not exist.
        CheckpointExistsError: ``resume="never"`` in a run that has checkpoints.
        FormatVersionError: the newest checkpoint was written by a newer Holdfast.
        StorageError: the directory cannot be made or read.

    Example:
        >>> with Checkpointer(path, {"model": model}, save=Every(epochs=1)) as ckpt:  # doctest: +SKIP
        ...     for epoch in range(ckpt.epoch, 20):
        ...         for batch in loader:
        ...             train_step(batch)
        ...             ckpt.step()
        ...         ckpt.end_epoch({"val_loss": validate()})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        save: SavePolicy = Every(minutes=10),  # noqa: B008 - policies are frozen
        keep: Retention = KeepLast(3),  # noqa: B008 - policies are frozen
        resume: Resume = "latest",
        background: bool = True,
        overlap: bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        share_unchanged: bool = True,
        drain_s: float = 600.0,
    ) -> None:
        _check_policies(save, keep)
        _check_writing(background, overlap, when_busy, drain_s)
        self.run = Run(path)
        self.resumed_from: Checkpoint | None = None
        self.report: RestoreReport | None = None
        self.skipped = 0
        self._state = state
        self._save_policy = save
        self._keep_policy = keep
        self._resume = resume
        self._background = background
        self._overlap = overlap
        self._when_busy = when_busy
        self._share_unchanged = share_unchanged
        self._drain_s = drain_s
        self._writer: Writer | None = None
        self._pid = 0
        self._run_id = ""
        self._resumed_own = False
        self._step = 0
        self._epoch = 0
        self._steps_in_epoch = 0
        self._metrics: dict[str, Any] = {}
        self._unsaved = False
        self._saved_at_s = 0.0
        self._last: SaveHandle | None = None
        self._looked_for_forgotten = False
        self._warmed_up = False
        self._told_of_no_candidates = False

    # ------------------------------------------------------------------------------------------------- where it is

    @property
    def epoch(self) -> int:
        """Epochs done, which is the number of the epoch to go on with: ``range(ckpt.epoch, epochs)``."""
        return self._epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done, over all processes that this run was continued by."""
        return self._step

    # ------------------------------------------------------------------------------------------------- the block

    def __enter__(self) -> Checkpointer:
        if self._writer is not None:
            raise UsageError("this Checkpointer is in use already; make another one for another block.")
        self.run.store.hold()
        try:
            for name in self.run.store.clean():
                _logger.info("removed %s, left by a save that did not end", os.path.join(self.run.path, name))
            self._continue()
        except BaseException:
            self.run.store.release()
            raise
        self._writer = self._new_writer()
        if self.resumed_from is not None:
            self._warm_up(self._writer)
        self._pid = os.getpid()
        self._saved_at_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        if self._pid != os.getpid():
            return False  # a forked child on its way out: the run is its parent's
        writer = self._in_block()
        try:
            if kind is None:
                if self._unsaved:
                    self._submit("end of training")
                writer.drain(self._drain_s)
                writer.check()
            else:
                self._finish_after_error(writer)
        finally:
            writer.close()
            self._writer = None
            self.run.store.release()
        return False

    def _finish_after_error(self, writer: Writer) -> None:
        """Finish what is under way without hiding the exception that is leaving the block."""
        try:
            writer.drain(self._drain_s)
            writer.check()
        except Exception:
            _logger.exception("a save under way failed while an exception was leaving the block")

    # --------------------------------------------------------------------------------------------------- the loop

    def step(self) -> SaveHandle | None:
        """Tell that one optimizer step is done. Begins a save when the save policy says so.

        Returns:
            The save, if one was begun.

        Raises:
            StorageError: a save failed, this one or the one before. Earlier checkpoints are intact, and training may
                go on.
        """
        writer = self._in_block()
        self._step += 1
        self._steps_in_epoch += 1
        self._metrics = {}
        self._unsaved = True
        self._check(writer)
        self._warm_up(writer)
        return self._save_if_due("step")

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> SaveHandle | None:
        """Tell that an epoch is done. Call it last in the epoch, after the scheduler's step.

        Args:
            metrics: what was measured of the state as it is now; they belong to this step and are saved with it.

        Returns:
            The save, if one was begun.

        Raises:
            MissingMetricError: the retention policy ranks by a metric that is not among ``metrics``.
            StorageError: a save failed. Earlier checkpoints are intact, and training may go on.
        """
        writer = self._in_block()
        self._check_metrics(metrics or {})
        encoded = encode_metrics(metrics)
        self._epoch += 1
        self._steps_in_epoch = 0
        self._metrics = encoded
        self._unsaved = True
        self._check(writer)
        handle = self._save_if_due("epoch")
        if handle is None and encoded:
            self._keep_metrics()
        return handle

    def save(self, metrics: Mapping[str, float] | None = None, *, reason: str = "asked for") -> SaveHandle:
        """Begin a save now, whatever the policy says; waits for the one under way to end first.

        ``save().result()`` waits until it is durable.

        Args:
            metrics: what was measured of the state as it is now.
            reason: why, in words, for whoever lists the run.
        """
        self._check(self._in_block())
        self._metrics = {**self._metrics, **encode_metrics(metrics)}
        return self._submit(reason)

    # ----------------------------------------------------------------------------------------------------- saving

    def _save_if_due(self, event: Literal["step", "epoch"]) -> SaveHandle | None:
        since_save_s = time.monotonic() - self._saved_at_s
        reason = self._save_policy.due(Moment(event, self._step, self._epoch, since_save_s))
        if reason is None:
            return None
        if self._when_busy == "skip" and self._in_block().busy():
            self.skipped += 1
            _logger.info(
                "%s: no save at step %d, since one is under way (%d skipped so far)",
                self.run.path,
                self._step,
                self.skipped,
            )
            return None
        return self._submit(reason)

    def _submit(self, reason: str) -> SaveHandle:
        writer = self._in_block()
        self._name_forgotten()
        parent = None if self.resumed_from is None else self.resumed_from.checkpoint_id
        about = About(self._step, self._epoch, self._metrics, reason, self._run_id, parent)
        self._last = handle = writer.save(self._capture, about)
        self._unsaved = False
        self._saved_at_s = time.monotonic()
        self._check(writer)
        return handle

    def _capture(self) -> dict[str, CapturedEntry]:
        captured = capture(self._state)
        captured[LOOP_ENTRY] = CapturedEntry({"steps_in_epoch": self._steps_in_epoch}, {}, {})
        return captured

    def _check(self, writer: Writer) -> None:
        """Raise what went wrong since the last look; when it was the last save, there is something to save again."""
        try:
            writer.check()
        finally:
            self._unsaved = self._unsaved or (self._last is not None and self._last.failed())

    def _keep_metrics(self) -> None:
        """Record metrics for which no save was due, where a checkpoint of the very same step can take them."""
        writer = self._in_block()
        if self._last is not None and self._last.step == self._step:
            writer.drain()
            self._check(writer)
        if self._last is not None and self._last.step == self._step and not self._last.failed():
            self._retain(self.run.add_metrics(self._last.result(), self._metrics))
        elif ranking_metrics(self._keep_policy) and not self._told_of_no_candidates:
            self._told_of_no_candidates = True
            _logger.warning(
                "%s: nothing was saved at the end of epoch %d, so its metrics belong to no checkpoint and %s cannot "
                "choose it. Add Every(epochs=1) to save=.",
                self.run.path,
                self._epoch,
                self._keep_policy,
            )

    def _retain(self, checkpoint: Checkpoint) -> None:
        """Runs after each commit, and only then: nothing goes before its successor is durable."""
        report = self.run.prune(self._keep_policy, protect=[checkpoint.name])
        for removed in report.removed:
            _logger.debug("removed %s", removed.path)
        self.run.store.clean()

    def _check_metrics(self, metrics: Mapping[str, Any]) -> None:
        for name in ranking_metrics(self._keep_policy):
            if name not in metrics:
                given = ", ".join(metrics) or "none"
                raise MissingMetricError(
                    f"end_epoch: {self._keep_policy} ranks checkpoints by {name!r}, but the metrics given are: "
                    f"{given}. Pass it: end_epoch({{{name!r}: value}}).",
                    key=name,
                )

    def _name_forgotten(self) -> None:
        if self._looked_for_forgotten:
            return
        self._looked_for_forgotten = True
        for what in forgotten(self._state):
            warnings.warn(
                f"a {what} is alive and not in the state of {self.run.path}: it will not be saved, and a resumed "
                "training will differ. Add it to the state.",
                stacklevel=4,
            )

    def _warm_up(self, writer: Writer) -> None:
        """Once, when the optimizers have their state, have the memory made that the first save will need."""
        if not self._warmed_up:
            self._warmed_up = True
            writer.warm_up(estimated_nbytes(self._state))

    def _new_writer(self) -> Writer:
        own = self.resumed_from if self._resumed_own else None
        return Writer(
            self.run,
            self._retain,
            unchanged=Unchanged(own) if self._share_unchanged else None,
            background=self._background,
            guard=StepGuard(self._state) if self._overlap else None,
        )

    # -------------------------------------------------------------------------------------------------- resuming

    def _continue(self) -> None:
        resumed = resume_run(self.run, self._state, self._resume, self._keep_policy)
        self._run_id = resumed.run_id or secrets.token_hex(16)
        self._resumed_own = resumed.run_id is not None
        if resumed.checkpoint is None:
            _logger.info("starting a new run in %s", self.run.path)
            return
        self.resumed_from = resumed.checkpoint
        self.report = resumed.report
        self._step = resumed.checkpoint.step
        self._epoch = resumed.checkpoint.epoch
        loop = resumed.checkpoint.manifest.state.get(LOOP_ENTRY, {})
        self._steps_in_epoch = int(loop.get("steps_in_epoch", 0))
        _logger.info(
            "resumed %s: step %d, epoch %d%s", self.resumed_from.path, self._step, self._epoch, self._position()
        )

    def _position(self) -> str:
        """Where in the epoch the checkpoint was saved, in words; nothing at a border."""
        if self._steps_in_epoch == 0:
            return ""
        return (
            f", {self._steps_in_epoch} steps into it (unless something in the state knows the position in the data, "
            "the epoch starts over)"
        )

    def _in_block(self) -> Writer:
        if self._writer is None:
            raise UsageError("use the Checkpointer inside its block: with Checkpointer(...) as ckpt: ...")
        if self._pid != os.getpid():
            raise UsageError(
                f"{self.run.path}: this process was forked from the one that writes the run, which alone can save."
            )
        return self._writer


def _check_policies(save: object, keep: object) -> None:
    if not callable(getattr(save, "due", None)):
        raise UsageError(f"save=: expected a save policy such as Every(epochs=1), found {save!r}.", key="save")
    if not callable(getattr(keep, "keep", None)):
        raise UsageError(f"keep=: expected a retention policy such as KeepLast(3), found {keep!r}.", key="keep")


def _check_writing(background: bool, overlap: bool, when_busy: object, drain_s: float) -> None:
    if overlap and not background:
        raise UsageError("overlap=True: only saves in the background overlap; expected background=True.", key="overlap")
    if when_busy not in ("wait", "skip"):
        raise UsageError(f"when_busy=: expected 'wait' or 'skip', found {when_busy!r}.", key="when_busy")
    if isinstance(drain_s, bool) or not isinstance(drain_s, (int, float)) or not drain_s > 0:
        raise UsageError(f"drain_s=: expected a positive number of seconds, found {drain_s!r}.", key="drain_s")
