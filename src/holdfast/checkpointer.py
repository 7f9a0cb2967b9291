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
from holdfast.state.report import RestoreReport
from holdfast.writer import BlockingWriter, SaveHandle, Writer

_logger = logging.getLogger("holdfast")


class Checkpointer:
    """Saves a training as it goes and resumes it where it stopped. Use it in a ``with`` block.

    On entry the newest intact checkpoint of the run is restored into ``state``, in place; broken ones are passed over
    with a warning. On leaving the block normally, what is not saved yet is saved. When an exception leaves it nothing
    is saved, since the state may be in the middle of a step.

    Not thread-safe: it belongs to the thread that trains. Saves block, for now, until they are durable.

    Args:
        path: the directory of the run; made when it is missing. One process at a time writes a run.
        state: names to everything that the training is made of, as for :func:`holdfast.save`. Random-number
            generators, step and epoch are saved without being named.
        save: when to save; every ten minutes by default.
        keep: what to keep; the last three checkpoints by default.
        resume: ``"latest"``, ``"never"``, ``"best:<metric>"``, a step, or the path of a checkpoint or run to start
            from. A path counts only as long as this run has no checkpoint of its own.

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
    ) -> None:
        _check_policies(save, keep)
        self.run = Run(path)
        self.resumed_from: Checkpoint | None = None
        self.report: RestoreReport | None = None
        self._state = state
        self._save_policy = save
        self._keep_policy = keep
        self._resume = resume
        self._writer: Writer | None = None
        self._run_id = ""
        self._step = 0
        self._epoch = 0
        self._steps_in_epoch = 0
        self._metrics: dict[str, Any] = {}
        self._unsaved = False
        self._saved_at_s = 0.0
        self._last: Checkpoint | None = None
        self._looked_for_forgotten = False
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
        self._writer = BlockingWriter(self.run, self._retain)
        self._saved_at_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        writer = self._in_block()
        try:
            if kind is None:
                if self._unsaved:
                    self._submit("end of training")
                writer.drain()
                writer.check()
            else:
                self._finish_after_error(writer)
        finally:
            self._writer = None
            self.run.store.release()
        return False

    def _finish_after_error(self, writer: Writer) -> None:
        """Finish what is under way without hiding the exception that is leaving the block."""
        try:
            writer.drain()
            writer.check()
        except Exception:
            _logger.exception("a save under way failed while an exception was leaving the block")

    # --------------------------------------------------------------------------------------------------- the loop

    def step(self) -> SaveHandle | None:
        """Tell that one optimizer step is done. Saves, and then blocks, when the save policy says so.

        Returns:
            The save, if one was due.

        Raises:
            StorageError: a save failed. Earlier checkpoints are intact, and training may go on.
        """
        writer = self._in_block()
        self._step += 1
        self._steps_in_epoch += 1
        self._metrics = {}
        self._unsaved = True
        writer.check()
        return self._save_if_due("step")

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> SaveHandle | None:
        """Tell that an epoch is done. Call it last in the epoch, after the scheduler's step.

        Args:
            metrics: what was measured of the state as it is now; they belong to this step and are saved with it.

        Returns:
            The save, if one was due.

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
        writer.check()
        handle = self._save_if_due("epoch")
        if handle is None and encoded:
            self._keep_metrics()
        return handle

    def save(self, metrics: Mapping[str, float] | None = None, *, reason: str = "asked for") -> SaveHandle:
        """Save now, whatever the policy says.

        Args:
            metrics: what was measured of the state as it is now.
            reason: why, in words, for whoever lists the run.
        """
        self._in_block().check()
        self._metrics = {**self._metrics, **encode_metrics(metrics)}
        return self._submit(reason)

    # ----------------------------------------------------------------------------------------------------- saving

    def _save_if_due(self, event: Literal["step", "epoch"]) -> SaveHandle | None:
        since_save_s = time.monotonic() - self._saved_at_s
        reason = self._save_policy.due(Moment(event, self._step, self._epoch, since_save_s))
        return None if reason is None else self._submit(reason)

    def _submit(self, reason: str) -> SaveHandle:
        writer = self._in_block()
        self._name_forgotten()
        start_s = time.monotonic()
        captured = capture(self._state)
        captured[LOOP_ENTRY] = CapturedEntry({"steps_in_epoch": self._steps_in_epoch}, {}, {})
        parent = None if self.resumed_from is None else self.resumed_from.checkpoint_id
        about = About(self._step, self._epoch, self._metrics, reason, self._run_id, parent)
        handle = writer.submit(captured, about)
        writer.check()
        self._unsaved = False
        self._saved_at_s = time.monotonic()
        checkpoint = self._last = handle.result()
        _logger.info(
            "saved %s: step %d, epoch %d, %.1f MB in %.2f s (%s)",
            checkpoint.path,
            checkpoint.step,
            checkpoint.epoch,
            checkpoint.nbytes / 1e6,
            self._saved_at_s - start_s,
            reason,
        )
        return handle

    def _keep_metrics(self) -> None:
        """Record metrics for which no save was due, where a checkpoint of the very same step can take them."""
        if self._last is not None and self._last.step == self._step:
            self._last = self.run.add_metrics(self._last, self._metrics)
            self._retain(self._last)
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

    # -------------------------------------------------------------------------------------------------- resuming

    def _continue(self) -> None:
        resumed = resume_run(self.run, self._state, self._resume, self._keep_policy)
        self._run_id = resumed.run_id or secrets.token_hex(16)
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
        return self._writer


def _check_policies(save: object, keep: object) -> None:
    if not callable(getattr(save, "due", None)):
        raise UsageError(f"save=: expected a save policy such as Every(epochs=1), found {save!r}.", key="save")
    if not callable(getattr(keep, "keep", None)):
        raise UsageError(f"keep=: expected a retention policy such as KeepLast(3), found {keep!r}.", key="keep")
