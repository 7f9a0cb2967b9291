"""What a save costs a training, by a clock that the test turns."""

from __future__ import annotations

import pytest

from holdfast.pace import Pace


class Loop:
    """A training whose clock goes as it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.pace = Pace(lambda: self.now_s)
        self.pace.go()

    def step(self, seconds: float, *, busy: bool = False, whole_step: bool = True) -> bool:
        """One step that takes so long."""
        self.now_s += seconds
        measured = self.pace.stop(busy=busy, whole_step=whole_step)
        self.pace.go()
        return measured

    def save(self, stall_s: float) -> None:
        """A save for which the training stands still."""
        self.pace.stop(busy=False, whole_step=False)
        with self.pace.saving():
            self.now_s += stall_s
        self.pace.go()


def test_nothing_is_known_before_a_save() -> None:
    """Steps alone measure no save."""
    loop = Loop()

    assert [loop.step(1.0) for _ in range(3)] == [False] * 3
    assert loop.pace.cost_s is None


def test_a_save_costs_the_time_that_the_training_stands_still() -> None:
    """Where the steps beside it take no longer, that is all."""
    loop = Loop()
    loop.step(1.0)
    loop.save(0.25)

    assert [loop.step(1.0, busy=True), loop.step(1.0)] == [False, True]
    assert loop.pace.cost_s == 0.25


def test_a_save_costs_what_the_steps_beside_it_take_longer() -> None:
    """Compared with the median of those beside none; the step in which it ends counts as beside it."""
    loop = Loop()
    for seconds in (1.0, 1.0, 9.0):
        loop.step(seconds)
    loop.save(0.5)
    for seconds, busy in ((1.5, True), (1.25, True), (1.25, False)):
        loop.step(seconds, busy=busy)

    assert loop.pace.cost_s == 0.5 + 0.5 + 0.25 + 0.25


def test_a_save_that_blocks_costs_its_whole_time() -> None:
    """It has ended when the training goes on."""
    loop = Loop()
    loop.save(2.0)

    assert loop.step(1.0) is True
    assert loop.pace.cost_s == 2.0


def test_an_evaluation_is_not_the_cost_of_a_save() -> None:
    """What lies between is no whole step; and within a step, no more than three times the usual counts."""
    loop = Loop()
    loop.step(1.0)
    loop.save(0.5)
    loop.step(60.0, busy=True, whole_step=False)
    loop.step(60.0)

    assert loop.pace.cost_s == 0.5 + 3.0


def test_steps_that_happen_to_be_fast_do_not_make_a_save_cheap() -> None:
    """A save never costs less than the training stood still for it."""
    loop = Loop()
    loop.step(1.0)
    loop.save(0.5)
    loop.step(0.25)

    assert loop.pace.cost_s == 0.5


def test_the_first_save_counts_until_there_is_another() -> None:
    """It makes the memory that the others use again."""
    loop = Loop()
    seen = []
    for stall_s in (30.0, 1.0, 3.0):
        loop.save(stall_s)
        loop.step(1.0)
        seen.append(loop.pace.cost_s)

    assert seen == [30.0, 1.0, 2.0]


def test_the_cost_follows_the_training() -> None:
    """The mean counts, so that a budget holds where few saves are dear; after ten nothing is left of those before."""
    loop = Loop()
    for stall_s in (1.0, 1.0, 1.0, *[4.0] * 10):
        loop.save(stall_s)
        loop.step(1.0)

    assert loop.pace.cost_s == 4.0


def test_time_since_the_last_save() -> None:
    """From when the training went on after it; from the beginning when there was none."""
    loop = Loop()
    loop.step(7.0)
    assert loop.pace.since_save_s == 7.0
    loop.save(2.0)
    loop.step(3.0)
    assert loop.pace.since_save_s == 3.0


def test_a_save_that_cannot_begin_is_not_measured() -> None:
    """What the user did wrong is raised, and leaves no cost behind."""
    loop = Loop()

    with pytest.raises(ZeroDivisionError), loop.pace.saving():
        1 / 0  # noqa: B018
    loop.step(1.0)

    assert loop.pace.cost_s is None
