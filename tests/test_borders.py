"""What a checkpoint says of where it was saved, and what the loop does that resumes from it: docs/resuming.md's table.

Each test runs one row. A process of the training below ends somewhere; the next one goes on. Together they see the
batches that one process alone would have seen, each once, and draw the same random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Checkpointer, Every, Preempted, Run
from holdfast.data import ResumableDataLoader

# The processes of these tests are one; what was alive in one that ended may still be.
pytestmark = pytest.mark.filterwarnings("ignore:a ResumableDataLoader is alive")

EPOCHS, BATCHES, SIZE = 3, 4, 2
Seen = list[tuple[int, str, Any]]
"""Epoch, what happened, and the ids of a batch or a random number."""


class DiedError(Exception):
    """The process ends here."""


class Process:
    """One process of a training: what it sees, and a place to interfere.

    Args:
        path: of the run.
        at: called at each place of the loop, by name, with the checkpointer; ``(epoch, batch)`` counts as usual.
        leave_early: the batch after which each epoch is left.
    """

    def __init__(
        self,
        path: Path,
        at: Callable[[str, tuple[int, int], Checkpointer], object] = lambda *_: None,
        *,
        leave_early: int | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.seen: Seen = []
        self.loader = ResumableDataLoader(range(BATCHES * SIZE), SIZE, shuffle=True)
        self.weight = torch.zeros(1)
        self.state = {"loader": self.loader, "weight": self.weight}
        self._options = {"save": Every(steps=10**6), **options}
        self._path = path
        self._at = at
        self._leave_early = leave_early

    def run(self) -> Seen:
        """Train to the end."""
        with Checkpointer(self._path, self.state, **self._options) as ckpt:
            self.began = (ckpt.global_step, ckpt.epoch, self.loader.epoch, self.loader.position)
            for epoch in range(ckpt.epoch, EPOCHS):
                self._epoch(epoch, ckpt)
                self.seen.append((epoch, "evaluated", torch.rand(()).item()))
                self._at("evaluated", (epoch, self.loader.position), ckpt)
                ckpt.end_epoch({"loss": 0.0})
                self._at("epoch", (epoch, self.loader.position), ckpt)
        return self.seen

    def _epoch(self, epoch: int, ckpt: Checkpointer) -> None:
        for batch in self.loader:
            where = (epoch, self.loader.position)
            self._at("batch", where, ckpt)
            self.weight += torch.rand(1)  # what dropout would draw
            self.seen.append((epoch, "trained", (batch.tolist(), self.weight.item())))
            ckpt.step()
            self._at("step", where, ckpt)
            if self._leave_early == self.loader.position:
                break


def save_and_die(place: str, where: tuple[int, int]) -> Callable[..., None]:
    """Save at one place of the loop, and end there."""

    def at(now: str, here: tuple[int, int], ckpt: Checkpointer) -> None:
        if (now, here) == (place, where):
            ckpt.save().result()
            raise DiedError

    return at


def whole(path: Path, **options: Any) -> Seen:
    """What one process sees that nobody stops."""
    return Process(path / "whole", **options).run()


def began(path: Path, **options: Any) -> tuple[int, int, int, int]:
    """Where the next process begins: global step, epoch, and the loader's epoch and position."""
    process = Process(path, **options)
    process.run()
    return process.began


def stop(process: Process, error: type[BaseException] = DiedError) -> Seen:
    """Run a process that does not come to its end; what it saw."""
    with pytest.raises(error):
        process.run()
    return process.seen


