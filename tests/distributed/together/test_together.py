"""What several processes do at a call of their loop: what one of them has to say, all do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import errors
from holdfast.company import Alone, Asked, Call, Due, Failed, Verdict
from holdfast.distributed.group import Group, again
from holdfast.distributed.messages import Failure
from holdfast.distributed.together import Together
from holdfast.errors import (
    CorruptCheckpointError,
    DiskFullError,
    RankError,
    RanksDifferError,
    RankTimeoutError,
    RunBusyError,
    UsageError,
)
from holdfast.preemption import Preempted
from holdfast.run import Run

Make = Callable[..., Any]
NOTHING = Due()


def together(group: Group) -> Together:
    """The company of a group."""
    return Together(group, range(group.size))


def meet(ranks: Make, call: Callable[[int], Call], due: Due = NOTHING, size: int = 3) -> list[Any]:
    """What each of some ranks is told at one call."""
    return list(ranks(size).run(lambda group: together(group).meet(call(group.rank), lambda: due)))


# ------------------------------------------------------------------------------------------------------- what all do


def test_gradients_that_will_be_summed_in_another_order(
    ranks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 says so, with what to do."""
    monkeypatch.setattr("holdfast.distributed.together.reordering", list)
    ranks(3).run(lambda group: together(group).resumed(Run(tmp_path), {"model": 1}))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "(model): the last bits" in record.getMessage()
    assert "find_unused_parameters=True" in record.getMessage()


def test_nothing(ranks: Make) -> None:
    """There is nothing to do."""
    assert meet(ranks, lambda rank: Call("step", 1, 0)) == [Verdict()] * 3


def test_a_save_is_due(ranks: Make) -> None:
    """The policy of rank 0 is asked, and no other."""

    def due(rank: int) -> Due:
        assert rank == 0
        return Due("every step", skipped=False)

    results = ranks(3).run(
        lambda group: together(group).meet(Call("step", 1, 0), lambda: due(group.rank)),
    )
    assert results == [Verdict(due=Due("every step"))] * 3


def test_a_policy_that_fails(ranks: Make) -> None:
    """Whatever it raises: rank 0 raises it, and the others do not wait for an answer."""

    def due() -> Due:
        raise ZeroDivisionError("in a policy")

    results = ranks(3, timeout_s=60).run(lambda group: together(group).meet(Call("step", 1, 0), due))
    assert [type(result) for result in results] == [ZeroDivisionError, RankError, RankError]
    assert "rank 0: ZeroDivisionError: in a policy" in str(results[1])


def test_what_failed_on_one(ranks: Make) -> None:
    """All raise it, and rank and reason are named; before anything else is done."""
    error = DiskFullError("no space")

    def call(rank: int) -> Call:
        failed = Failed(4, error, known=False, lost=True) if rank == 2 else None
        return Call("step", 9, 0, failed, Asked("SIGTERM") if rank == 0 else None)

    verdicts = meet(ranks, call, Due("every step"))
    assert [(type(verdict.failed.error), verdict.failed.number) for verdict in verdicts] == [(RankError, 4)] * 3
    assert all("rank 2: DiskFullError: no space" in str(verdict.failed.error) for verdict in verdicts)
    assert all(verdict.failed.lost and verdict.failed.known for verdict in verdicts)
    assert verdicts[2].failed.error.__cause__ is error
    assert {(verdict.asked, verdict.due) for verdict in verdicts} == {(None, Due())}


def test_what_all_learned_by_themselves(ranks: Make) -> None:
    """A save that failed for all is one error, with the ranks that it is about."""

    def call(rank: int) -> Call:
        return Call("step", 9, 0, Failed(4, RankTimeoutError("rank 1 is slow", ranks=[1]), known=False, lost=True))

    verdicts = meet(ranks, call)
    assert [(str(verdict.failed.error), verdict.failed.error.ranks) for verdict in verdicts] == [
        ("rank 1 is slow", (1,))
    ] * 3


def test_one_learns_later_what_failed(ranks: Make) -> None:
    """It raises the same."""

    def call(rank: int) -> Call:
        error = RankTimeoutError("rank 1 is slow", ranks=[1])
        return Call("step", 9, 0, None if rank == 0 else Failed(4, error, known=False, lost=True))

    verdicts = meet(ranks, call)
    assert [
        (type(verdict.failed.error), str(verdict.failed.error), verdict.failed.error.ranks) for verdict in verdicts
    ] == [(RankTimeoutError, "rank 1 is slow", (1,))] * 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({1: Asked("SIGTERM")}, Asked("SIGTERM on rank 1")),
        ({1: Asked("SIGTERM", 30.0), 2: Asked("SIGUSR1", 12.0)}, Asked("SIGTERM on rank 1", 12.0)),
        ({0: Asked("SIGINT", None, True), 2: Asked("notice", 90.0)}, Asked("notice on rank 2", 90.0)),
        ({0: Asked("SIGINT", None, True), 2: Asked("SIGINT", None, True)}, Asked("SIGINT on rank 0", None, True)),
    ],
)
def test_who_is_asked_to_leave(ranks: Make, asked: dict[int, Asked], told: Asked) -> None:
    """All leave: in the least time that one has, and by hand only if nobody was asked otherwise."""
    verdicts = meet(ranks, lambda rank: Call("batch", 9, 0, asked=asked.get(rank)), Due("every step"))
    assert verdicts == [Verdict(asked=told)] * 3


