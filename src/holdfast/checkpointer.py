"""The training loop's side: counts steps and epochs, resumes on entry, saves when a policy says so."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from holdfast.checkpoint import Checkpoint
from holdfast.company import Alone, Call, Company, Due, Verdict
from holdfast.config import ConfigChange
from holdfast.distributed.joining import company_of
from holdfast.errors import HoldfastError, UsageError
from holdfast.keeping import Keeper
from holdfast.pace import Pace
from holdfast.part import About
from holdfast.policies import Every, KeepLast, Moment, SavePolicy, calm_steps, spacing_s
from holdfast.preemption import Preemption
from holdfast.preemption.leaving import PreemptionWatch, Saver
from holdfast.resume import PerRankPolicy, Resume, Source, resume_run
from holdfast.run import Retention, Run
from holdfast.saving import encode_metrics
from holdfast.state.guard import StepGuard
from holdfast.state.kinds import estimated_nbytes
from holdfast.state.report import RestoreReport
from holdfast.state.unchanged import Unchanged
from holdfast.training import Training
from holdfast.writer import SaveHandle, Writer, Writing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Event = Literal["step", "epoch", "batch"]

_logger = logging.getLogger("holdfast")
_OTHERS_MAY_BE_GONE_S = 30.0
_NEWS = 0.25  # a distance between saves that changed by less is not worth a line


class Checkpointer:
    """Saves a training as it goes and resumes it where it stopped. Use it in a ``with`` block.

    On entry the newest intact checkpoint of the run is restored into ``state``, in place; broken ones are passed over
    with a warning. On leaving the block normally, what is not saved yet is saved. When an exception leaves it nothing
    is saved, since the state may be in the middle of a step.

    Saves run in the background: a call copies the state and returns; a thread writes the copy. One save is under way at
    a time. When it fails, the next ``step()``, ``end_epoch()`` or ``save()``, or the end of the block, raises what went
    wrong. The copy takes as much memory as the state; where there is not that much, it says so once, and saves block.

    Under a process group of ``torch.distributed`` every process makes one, with its own live objects, and makes the
    same calls; together they write one run. See docs/distributed.md.

    Not thread-safe: it belongs to the thread that trains. A forked process, such as a loader's worker, cannot save.

    Args:
        path: the directory of the run; made when it is missing. One training at a time writes a run.
        state: names to everything that the training is made of, as for :func:`holdfast.save`. Random-number
            generators, step and epoch are saved without being named.
        save: when to save; every ten minutes by default.
        keep: what to keep; the last three checkpoints by default.
        resume: ``"latest"``, ``"never"``, ``"best:<metric>"``, a step, or the path of a checkpoint or run to start
            from. A path counts only as long as this run has no checkpoint of its own. A :class:`holdfast.Resume` says
            more: what shall be otherwise from there on, or what part to start from.
        config: anything that JSON can say, recorded with each checkpoint. On resuming, what changed in it since is
            logged, and listed in ``config_changes``.
        preemption: what asks the training to leave, and how it leaves: by default SIGTERM, SIGUSR1, SIGUSR2 and SIGINT
            have the next step save and raise :class:`holdfast.Preempted`. None listens to nothing. See
            docs/preemption.md.
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
        group: the processes that train together: ``"world"`` for all of the default process group, if there is one; a
            process group; or None for this process alone.
        timeout_s: how long to wait for a process of the group that does not answer.
        per_rank: what becomes of what each process kept for itself (generators, places in the data) where another
            number of processes goes on: ``"error"``, ``"reassign"`` or ``"reseed"``, see :func:`holdfast.restore`.
        read_once: on resuming, what all processes hold whole is read by one of them, each something else, and sent to
            the others through the group: for file systems that are slower than the network. By default each reads.

    Raises (on entry):
        RunBusyError: another process writes this run.
        StateMismatchError: the checkpoint does not fit ``state``; nothing was touched.
        CorruptCheckpointError: there are checkpoints and not one is intact.
        CheckpointNotFoundError: the checkpoint asked for does not exist.
        CheckpointExistsError: ``resume="never"`` in a run that has checkpoints.
        FormatVersionError: the newest checkpoint was written by a newer Holdfast.
        StorageError: the directory cannot be made or read.
        RankError, RankTimeoutError: a process of the group failed, or did not come.

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
        resume: Resume | Source = "latest",
        config: Any = None,
        background: bool = True,
        overlap: bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        share_unchanged: bool = True,
        drain_s: float = 600.0,
        preemption: Preemption | None = Preemption(),  # noqa: B008 - frozen
        group: ProcessGroup | Literal["world"] | None = "world",
        timeout_s: float = 600.0,
        per_rank: PerRankPolicy = "error",
        read_once: bool = False,
    ) -> None:
        _check_policies(save, keep)
        self.run = Run(path)
        self.resumed_from: Checkpoint | None = None
        self.report: RestoreReport | None = None
        self.skipped = 0
        self._training = Training(state, config, self.run.path)
        self._save_policy = save
        self._keeper = Keeper(self.run, keep)
        self._resume = resume if isinstance(resume, Resume) else Resume(resume)
        self._writing = Writing(background, overlap, when_busy, share_unchanged, drain_s)
        self._preemption = PreemptionWatch(preemption, self.run)
        self._group = group
        self._timeout_s = timeout_s
        self._per_rank = per_rank
        self._read_once = read_once
        self._company: Company = Alone()
        self._writer: Writer | None = None
        self._pid = 0
        self._run_id = ""
        self._resumed_own = False
        self._pace = Pace()
        self._metrics: dict[str, Any] = {}
        self._unsaved = False
        self._saves = 0
        self._last: SaveHandle | None = None
        self._warmed_up = False
        self._told_spacing_s = 0.0

    # ------------------------------------------------------------------------------------------------- where it is

    @property
    def epoch(self) -> int:
        """Epochs done, which is the number of the epoch to go on with: ``range(ckpt.epoch, epochs)``."""
        return self._training.progress.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done, over all processes that this run was continued by."""
        return self._training.progress.step

    @property
    def accumulated(self) -> int:
        """Batches whose gradients wait for the next optimizer step, as told by ``step(accumulating=True)``."""
        return self._training.progress.accumulated

    @property
    def config_changes(self) -> tuple[ConfigChange, ...]:
        """What is not as it was in the configuration that the checkpoint recorded which was resumed from."""
        return self._training.config_changes

    @property
    def preempted(self) -> bool:
        """Whether the training was asked to leave, which it does at the next ``step()`` or ``end_epoch()``.

        Of several processes each says only what it knows by itself: what is to be the same on all must not hang on it.
        """
        return self._preemption.requested

    # ------------------------------------------------------------------------------------------------- the block

    def __enter__(self) -> Checkpointer:
        if self._writer is not None:
            raise UsageError("this Checkpointer is in use already; make another one for another block.")
        self._company = company_of(self._group, self._timeout_s, read_once=self._read_once)
        self._unsaved, self._saves, self._last, self._metrics = False, 0, None, {}
        try:
            self._company.enter(self.run, self._alike())
            self._continue()
            self._writer = self._new_writer()
            self._preemption.begin(self.resumed_from)  # last: nothing that fails after it would undo it
        except BaseException as error:
            self._writer = None
            self._company.exit(self.run, error)
            raise
        if self.resumed_from is not None:
            self._warm_up(self._writer)
        self._pid = os.getpid()
        self._pace = Pace()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        if self._pid != os.getpid():
            return False  # a forked child on its way out: the run is its parent's
        writer = self._in_block()
        with ExitStack() as leaving:
            leaving.push(lambda kind, failure, traceback: self._company.exit(self.run, failure or error))
            leaving.callback(self._let_go, writer, error)
            if kind is None:
                self._finish(writer)
            elif not self._preemption.left:
                if self._company.size > 1:
                    self._preemption.end(error)  # a signal shall end this process while it waits
                self._finish_after_error(writer)
        return False

    def _finish(self, writer: Writer) -> None:
        """Save what is not saved yet, and wait until all is durable."""
        if self._unsaved:
            self._submit("end of training")
        with self._company.all_succeed("waiting for the last save"):
            writer.drain(self._writing.drain_s)
        self._meet("end")

    def _let_go(self, writer: Writer, error: BaseException | None) -> None:
        self._preemption.end(error)
        writer.close()
        self._writer = None

    def _finish_after_error(self, writer: Writer) -> None:
        """Finish what is under way without hiding the exception that is leaving the block.

        Of several processes others may be gone, and what starts them all again may be waiting for this one.
        """
        try:
            several = self._company.size > 1
            writer.drain(min(self._writing.drain_s, _OTHERS_MAY_BE_GONE_S) if several else self._writing.drain_s)
            writer.check()
        except Exception:
            _logger.exception("a save under way failed while an exception was leaving the block")

    # --------------------------------------------------------------------------------------------------- the loop

    def step(self, *, accumulating: bool = False) -> SaveHandle | None:
        """Tell that one optimizer step is done. Begins a save when the save policy says so.

        Args:
            accumulating: the optimizer made no step: the batch added its gradients to those that wait for the next one.
                ``global_step`` stays, and a save that falls in between holds the gradients too.

        Returns:
            The save, if one was begun.

        Raises:
            StorageError: a save failed, this one or the one before. Earlier checkpoints are intact, and training may
                go on.
        """
        with self._standing_still(whole_step=True):
            self._training.count(accumulating=accumulating)
            self._metrics = {}
            self._unsaved = True
            self._warm_up(self._in_block())
            return self._save_or_leave("batch" if accumulating else "step")

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
        with self._standing_still():
            self._keeper.check(metrics or {})
            encoded = encode_metrics(metrics)
            self._training.count_epoch()
            self._metrics = encoded
            self._unsaved = True
            handle = self._save_or_leave("epoch")
            if handle is None and encoded:
                self._keep_metrics()
            return handle

    def save(self, metrics: Mapping[str, float] | None = None, *, reason: str = "asked for") -> SaveHandle:
        """Begin a save now, whatever the policy says; waits for the one under way to end first.

        ``save().result()`` waits until it is durable. It belongs right after ``step()`` or ``end_epoch()``: between a
        batch and its ``step()`` the position in the data is already behind that batch.

        Args:
            metrics: what was measured of the state as it is now.
            reason: why, in words, for whoever lists the run.
        """
        with self._standing_still():
            self._meet("save")
            self._training.warn_of_batch_in_hand()
            self._metrics = {**self._metrics, **encode_metrics(metrics)}
            return self._submit(reason)

    def leave_if_preempted(self) -> None:
        """Save and leave now if the training was asked to, without waiting for the next step: for long evaluations.

        What is saved is the state as it is now, with the random-number generators of the last ``step()``, so that the
        resumed training evaluates anew from there. Call it only where an evaluation has changed nothing else. (The
        generators are remembered at the last batch of a loader that knows its position, and at every step once this
        was called in a process; else they are saved as they are.)

        Raises:
            Preempted: it was.
        """
        self._in_block()
        with self._training.evaluating():
            self._leave_if_asked(self._meet("evaluation"))

    def request_preemption(self, reason: str) -> None:
        """Ask the training to leave at its next step, as a signal does. Safe to call from any thread.

        Args:
            reason: who or what asks, in words.
        """
        self._preemption.request(reason)

    @contextmanager
    def _standing_still(self, *, whole_step: bool = False) -> Iterator[None]:
        """The training called, and waits until it may go on."""
        writer = self._in_block()
        if self._pace.stop(busy=writer.busy(), whole_step=whole_step):
            self._tell_spacing()
        try:
            yield
        finally:
            self._pace.go()

    # ----------------------------------------------------------------------------------------------------- saving

    def _meet(self, event: Event | Literal["save", "evaluation", "end"]) -> Verdict:
        """What is to be done at this call. Raises what failed since the last one."""
        writer = self._in_block()
        if self._company.rank == 0:
            self._preemption.measure(self._last)
        asked = None if event in ("save", "end") else self._preemption.asked()
        call = Call(event, self.global_step, self.epoch, writer.failure, asked, self._metrics)
        verdict = self._company.meet(call, lambda: self._due(event))
        if verdict.failed is not None:
            writer.told(verdict.failed.number)
            self._unsaved = self._unsaved or (verdict.failed.lost and verdict.failed.number == writer.number)
            raise verdict.failed.error
        return verdict

    def _due(self, event: str) -> Due:
        """Whether the policy wants a save."""
        if event not in ("step", "epoch", "batch"):
            return Due()
        writer = self._in_block()
        moment = Moment(
            event,  # type: ignore[arg-type]  # one of these three
            self.global_step,
            self.epoch,
            self._pace.since_save_s,
            saves=self._saves,
            cost_s=self._pace.cost_s,
            busy=writer.busy(),
        )
        reason = self._save_policy.due(moment)
        calm = calm_steps(self._save_policy, self.global_step)
        if reason is not None and self._writing.when_busy == "skip" and writer.busy():
            return Due(skipped=True, calm=calm)
        return Due(reason, calm=calm)

    def _save_or_leave(self, event: Event) -> SaveHandle | None:
        """The policy's save, unless the training was asked to leave: before it, or while it began."""
        verdict = self._meet(event)
        self._leave_if_asked(verdict)
        if verdict.due.skipped:
            self.skipped += 1
            _logger.info(
                "%s: no save at step %d, since one is under way (%d skipped so far)",
                self.run.path,
                self.global_step,
                self.skipped,
            )
        if verdict.due.reason is None:
            return None
        handle = self._submit(verdict.due.reason)
        if self._company.size == 1:  # several hear of it when they meet again
            self._leave_if_asked(Verdict(asked=self._preemption.asked()))
        return handle

    def _leave_if_asked(self, verdict: Verdict) -> None:
        if verdict.asked is not None:
            self._preemption.adopt(verdict.asked)
            self._preemption.leave(self._saver(self._in_block()))

    def _saver(self, writer: Writer) -> Saver:
        return Saver(
            saved=lambda: None if self._unsaved else self._last or self.resumed_from,
            save=self._submit,
            drain=lambda seconds: self._drain_together(writer, seconds),
            check=lambda: self._check(writer, drained=True),
            patience_s=self._writing.drain_s,
            background=self._writing.background or self._company.size > 1,
            leads=self._company.rank == 0,
        )

    def _drain_together(self, writer: Writer, timeout_s: float) -> None:
        with self._company.all_succeed("waiting for the save under way"):
            writer.drain(timeout_s)
        self._count_lost()

    def _submit(self, reason: str) -> SaveHandle:
        writer = self._in_block()
        self._training.warn_of_forgotten()
        parent = None if self.resumed_from is None else self.resumed_from.checkpoint_id
        about = About(self.global_step, self.epoch, self._metrics, reason, self._run_id, parent)
        with self._pace.saving():
            self._last = handle = writer.save(self._training.capture, about)
        self._saves += 1
        self._unsaved = False
        self._check(writer)
        return handle

    def _check(self, writer: Writer, *, drained: bool = False) -> None:
        """Raise what went wrong since the last look; when it was the last save, there is something to save again.

        Of several processes one may know already what the others learn when they meet: then nothing is raised here, and
        no save follows that the others would not make. Unless all have ``drained``: then each knows how it went.
        """
        try:
            writer.check(known=self._company.size > 1 and not drained)
        except BaseException:
            self._count_lost()
            raise

    def _count_lost(self) -> None:
        """When the last save failed, there is something to save again."""
        self._unsaved = self._unsaved or (self._last is not None and self._last.failed())

    def _keep_metrics(self) -> None:
        """Give metrics for which no save was due to the checkpoint of this step, if there is one."""
        if self._company.rank != 0:
            return
        writer = self._in_block()
        try:
            if self._last is not None and self._last.step == self.global_step:
                writer.drain()
                self._check(writer)
            self._keeper.add_metrics(self._last, self.global_step, self.epoch, self._metrics)
        except HoldfastError as error:
            if self._company.size == 1:
                raise
            writer.note(error)

    def _tell_spacing(self) -> None:
        """Say how far apart saves are, where that follows from what they cost, and it changed."""
        if self._company.rank != 0:
            return
        cost_s = self._pace.cost_s
        spacing = None if cost_s is None else spacing_s(self._save_policy, cost_s)
        if spacing is None or abs(spacing - self._told_spacing_s) <= _NEWS * self._told_spacing_s:
            return
        self._told_spacing_s = spacing
        _logger.info(
            "%s: a save takes %.3g s from the training; from now on one every %.3g s (%s)",
            self.run.path,
            cost_s,
            spacing,
            self._save_policy,
        )

    def _warm_up(self, writer: Writer) -> None:
        """Once, when the optimizers have their state, have the memory made that the first save will need."""
        if not self._warmed_up:
            self._warmed_up = True
            writer.warm_up(estimated_nbytes(self._training.state))

    def _alike(self) -> dict[str, Any]:
        """The arguments that all processes must have been given alike."""
        only = self._resume.only
        return {
            "background": self._writing.background,
            "per_rank": self._per_rank,
            "only": None if only is None else list(only),
            "override": [str(path) for path in self._resume.override],
        }

    def _new_writer(self) -> Writer:
        own = self.resumed_from if self._resumed_own else None
        share = self._writing.share_unchanged
        return Writer(
            self.run,
            self._keeper.retain,
            begin=self._company.saves(self.run, self._training.state, own, share_unchanged=share),
            unchanged=Unchanged(own) if share else None,
            background=self._writing.background,
            guard=StepGuard(self._training.state) if self._writing.overlap else None,
        )

    # -------------------------------------------------------------------------------------------------- resuming

    def _continue(self) -> None:
        resumed = resume_run(
            self.run, self._training.state, self._resume, self._keeper.policy, self._company, self._per_rank
        )
        self._run_id = self._company.decided("naming the run", lambda: resumed.run_id or secrets.token_hex(16))
        self._resumed_own = resumed.run_id is not None
        self.resumed_from = resumed.checkpoint
        self.report = resumed.report
        self._training.begin(resumed.progress, resumed.checkpoint)

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
