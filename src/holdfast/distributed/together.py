"""Several processes that are one training: what each has to do at a call of its loop, they decide together."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from holdfast.checkpoint import Checkpoint
from holdfast.company import Asked, Begin, Call, Due, Failed, Open, Verdict, take
from holdfast.distributed.committing import open_elsewhere
from holdfast.distributed.group import Group, again
from holdfast.distributed.messages import Failure, rank_error
from holdfast.distributed.reading_once import ReadOnce
from holdfast.distributed.replicas import reordering
from holdfast.distributed.rhythm import Rhythm
from holdfast.distributed.saving import SharedSaves
from holdfast.errors import CorruptCheckpointError, RankError, RanksDifferError
from holdfast.preemption import Preempted
from holdfast.run import Run
from holdfast.state.leaves import Fill, fill

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger("holdfast")


class _Said(msgspec.Struct, frozen=True):
    """What a process says of a call."""

    event: str
    step: int
    epoch: int
    failed: Failure | None = None
    ranks: tuple[int, ...] = ()
    number: int = 0
    lost: bool = False
    asked: tuple[str, float | None, bool] | None = None
    metrics: Any = None


class _Told(msgspec.Struct, frozen=True):
    """What all do."""

    failures: tuple[Failure, ...] = ()
    ranks: tuple[int, ...] = ()
    number: int = 0
    lost: bool = False
    asked: tuple[str, float | None, bool] | None = None
    reason: str | None = None
    skipped: bool = False
    calm: int = 0


class Together:
    """The processes of a training, as :class:`holdfast.company.Company` has it.

    Not at every call of ``step()`` do they meet, for that takes a fraction of a millisecond: steps that are short pass
    without, unless a policy that counts them may want a save.

    Args:
        group: the processes.
        members: by rank in the group, the rank that meshes know a process by.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        group: Group,
        members: Sequence[int],
        process_group: ProcessGroup | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process_group = process_group
        self._group = group
        self._members = members
        self._clock = clock
        self._rhythm = Rhythm(clock)
        self._told_of_metrics = False

    @property
    def rank(self) -> int:
        """See :class:`holdfast.company.Company`."""
        return self._group.rank

    @property
    def size(self) -> int:
        """See :class:`holdfast.company.Company`."""
        return self._group.size

    # -------------------------------------------------------------------------------------------- begin and end

    def enter(self, run: Run, arguments: Mapping[str, Any]) -> None:
        """See :class:`holdfast.company.Company`."""

        def decide(said: Sequence[Any]) -> None:
            _refuse_different_arguments(said)
            take(run)

        self._group.agree("taking the run", arguments, decide)

    def exit(self, run: Run, error: BaseException | None) -> None:
        """See :class:`holdfast.company.Company`."""
        try:
            if error is None or isinstance(error, Preempted):
                self._group.part()
            else:  # even what all should know of: one that goes on must not wait for this one
                self._group.leave(error)
        except RankError as gone:
            _logger.debug("%s", gone)
        finally:
            run.store.release()

    def resumed(self, run: Run, state: Mapping[str, Any]) -> None:
        """See :class:`holdfast.company.Company`."""
        names = reordering(state) if self.rank == 0 else []
        if names:
            _logger.warning(
                "%s: DistributedDataParallel adds the gradients of more than two ranks in another order in the first "
                "step of a process (%s): the last bits will not be those of a training without an interruption. "
                "DistributedDataParallel(..., find_unused_parameters=True) keeps one order. See docs/distributed.md.",
                run.path,
                ", ".join(names),
            )

    # ------------------------------------------------------------------------------------------------ decisions

    def decided(self, what: str, decide: Callable[[], Any]) -> Any:
        """See :class:`holdfast.company.Company`."""
        return self._group.agree(what, None, lambda said: decide())

    def candidates(self, find: Callable[[], Iterator[Checkpoint]]) -> Iterator[Open]:
        """See :class:`holdfast.company.Company`."""
        found: Iterator[Checkpoint] | None = None
        here: list[Checkpoint] = []

        def choose() -> dict[str, str] | None:
            nonlocal found
            found = find() if found is None else found
            here[:] = [chosen] if (chosen := next(found, None)) is not None else []
            return {"path": chosen.path, "id": chosen.checkpoint_id} if chosen is not None else None

        while (chosen := self.decided("choosing a checkpoint to continue from", choose)) is not None:
            if here:
                yield lambda: here[0]
            else:
                yield functools.partial(open_elsewhere, chosen["path"], chosen["id"], self._group.timeout_s / 2)

    @property
    def fill(self) -> Fill:
        """See :class:`holdfast.company.Company`."""
        if self._process_group is None:
            return fill
        return ReadOnce(self._process_group, self._members, self.rank, self.all_succeed)

    @contextmanager
    def all_succeed(self, what: str, alike: str = "") -> Iterator[None]:
        """See :class:`holdfast.company.Company`; ``alike`` is what all have to say alike."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - all raise it
            failure = error
        damaged = isinstance(failure, CorruptCheckpointError)
        told = self._group.agree(
            what,
            [alike, str(failure) if damaged else None],
            lambda said: _damage_told(what, said),
            failure=None if damaged else failure,
        )
        if failure is not None:
            raise failure
        if told is not None:
            raise CorruptCheckpointError(told)

    def saves(self, run: Run, state: Mapping[str, Any], last: Checkpoint | None, *, share_unchanged: bool) -> Begin:
        """See :class:`holdfast.company.Company`."""
        return SharedSaves(
            self._group, self._members, run.store, state, last=last, share_unchanged=share_unchanged
        ).begin

    # ------------------------------------------------------------------------------------------------- meetings

    def meet(self, call: Call, due: Callable[[], Due]) -> Verdict:
        """See :class:`holdfast.company.Company`."""
        if not self._rhythm.is_time(counted=call.event in ("step", "batch")):
            return Verdict()
        failed, asked = call.failed, call.asked
        said = _Said(
            call.event,
            call.step,
            call.epoch,
            None if failed is None else Failure.of(self.rank, failed.error),
            () if failed is None else getattr(failed.error, "ranks", ()),
            0 if failed is None else failed.number,
            failed is not None and failed.lost,
            None if asked is None else (asked.reason, asked.left_s, asked.interrupt),
            call.metrics,
        )
        begin_s = self._clock()
        answer = self._group.agree("a call of the training loop", said, lambda all_said: self._judge(all_said, due))
        told = msgspec.convert(msgspec.to_builtins(answer), _Told)
        self._rhythm.met(self._clock() - begin_s, told.calm)
        if told.failures:
            return Verdict(failed=self._failed(told, failed))
        if told.asked is not None:
            return Verdict(asked=Asked(*told.asked))
        return Verdict(due=Due(told.reason, told.skipped))

    def _judge(self, all_said: Sequence[Any], due: Callable[[], Due]) -> _Told:
        """For the coordinator: what all do."""
        heard = [msgspec.convert(said, _Said) for said in all_said]
        self._refuse_confusion(heard)
        failing = next((said for said in heard if said.failed is not None), None)
        if failing is not None:
            same = [said for said in heard if said.failed is not None and said.number == failing.number]
            failures = tuple(said.failed for said in same if said.failed is not None)
            return _Told(failures, failing.ranks, failing.number, any(said.lost for said in same))
        asking = [(rank, said.asked) for rank, said in enumerate(heard) if said.asked is not None]
        if asking and heard[0].event != "save":
            return _Told(asked=_asked_by_all(asking))
        if heard[0].event == "epoch":
            self._compare_metrics(heard)
        found = due()
        return _Told(reason=found.reason, skipped=found.skipped, calm=min(found.calm, self._rhythm.calm()))

    def _refuse_confusion(self, heard: Sequence[_Said]) -> None:
        def where(said: _Said) -> tuple[str, int, int]:
            return said.event, said.step, said.epoch

        differing = [rank for rank, said in enumerate(heard) if where(said) != where(heard[0])]
        if differing:
            (event, step, epoch), (other, at, of) = where(heard[0]), where(heard[differing[0]])
            raise RanksDifferError(
                f"rank 0 called {_CALLS[event]} at step {step}, epoch {epoch}, and rank {differing[0]} {_CALLS[other]} "
                f"at step {at}, epoch {of}. Every process has to make the same calls; where their data differ in "
                "length, stop all at the shortest (drop_last=True).",
                ranks=differing,
            )

    def _failed(self, told: _Told, own: Failed | None) -> Failed:
        """What all raise: the one error that every process has learned, or one that names who could not do what."""
        if own is not None and own.number == told.number and isinstance(own.error, RankError):
            return own
        first = told.failures[0]
        if first.kind in ("RankError", "RankTimeoutError"):
            return Failed(told.number, again(first, told.ranks), True, told.lost)
        error = rank_error("a process failed in the background", told.failures)
        if own is not None:
            error.__cause__ = own.error
        return Failed(told.number, error, True, told.lost)

    def _compare_metrics(self, heard: Sequence[_Said]) -> None:
        differing = [rank for rank, said in enumerate(heard) if said.metrics != heard[0].metrics]
        if differing and not self._told_of_metrics:
            self._told_of_metrics = True
            _logger.warning(
                "the metrics differ: rank 0 has %s, rank %d has %s. Those of rank 0 are recorded; reduce them over the "
                "processes (torch.distributed.all_reduce) before end_epoch().",
                heard[0].metrics,
                differing[0],
                heard[differing[0]].metrics,
            )


def _refuse_different_arguments(said: Sequence[Mapping[str, Any]]) -> None:
    """RanksDifferError where processes were given different arguments that have to be the same."""
    for name, first in said[0].items():
        differing = [rank for rank, other in enumerate(said) if other.get(name) != first]
        if differing:
            raise RanksDifferError(
                f"{name}=: rank 0 has {first!r}, rank {differing[0]} has {said[differing[0]].get(name)!r}. Every "
                "process has to construct the Checkpointer with the same arguments.",
                ranks=differing,
                key=name,
            )


def _damage_told(what: str, said: Sequence[tuple[str, str | None]]) -> str | None:
    differing = [rank for rank, (alike, _) in enumerate(said) if alike != said[0][0]]
    if differing:
        raise RanksDifferError(f"{what}: rank 0 and rank {differing[0]} have other tensors.", ranks=differing)
    return next((damage for _, damage in said if damage is not None), None)


_CALLS = {
    "step": "step()",
    "batch": "step(accumulating=True)",
    "epoch": "end_epoch()",
    "save": "save()",
    "evaluation": "leave_if_preempted()",
    "end": "the end of its block",
}


def _asked_by_all(asking: Sequence[tuple[int, tuple[str, float | None, bool]]]) -> tuple[str, float | None, bool]:
    """What several were asked: the first reason, the least time; by hand only if nobody was asked otherwise."""
    serious = [(rank, asked) for rank, asked in asking if not asked[2]] or list(asking)
    rank, (reason, _, interrupt) = serious[0]
    return f"{reason} on rank {rank}", min((s for _, (_, s, _) in asking if s is not None), default=None), interrupt
