"""A loop that several processes run: whatever happens to one of them, none goes its own way and none waits in vain."""

from __future__ import annotations

import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast import Checkpoint, Checkpointer
from holdfast.company import Alone
from holdfast.distributed.group import Group
from holdfast.distributed.share import SharedSave
from holdfast.errors import (
    HoldfastError,
    RankError,
    RanksDifferError,
    RankTimeoutError,
    StorageError,
    UnsupportedValueError,
)
from holdfast.keeping import Keeper
from holdfast.part import Part
from holdfast.policies import Every, KeepBest, KeepLast, Moment
from holdfast.preemption import Preempted
from holdfast.preemption.leaving import PreemptionWatch
from holdfast.storage.local_pending import LocalPending

Make = Callable[..., Any]
Loop = Callable[[Checkpointer, int], Any]


class Never:
    """A policy that wants no save."""

    def due(self, moment: Moment) -> str | None:
        """See :class:`holdfast.SavePolicy`."""
        return None


class Once:
    """A policy that wants the first step saved."""

    def due(self, moment: Moment) -> str | None:
        """See :class:`holdfast.SavePolicy`."""
        return "first" if moment.step == 1 and moment.event == "step" else None


@pytest.fixture
def train(ranks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a loop as each of some ranks, each with a Checkpointer of its own; returns what came of it by rank."""
    here = threading.local()
    monkeypatch.setattr("holdfast.checkpointer.company_of", lambda group, timeout_s, *, read_once: here.company)

    def run(
        loop: Loop,
        size: int = 3,
        timeout_s: float = 20.0,
        state: Callable[[int], Any] = lambda rank: {"w": torch.ones(4)},
        arguments: Callable[[int], dict[str, Any]] = lambda rank: {},
        make: Callable[[int], Checkpointer] | None = None,
        **all_alike: Any,
    ) -> list[Any]:
        some = ranks(size, timeout_s=timeout_s)

        def new(rank: int) -> Checkpointer:
            options = {"save": Never(), "preemption": None, **all_alike, **arguments(rank)}
            return Checkpointer(tmp_path / "run", state(rank), **options)

        def work(group: Group) -> Any:
            here.company = some.company(group.rank)
            with (make or new)(group.rank) as ckpt:
                return loop(ckpt, group.rank)

        return list(some.run(work))

    return run


@pytest.fixture
def names(tmp_path: Path) -> Callable[[], list[str]]:
    """The checkpoints that there are, every byte of them verified."""

    def look() -> list[str]:
        run = holdfast.Run(tmp_path / "run")
        for checkpoint in run:
            checkpoint.verify()
        return [str(name) for name in run.names()]

    return look


@pytest.fixture
def failing_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Has the disk of one rank fail at one step."""

    def fail(rank: int, number: int) -> None:
        original = LocalPending.write_files
        writes: list[int] = []

        def write(pending: LocalPending, images: Any) -> Any:
            if any(name.startswith(f"_ranks-{rank + 1:05d}") for name in images):
                writes.append(1)
                if len(writes) == number:
                    with holdfast.errors.storage_errors("cannot write", "there"):
                        raise OSError(errno.EIO, "Input/output error")
            return original(pending, images)

        monkeypatch.setattr(LocalPending, "write_files", write)

    return fail


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has one rank find no room for a copy of the state."""

    def none_on(rank: int) -> None:
        original = SharedSave.stage

        def stage(save: SharedSave, arena: Any, late: Any = ()) -> Any:
            if save._group.rank == rank:
                raise MemoryError("no room")
            return original(save, arena, late)

        monkeypatch.setattr(SharedSave, "stage", stage)

    return none_on


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Threads that write end with their test."""
    yield
    for thread in threading.enumerate():
        if thread.name == "holdfast-writer":
            thread.join(30)


def steps(number: int) -> Loop:
    """A loop of so many steps."""

    def loop(ckpt: Checkpointer, rank: int) -> int:
        for _ in range(number):
            ckpt.step()
        return ckpt.global_step

    return loop


# -------------------------------------------------------------------------------------------------------- all is well


def test_an_ordinary_training(train: Make, names: Make) -> None:
    """Saved when due and at the end, and continued by all."""
    assert train(steps(5), save=Every(steps=2)) == [5] * 3
    assert names() == ["step-000000000002", "step-000000000004", "step-000000000005"]
    assert train(steps(1), save=Every(steps=2)) == [6] * 3


@pytest.mark.parametrize(
    "options", [{"background": False}, {"overlap": True}, {"when_busy": "skip"}, {"share_unchanged": False}], ids=str
)
def test_ways_to_save(train: Make, names: Make, options: dict[str, Any]) -> None:
    """Whichever it is, nobody waits for another."""
    assert train(steps(3), save=Every(steps=3), **options) == [3] * 3
    assert names() == ["step-000000000003"]


def test_ways_that_may_differ(train: Make, names: Make) -> None:
    """How a process copies its part is its own business; when to save and what to keep, rank 0 says."""
    options = [{"overlap": True}, {"save": Every(steps=1), "keep": KeepLast(9)}, {"when_busy": "skip", "drain_s": 9.0}]
    assert train(steps(3), arguments=options.__getitem__) == [3] * 3
    assert names() == ["step-000000000003"]


def test_two_blocks(train: Make, names: Make) -> None:
    """One after the other in the same processes."""
    for last in (2, 4, 6):
        assert train(steps(2)) == [last] * 3
    assert names()[-1] == "step-000000000006"


def test_the_same_object_in_another_block(train: Make) -> None:
    """What one block left unsaved on some ranks is no matter to the next one, which begins with the checkpoint."""
    kept: dict[int, Checkpointer] = {}

    def first(ckpt: Checkpointer, rank: int) -> None:
        kept[rank] = ckpt
        ckpt.step()
        ckpt.save()
        ckpt._in_block().writer.drain()
        ckpt._training.count(accumulating=False)
        ckpt._in_block().unsaved = rank != 1
        raise KeyError("over")

    assert [type(result) for result in train(first)] == [KeyError] * 3
    assert train(lambda ckpt, rank: ckpt.global_step, make=kept.__getitem__) == [1] * 3


# ------------------------------------------------------------------------------------------------- failures in a save


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails(train: Make, names: Make, failing_writes: Make, failing: int, background: bool) -> None:
    """All raise it, and all go on; the state is saved at the end."""
    failing_writes(failing, 1)

    def loop(ckpt: Checkpointer, rank: int) -> list[str]:
        raised = []
        for _ in range(4):
            try:
                ckpt.step()
            except RankError as error:
                raised.append(str(error))
            ckpt._in_block().writer.drain()
        return raised

    results = train(loop, save=Every(steps=2), background=background)
    assert [len(result) for result in results] == [1] * 3, results
    assert all(f"rank {failing}: StorageError: cannot write there" in result[0] for result in results)
    assert names() == ["step-000000000004"]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_last_save_fails(train: Make, names: Make, failing_writes: Make, failing: int) -> None:
    """All raise it at the end of the block."""
    failing_writes(failing, 1)
    results = train(steps(2), save=Every(steps=2))
    assert [type(result) for result in results] == [RankError] * 3, results
    assert names() == []


@pytest.mark.parametrize("short", [0, 1])
def test_one_without_memory(train: Make, names: Make, no_memory: Make, short: int) -> None:
    """Its saves block; the others do not notice."""
    no_memory(short)
    assert train(steps(4), save=Every(steps=2)) == [4] * 3
    assert names() == ["step-000000000002", "step-000000000004"]


@pytest.mark.parametrize("short", [0, 1])
def test_one_without_memory_knows_first(
    train: Make, names: Make, no_memory: Make, failing_writes: Make, short: int
) -> None:
    """It knows of a failure when its step returns, the others do not: at the end all raise, and none saves alone."""
    no_memory(short)
    failing_writes(2, 1)
    results = train(steps(2), save=Every(steps=2))
    assert [type(result) for result in results] == [RankError] * 3, results
    assert all("rank 2: StorageError: cannot write there" in str(result) for result in results)


def test_rank_0_knows_first(train: Make, failing_writes: Make) -> None:
    """It waits for the save that it wants to give metrics to, and sees that it failed: the others learn of it too."""
    failing_writes(2, 1)

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt.step()
        ckpt.end_epoch({"loss": 0.5})

    results = train(loop, save=Every(steps=1))
    assert [type(result) for result in results] == [RankError] * 3, results
    assert all("rank 2: StorageError: cannot write there" in str(result) for result in results)


def test_staging_that_fails(train: Make, names: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that gives up on one rank: the save fails for all, at once, and the training goes on."""
    original, fails = Part.stage, [True]

    def stage(part: Part, arena: Any, late: Any = ()) -> Any:
        if getattr(part.pending, "_joined", False) and fails:
            fails.pop()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(part, arena, late)

    monkeypatch.setattr(Part, "stage", stage)

    def loop(ckpt: Checkpointer, rank: int) -> str:
        ckpt.step()
        ckpt._in_block().writer.drain()
        with pytest.raises(RankError) as caught:
            ckpt.step()
        return str(caught.value)

    results = train(loop, size=2, timeout_s=60, save=Every(steps=1))
    assert all("rank 1: RuntimeError: CUDA error" in str(result) for result in results), results
    assert names() == ["step-000000000002"]


def test_a_state_that_one_cannot_save(train: Make, names: Make) -> None:
    """All raise it at the call."""
    results = train(
        lambda ckpt, rank: ckpt.save(), state=lambda rank: {"w": torch.ones(4), "x": object() if rank == 1 else 1}
    )
    assert all(isinstance(result, HoldfastError) for result in results), results
    assert names() == []


def test_pruning_that_fails(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 removes checkpoints; that it could not, all raise."""

    def retain(keeper: Keeper, checkpoint: Any) -> None:
        raise StorageError("cannot remove step-1")

    monkeypatch.setattr(Keeper, "retain", retain)
    results = train(steps(1))
    assert [type(result) for result in results] == [RankError] * 3
    assert all("rank 0: StorageError: cannot remove step-1" in str(result) for result in results)


def test_metrics_that_cannot_be_kept(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that go wrong after one save are both raised, by all."""
    failing = ["cannot annotate", "cannot remove"]

    def fail(keeper: Keeper, *arguments: Any) -> None:
        if failing:
            raise StorageError(failing.pop())

    monkeypatch.setattr(Keeper, "retain", fail)
    monkeypatch.setattr(Keeper, "add_metrics", fail)

    def loop(ckpt: Checkpointer, rank: int) -> list[str]:
        ckpt.step()
        raised = []
        ckpt._in_block().writer.drain()
        for again in (lambda: ckpt.end_epoch({"loss": 1.0}), lambda: ckpt.end_epoch({"loss": 1.0}), ckpt.step):
            try:
                again()
            except RankError as error:
                raised.append(str(error).rpartition(": ")[2])
        return raised

    results = train(loop, save=Every(steps=5) | Once())
    assert results == [["cannot remove", "cannot annotate"]] * 3


# --------------------------------------------------------------------------------------------------- somebody is gone


@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize("error", [ValueError("loss is nan"), KeyboardInterrupt()], ids=repr)
def test_one_that_leaves_with_an_error(train: Make, leaving: int, error: BaseException) -> None:
    """The others raise that it did, and why, without waiting their time out."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        for number in range(5):
            if rank == leaving and number == 2:
                raise error
            ckpt.step()

    results = train(loop, timeout_s=60)
    assert results[leaving] is error
    others = [result for rank, result in enumerate(results) if rank != leaving]
    assert [type(result) for result in others] == [RankError] * 2
    assert all(f"rank {leaving}: {type(error).__name__}" in str(result) for result in others)


@pytest.mark.parametrize("leaving", [0, 1])
def test_one_that_is_interrupted_at_the_end(train: Make, monkeypatch: pytest.MonkeyPatch, leaving: int) -> None:
    """While it waits for the last save: that is no good end, and the others are told."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt.step()
        ckpt._in_block().unsaved = False
        if rank == leaving:

            def interrupted(timeout_s: float | None = None) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(ckpt._in_block().writer, "drain", interrupted)

    results = train(loop, timeout_s=60)
    assert type(results[leaving]) is KeyboardInterrupt
    others = [result for rank, result in enumerate(results) if rank != leaving]
    assert [type(result) for result in others] == [RankError] * 2, results


@pytest.mark.parametrize("slow", [0, 1])
def test_one_whose_save_does_not_end(train: Make, monkeypatch: pytest.MonkeyPatch, slow: int) -> None:
    """All raise that it did not in time."""
    go_on = threading.Event()
    original = LocalPending.write_files

    def write(pending: LocalPending, images: Any) -> Any:
        if any(name.startswith(f"_ranks-{slow + 1:05d}") for name in images):
            go_on.wait(30)
        return original(pending, images)

    monkeypatch.setattr(LocalPending, "write_files", write)

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt.step()
        if rank == slow:
            block = ckpt._in_block()
            block._writing = dataclasses.replace(block._writing, drain_s=0.1)

    results = train(loop, timeout_s=3, save=Every(steps=1), drain_s=2.0)
    go_on.set()
    assert all(isinstance(result, HoldfastError) for result in results), results
    assert any("still being written" in str(result) for result in results)


def test_one_that_takes_fewer_steps(train: Make) -> None:
    """All are told where the others are."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        for _ in range(3 if rank else 2):
            ckpt.step()

    results = train(loop)
    assert [type(result) for result in results] == [RanksDifferError] * 3, results


def test_arguments_that_differ(train: Make) -> None:
    """Those that have to be the same are compared."""
    results = train(steps(1), arguments=lambda rank: {"background": rank != 1})
    assert [type(result) for result in results] == [RanksDifferError] * 3
    results = train(steps(1), arguments=lambda rank: {"resume": "never" if rank == 2 else "latest"})
    assert [type(result) for result in results] == [RanksDifferError] * 3


def test_entering_fails_on_one(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others do not wait for it at the first step."""
    original = Checkpointer._new_writer

    def new_writer(ckpt: Checkpointer, own: Checkpoint | None) -> Any:
        if ckpt._company.rank == 1:
            raise UnsupportedValueError("no such thing")
        return original(ckpt, own)

    monkeypatch.setattr(Checkpointer, "_new_writer", new_writer)
    results = train(steps(1), timeout_s=60)
    assert [type(result) for result in results] == [RankError, UnsupportedValueError, RankError]
    assert "rank 1: UnsupportedValueError: no such thing" in str(results[0])


def test_a_run_that_one_does_not_see(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and the others hear why before they give up."""
    train(steps(1), size=2)

    def elsewhere(path: str, checkpoint_id: str, timeout_s: float) -> Any:
        raise RankTimeoutError(f"rank 0 sees {path}, and this process did not")

    monkeypatch.setattr("holdfast.distributed.together.open_elsewhere", elsewhere)
    results = train(steps(1), size=2, timeout_s=60)
    assert [type(result) for result in results] == [RankError] * 2, results
    assert all("rank 1: RankTimeoutError: rank 0 sees" in str(result) for result in results)


# --------------------------------------------------------------------------------------------------------- preemption


@pytest.mark.parametrize("asked", [0, 2])
def test_one_is_asked_to_leave(train: Make, names: Make, asked: int) -> None:
    """All save once, and leave."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        for number in range(5):
            if rank == asked and number == 2:
                ckpt.request_preemption("the scheduler")
            ckpt.step()

    results = train(loop)
    assert [(type(result), result.code) for result in results] == [(Preempted, 75)] * 3
    assert len({result.checkpoint.checkpoint_id for result in results}) == 1
    assert names() == ["step-000000000003"]


def test_a_failure_on_the_way_out(
    train: Make, names: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that fails while the training waits to leave is logged, and made again by all."""
    leaving, failed = threading.Event(), threading.Event()
    wait, write = PreemptionWatch._wait, LocalPending.write_files

    def waiting(watch: PreemptionWatch, saver: Any) -> None:
        leaving.set()
        wait(watch, saver)

    def writing(pending: LocalPending, images: Any) -> Any:
        if not failed.is_set() and any(name.startswith("_ranks-00002") for name in images):
            assert leaving.wait(30)
            failed.set()
            raise StorageError("cannot write there")
        return write(pending, images)

    monkeypatch.setattr(PreemptionWatch, "_wait", waiting)
    monkeypatch.setattr(LocalPending, "write_files", writing)

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt.save()
        ckpt.request_preemption("the scheduler")
        ckpt.step(accumulating=True)

    with caplog.at_level(logging.ERROR, "holdfast"):
        results = train(loop)
    assert [type(result) for result in results] == [Preempted] * 3, results
    assert all(result.checkpoint is not None for result in results)
    assert names() == ["step-000000000000"]
    assert caplog.text.count("a save under way failed") == 3


def test_only_one_asks_slurm(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is put back into the queue once, by rank 0."""
    asked: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("holdfast.preemption.slurm.requeue", lambda: asked.append("requeue"))
    preemption = holdfast.Preemption(signals=(), requeue=True)

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt.request_preemption("the scheduler")
        ckpt.step()

    results = train(loop, preemption=preemption)
    assert [type(result) for result in results] == [Preempted] * 3
    assert asked == ["requeue"]


def test_an_interrupt_and_a_signal(train: Make, names: Make) -> None:
    """Where one was stopped by hand and another by the scheduler, all leave in one way."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        ckpt._preemption._flag.put_up("SIGINT" if rank == 0 else "SIGTERM", interrupt=rank == 0)
        ckpt.step()

    results = train(loop)
    assert [result.code for result in results] == [75] * 3


def test_metrics_choose_the_best(train: Make, names: Make) -> None:
    """Metrics of an epoch for which no save is due go to the checkpoint of its step; rank 0 writes them."""

    def loop(ckpt: Checkpointer, rank: int) -> None:
        for loss in (3.0, 1.0, 2.0):
            ckpt.step()
            ckpt.end_epoch({"loss": loss})

    assert train(loop, save=Every(steps=1), keep=KeepBest("loss", "min")) == [None] * 3
    assert "step-000000000002" in names()


def test_alone_under_the_same_hood(tmp_path: Path) -> None:
    """One process is as it was."""
    with Checkpointer(tmp_path / "run", {"w": torch.ones(4)}, preemption=None, group=None) as ckpt:
        assert isinstance(ckpt._company, Alone)
        ckpt.step()
    assert holdfast.Run(tmp_path / "run").latest().step == 1  # type: ignore[union-attr]