def test_nobody_leaves_at_a_save(ranks: Make) -> None:
    """Who asks for a save gets it; the next step is time enough."""
    assert meet(ranks, lambda rank: Call("save", 9, 0, asked=Asked("SIGTERM"))) == [Verdict()] * 3


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            Call("epoch", 5, 1),
            r"rank 0 called step\(\) at step 5, epoch 0, and rank 2 end_epoch\(\) at step 5, epoch 1",
        ),
        (Call("step", 6, 0), r"and rank 2 step\(\) at step 6"),
        (Call("end", 5, 0), r"and rank 2 the end of its block"),
        (Call("batch", 5, 0), r"and rank 2 step\(accumulating=True\)"),
        (Call("save", 5, 0), r"and rank 2 save\(\)"),
        (Call("evaluation", 5, 0), r"and rank 2 leave_if_preempted\(\)"),
    ],
)
def test_confusion(ranks: Make, other: Call, told: str) -> None:
    """Calls that do not belong together are refused by all, and both are named."""
    results = meet(ranks, lambda rank: other if rank == 2 else Call("step", 5, 0))
    for result in results:
        with pytest.raises(RanksDifferError, match=told) as caught:
            raise result
        assert caught.value.ranks == (2,)


def test_metrics_that_differ(ranks: Make, caplog: pytest.LogCaptureFixture) -> None:
    """They should be reduced before: it is told once."""

    def work(group: Group) -> None:
        company = together(group)
        for epoch in (1, 2):
            company.meet(Call("epoch", 5, epoch, metrics={"loss": group.rank / 2}), Due)

    with caplog.at_level(logging.WARNING, "holdfast"):
        ranks(3).run(work)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "rank 0 has {'loss': 0.0}, rank 1 has {'loss': 0.5}" in told[0]


