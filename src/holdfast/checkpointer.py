"""The training loop's side: counts steps and epochs, resumes on entry, saves when a policy says so."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from holdfast.block import Block, Writing
from holdfast.checkpoint import Checkpoint
from holdfast.company import Alone, Company
from holdfast.config import ConfigChange
from holdfast.distributed.joining import company_of
from holdfast.errors import UsageError
from holdfast.handle import SaveHandle
from holdfast.keeping import Keeper
from holdfast.policies import Every, KeepLast, SavePolicy
from holdfast.preemption import Preemption
from holdfast.preemption.leaving import PreemptionWatch
from holdfast.resume import PerRankPolicy, Resume, Source, resume_run
from holdfast.run import Retention, Run
from holdfast.saving import encode_metrics
from holdfast.state.guard import StepGuard
from holdfast.state.report import RestoreReport
from holdfast.state.unchanged import Unchanged
from holdfast.training import Training
from holdfast.writer import Writer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        self._block: Block | None = None
        self._skipped = 0  # in blocks before

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

    @property
    def skipped(self) -> int:
        """Saves that were due, and not made since one was under way: see ``when_busy``."""
        return self._skipped + (self._block.skipped if self._block else 0)

    # ------------------------------------------------------------------------------------------------- the block

    def __enter__(self) -> Checkpointer:
        if self._block is not None:
            raise UsageError("this Checkpointer is in use already; make another one for another block.")
        self._company = company_of(self._group, self._timeout_s, read_once=self._read_once)
        try:
            self._company.enter(self.run, self._alike())
            block = self._continue()
            self._preemption.begin(self.resumed_from)  # last: nothing that fails after it would undo it
        except BaseException as error:
            self._company.exit(self.run, error)
            raise
        self._block = block
        if self.resumed_from is not None:
            block.warm_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        if self._block is not None and not self._block.is_of_this_process:
            return False  # a forked child on its way out: the run is its parent's
        block = self._in_block()
        with ExitStack() as leaving:
            leaving.push(lambda kind, failure, traceback: self._company.exit(self.run, failure or error))
            leaving.callback(self._let_go, block, error)
            if kind is None:
                block.finish()
            else:
                block.finish_after(error)
        return False

    def _let_go(self, block: Block, error: BaseException | None) -> None:
        block.close(error)
        self._skipped += block.skipped
        self._block = None

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
        block = self._in_block()
        with block.standing_still(whole_step=True):
            self._training.count(accumulating=accumulating)
            block.moved({})
            block.warm_up()
            return block.save_or_leave("batch" if accumulating else "step")

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
        block = self._in_block()
        with block.standing_still():
            self._keeper.check(metrics or {})
            encoded = encode_metrics(metrics)
            self._training.count_epoch()
            block.moved(encoded)
            handle = block.save_or_leave("epoch")
            if handle is None and encoded:
                block.keep_metrics()
            return handle

    def save(self, metrics: Mapping[str, float] | None = None, *, reason: str = "asked for") -> SaveHandle:
        """Begin a save now, whatever the policy says; waits for the one under way to end first.

        ``save().result()`` waits until it is durable. It belongs right after ``step()`` or ``end_epoch()``: between a
        batch and its ``step()`` the position in the data is already behind that batch.

        Args:
            metrics: what was measured of the state as it is now.
            reason: why, in words, for whoever lists the run.
        """
        block = self._in_block()
        with block.standing_still():
            block.meet("save")
            self._training.warn_of_batch_in_hand()
            block.metrics = {**block.metrics, **encode_metrics(metrics)}
            return block.submit(reason)

    def leave_if_preempted(self) -> None:
        """Save and leave now if the training was asked to, without waiting for the next step: for long evaluations.

        What is saved is the state as it is now, with the random-number generators of the last ``step()``, so that the
        resumed training evaluates anew from there. Call it only where an evaluation has changed nothing else. (The
        generators are remembered at the last batch of a loader that knows its position, and at every step once this
        was called in a process; else they are saved as they are.)

        Raises:
            Preempted: it was.
        """
        block = self._in_block()
        with self._training.evaluating():
            block.leave_if_asked(block.meet("evaluation"))

    def request_preemption(self, reason: str) -> None:
        """Ask the training to leave at its next step, as a signal does. Safe to call from any thread.

        Args:
            reason: who or what asks, in words.
        """
        self._preemption.request(reason)

    # ------------------------------------------------------------------------------------------- entering the block

    def _alike(self) -> dict[str, Any]:
        """The arguments that all processes must have been given alike."""
        only = self._resume.only
        return {
            "background": self._writing.background,
            "per_rank": self._per_rank,
            "only": None if only is None else list(only),
            "override": [str(path) for path in self._resume.override],
        }

    def _continue(self) -> Block:
        """Resume, where there is something to resume from, and get ready to save."""
        resumed = resume_run(
            self.run, self._training.state, self._resume, self._keeper.policy, self._company, self._per_rank
        )
        run_id = self._company.decided("naming the run", lambda: resumed.run_id or secrets.token_hex(16))
        self.resumed_from = resumed.checkpoint
        self.report = resumed.report
        self._training.begin(resumed.progress, resumed.checkpoint)
        if resumed.checkpoint is not None:
            self._company.resumed(self.run, self._training.state)
        return Block(
            self.run.path,
            self._training,
            self._company,
            self._new_writer(own=resumed.checkpoint if resumed.run_id is not None else None),
            self._save_policy,
            self._keeper,
            self._writing,
            self._preemption,
            run_id=run_id,
            resumed_from=resumed.checkpoint,
        )

    def _new_writer(self, own: Checkpoint | None) -> Writer:
        """A writer that may link the files of ``own``, a checkpoint of this run."""
        share = self._writing.share_unchanged
        return Writer(
            self.run,
            self._keeper.retain,
            begin=self._company.saves(self.run, self._training.state, own, share_unchanged=share),
            unchanged=Unchanged(own) if share else None,
            background=self._writing.background,
            guard=StepGuard(self._training.state) if self._writing.overlap else None,
        )

    def _in_block(self) -> Block:
        if self._block is None:
            raise UsageError("use the Checkpointer inside its block: with Checkpointer(...) as ckpt: ...")
        self._block.check_process()
        return self._block


def _check_policies(save: object, keep: object) -> None:
    if not callable(getattr(save, "due", None)):
        raise UsageError(f"save=: expected a save policy such as Every(epochs=1), found {save!r}.", key="save")
    if not callable(getattr(keep, "keep", None)):
        raise UsageError(f"keep=: expected a retention policy such as KeepLast(3), found {keep!r}.", key="keep")