def test_in_step_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The next batch is the one that would have come."""
    seen = stop(Process(tmp_path / "run", save_and_die("step", (1, 2))))
    process = Process(tmp_path / "run")

    assert seen + process.run() == whole(tmp_path)
    assert process.began == (BATCHES + 2, 1, 1, 2)


def test_in_step_by_the_policy(tmp_path: Path) -> None:
    """What the policy saves inside ``step()`` is the same as what is saved right after it."""

    def die(place: str, where: tuple[int, int], ckpt: Checkpointer) -> None:
        if (place, where) == ("batch", (1, 3)):
            raise DiedError

    seen = stop(Process(tmp_path / "run", die, save=Every(steps=1)))
    process = Process(tmp_path / "run")

    assert seen + process.run() == whole(tmp_path)
    assert process.began == (BATCHES + 2, 1, 1, 2)


def test_in_step_at_the_last_batch(tmp_path: Path) -> None:
    """The loop gets no batch, and what comes after it is done: the epoch ends once."""
    seen = stop(Process(tmp_path / "run", save_and_die("step", (1, BATCHES))))
    process = Process(tmp_path / "run")

    assert seen + process.run() == whole(tmp_path)
    assert process.began == (2 * BATCHES, 1, 1, BATCHES)


def test_in_end_epoch(tmp_path: Path) -> None:
    """The next epoch begins."""
    seen = stop(Process(tmp_path / "run", save_and_die("epoch", (0, 0))))
    process = Process(tmp_path / "run")

    assert seen + process.run() == whole(tmp_path)
    assert process.began == (BATCHES, 1, 1, 0)


def test_in_the_end_of_an_epoch_that_was_left_early(tmp_path: Path) -> None:
    """Its other batches are not made up for: the next epoch begins."""
    seen = stop(Process(tmp_path / "run", save_and_die("epoch", (0, 0)), leave_early=3))
    process = Process(tmp_path / "run", leave_early=3)

    assert seen + process.run() == whole(tmp_path, leave_early=3)
    assert process.began == (3, 1, 1, 0)


def test_at_the_end_of_a_block_that_was_left_early(tmp_path: Path) -> None:
    """Who stops in the middle of an epoch and comes back later goes on there."""
    first = Process(tmp_path / "run")
    with Checkpointer(tmp_path / "run", first.state) as ckpt:
        for batch in first.loader:
            first.weight += torch.rand(1)
            first.seen.append((0, "trained", (batch.tolist(), first.weight.item())))
            ckpt.step()
            if ckpt.global_step == 2:
                break
    process = Process(tmp_path / "run")

    assert first.seen + process.run() == whole(tmp_path)
    assert process.began == (2, 0, 0, 2)


def test_at_the_end_of_a_block_that_came_to_its_end(tmp_path: Path) -> None:
    """There is nothing left to do."""
    Process(tmp_path / "run").run()
    process = Process(tmp_path / "run")

    assert process.run() == []
    assert process.began == (EPOCHS * BATCHES, EPOCHS, EPOCHS, 0)


def test_between_the_last_batch_and_the_end_of_its_epoch(tmp_path: Path) -> None:
    """What comes after the last batch belongs to its epoch: it is done anew, and no other batch comes before it."""
    seen = stop(Process(tmp_path / "run", save_and_die("evaluated", (1, BATCHES))))
    process = Process(tmp_path / "run")

    went_on = process.run()
    assert process.began == (2 * BATCHES, 1, 1, BATCHES)
    assert [(epoch, what) for epoch, what, _ in seen[:-1] + went_on] == [
        (epoch, what) for epoch, what, _ in whole(tmp_path)
    ]


def test_when_an_exception_leaves_the_block(tmp_path: Path) -> None:
    """Nothing is saved: the state may be in the middle of a step. The last save counts."""

    def die(place: str, where: tuple[int, int], ckpt: Checkpointer) -> None:
        if (place, where) == ("batch", (1, 2)):
            raise DiedError

    stop(Process(tmp_path / "run", die, save=Every(epochs=1)))

    assert began(tmp_path / "run") == (BATCHES, 1, 1, 0)


def test_between_a_batch_and_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The position is behind the batch, and the training is not: the call says so."""
    stop(Process(tmp_path / "run", save_and_die("batch", (0, 2))))

    assert "save() between a batch and its step()" in caplog.text
    assert began(tmp_path / "run") == (1, 0, 0, 2)


@pytest.mark.parametrize("place", [("step", (0, 2)), ("epoch", (0, 0))])
def test_right_after_a_step_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: tuple[str, tuple[int, int]]
) -> None:
    """The warning is for saves at a wrong place."""
    with caplog.at_level(logging.WARNING, "holdfast"):
        stop(Process(tmp_path / "run", save_and_die(*place)))

    assert caplog.text == ""


def test_a_loader_for_evaluations_is_no_batch_in_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that was read through since the step, and is in the state too."""
    validation = ResumableDataLoader(range(4), 2)
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        Checkpointer(tmp_path / "run", {"validation": validation}) as ckpt,
    ):
        ckpt.step()
        list(validation)
        ckpt.save()
    assert caplog.text == ""


def preempt(place: str, where: tuple[int, int], leave: bool = False) -> Callable[..., None]:
    """The machine is to be taken away, from one place of the loop on."""

    def at(now: str, here: tuple[int, int], ckpt: Checkpointer) -> None:
        if (now, here) == (place, where):
            ckpt.request_preemption("a test")
            if leave:
                ckpt.leave_if_preempted()

    return at


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (("batch", (1, 2)), (BATCHES + 2, 1, 1, 2)),
        (("batch", (1, BATCHES)), (2 * BATCHES, 1, 1, BATCHES)),
        (("evaluated", (1, BATCHES)), (2 * BATCHES, 2, 2, 0)),
    ],
    ids=["in step", "in step at the last batch", "in end_epoch"],
)
def test_preempted(tmp_path: Path, place: tuple[str, tuple[int, int]], expected: tuple[int, ...]) -> None:
    """As saves at the same places; the process leaves from there."""
    seen = stop(Process(tmp_path / "run", preempt(*place)), Preempted)
    process = Process(tmp_path / "run")

    assert seen + process.run() == whole(tmp_path)
    assert process.began == expected


def test_preempted_in_an_evaluation(tmp_path: Path) -> None:
    """The evaluation is done again, with the random numbers that it began with."""
    seen = stop(Process(tmp_path / "run", preempt("evaluated", (1, BATCHES), leave=True)), Preempted)
    process = Process(tmp_path / "run")

    assert seen[:-1] + process.run() == whole(tmp_path)
    assert Run(tmp_path / "run")[2 * BATCHES].epoch == 1