def test_metrics_that_do_not(ranks: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is said."""
    with caplog.at_level(logging.WARNING, "holdfast"):
        meet(ranks, lambda rank: Call("epoch", 5, 1, metrics={"loss": 0.5}))
    assert caplog.records == []


def test_calls_that_pass(ranks: Make) -> None:
    """As many as rank 0 says, on all ranks; what its policy counts is never passed."""

    class Clock:
        now_s = 0.0

        def __call__(self) -> float:
            return self.now_s

    def work(group: Group) -> list[int]:
        clock = Clock()
        company = Together(group, range(group.size), clock=clock)
        asked: list[int] = []

        def due(step: int) -> Due:
            asked.append(step)
            clock.now_s += 0.0025 if step == 1 else 1.0
            return Due(calm=9 - step % 10)

        for step in range(1, 31):
            clock.now_s += 0.0625 * (1 + group.rank)
            company.meet(Call("step", step, 0), lambda step=step: due(step))
        return asked

    assert ranks(3).run(work) == [[1, 2, 7, 10, 15, 20, 25, 30], [], []]


# ---------------------------------------------------------------------------------------------------- begin and end


def test_the_run_is_taken_once(ranks: Make, tmp_path: Path) -> None:
    """Rank 0 holds it, for all."""

    def work(group: Group) -> None:
        run = Run(tmp_path / "run")
        company = together(group)
        company.enter(run, {})
        if group.rank == 1:
            with pytest.raises(RunBusyError):
                Alone().enter(Run(tmp_path / "run"), {})
        company.exit(run, None)

    assert ranks(3).run(work) == [None] * 3
    Alone().enter(Run(tmp_path / "run"), {})


def test_the_run_is_busy(ranks: Make, tmp_path: Path) -> None:
    """All raise what rank 0 found."""
    other = Run(tmp_path / "run")
    Alone().enter(other, {})
    results = ranks(3).run(lambda group: together(group).enter(Run(tmp_path / "run"), {}))
    Alone().exit(other, None)
    assert [type(result) for result in results] == [RunBusyError] * 3


def test_arguments_that_differ(ranks: Make, tmp_path: Path) -> None:
    """Refused before anything is done, and named."""
    results = ranks(3).run(
        lambda group: together(group).enter(Run(tmp_path / "run"), {"background": group.rank != 1, "per_rank": "error"})
    )
    assert [type(result) for result in results] == [RanksDifferError] * 3
    assert "background=: rank 0 has True, rank 1 has False" in str(results[2])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("loss is nan"), RankTimeoutError("nobody came"), KeyboardInterrupt()])
def test_whoever_leaves_tells(ranks: Make, tmp_path: Path, error: BaseException) -> None:
    """Even what the others may know: one that goes on must not wait for the one that does not."""

    def work(group: Group) -> Any:
        if group.rank == 1:
            together(group).exit(Run(tmp_path / "run"), error)
            return None
        return together(group).meet(Call("step", 1, 0), Due)

    results = ranks(3, timeout_s=60).run(work)
    assert [type(results[rank]) for rank in (0, 2)] == [RankError] * 2
    assert f"rank 1: {type(error).__name__}" in str(results[0])


def test_the_first_that_left_is_told_of(ranks: Make, tmp_path: Path) -> None:
    """Others leave because of it."""

    def work(group: Group) -> Any:
        if group.rank == 1:
            together(group).exit(Run(tmp_path / "run"), ValueError("loss is nan"))
            group.agree("told", None)
            return None
        if group.rank == 0:
            group.agree("told", None)
            together(group).exit(Run(tmp_path / "run"), RankError("rank 1 has left"))
        return together(group).meet(Call("step", 1, 0), Due)

    some = ranks(2, timeout_s=60)
    some.run(work)
    assert some._store.get("left").decode().startswith('{"rank":1')


def test_an_end_without_errors_leaves_nothing(ranks: Make, tmp_path: Path) -> None:
    """No message of a block stays in the store, whether it ended or was preempted."""

    def work(group: Group) -> None:
        company = together(group)
        run = Run(tmp_path / "run")
        company.enter(run, {})
        company.meet(Call("step", 1, 0), Due)
        company.exit(run, None if group.size == 2 else Preempted(75, "SIGTERM", None))

    for size in (2, 3):
        some = ranks(size)
        assert some.run(work) == [None] * size
        assert some._store.num_keys() == 0


# ------------------------------------------------------------------------------------------------------- decisions


def test_all_succeed(ranks: Make) -> None:
    """Nothing happens."""

    def work(group: Group) -> str:
        with together(group).all_succeed("resuming"):
            pass
        return "on"

    assert ranks(3).run(work) == ["on"] * 3


def test_damage_that_one_sees(ranks: Make) -> None:
    """All take it for damaged, and try another."""

    def work(group: Group) -> None:
        with together(group).all_succeed("resuming"):
            if group.rank == 1:
                raise CorruptCheckpointError("chunk 3 differs")

    results = ranks(3).run(work)
    assert [(type(result), str(result)) for result in results] == [(CorruptCheckpointError, "chunk 3 differs")] * 3


def test_another_failure_on_one(ranks: Make) -> None:
    """All raise that rank 1 could not."""

    def work(group: Group) -> None:
        with together(group).all_succeed("resuming from step-3"):
            if group.rank == 1:
                raise UsageError("no such entry")
            if group.rank == 2:
                raise CorruptCheckpointError("chunk 3 differs")

    results = ranks(3).run(work)
    assert [type(result) for result in results] == [RankError] * 3
    assert "resuming from step-3:\n  rank 1: UsageError: no such entry" in str(results[0])


def test_candidates(ranks: Make, tmp_path: Path) -> None:
    """Rank 0 looks for them; all try the same, one after the other."""
    run = Run(tmp_path / "run")
    for step in (1, 2):
        holdfast.save(tmp_path / "run" / f"step-{step:012d}", {"x": step}, step=step)

    def work(group: Group) -> list[str]:
        return [opened().name for opened in together(group).candidates(lambda: iter([run[2], run[1]][group.rank :]))]

    assert ranks(2).run(work) == [["step-000000000002", "step-000000000001"]] * 2


def test_finding_candidates_fails(ranks: Make) -> None:
    """All raise it."""

    def find() -> Any:
        raise CorruptCheckpointError("none is intact")

    results = ranks(2).run(lambda group: list(together(group).candidates(find)))
    assert [type(result) for result in results] == [CorruptCheckpointError] * 2


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HoldfastError)],
)
def test_errors_are_the_same_on_all(kind: type[errors.HoldfastError]) -> None:
    """Each error of ours can be raised again by another process."""
    found = again(Failure.of(0, kind("what happened")), [1])
    assert (type(found), str(found)) == (kind, "what happened")


def test_a_text_that_json_cannot_hold(ranks: Make) -> None:
    """A path may be any bytes: the error that names it is told all the same."""
    failure = DiskFullError("cannot write /data/\udcff")
    results = ranks(2).run(lambda group: group.agree("saving", failure=failure if group.rank else None))
    assert [type(result) for result in results] == [RankError] * 2
    assert "/data/\\udcff" in str(results[0])


# ------------------------------------------------------------------------------------------------------------ alone


def test_alone(tmp_path: Path) -> None:
    """One process decides by itself: what failed comes first, then who asks, then the policy."""
    alone = Alone()
    failed, asked = Failed(1, ValueError(), known=True, lost=True), Asked("SIGTERM")
    due = Due("every step", calm=4)
    assert alone.meet(Call("step", 1, 0, failed, asked), lambda: due) == Verdict(failed=failed)
    assert alone.meet(Call("step", 1, 0, None, asked), lambda: due) == Verdict(asked=asked)
    assert alone.meet(Call("step", 1, 0), lambda: due) == Verdict(due=due)
    assert alone.decided("what", lambda: 3) == 3
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.saves(Run(tmp_path), {}, None, share_unchanged=True) is None
    with pytest.raises(KeyError), alone.all_succeed("what"):
        raise KeyError
