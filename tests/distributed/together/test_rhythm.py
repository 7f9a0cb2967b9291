"""How many calls pass between two meetings: all count alike, and meetings cost little."""

from __future__ import annotations

import pytest

from holdfast.distributed.rhythm import Rhythm


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """Stands still unless moved."""
    return Clock()


def steps_until_meeting(rhythm: Rhythm, clock: Clock, step_s: float) -> int:
    """How many steps pass until one at which they meet."""
    for number in range(1, 100_000):
        clock.now_s += step_s
        if rhythm.is_time(counted=True):
            return number
    raise AssertionError("they never meet again")


def test_the_first_call_is_a_meeting(clock: Clock) -> None:
    """Nobody knows yet how long steps take."""
    rhythm = Rhythm(clock)
    assert rhythm.is_time(counted=True)
    assert rhythm.calm() == 0


@pytest.mark.parametrize("calm", [0, 1, 7])
def test_as_many_calls_pass_as_was_told(clock: Clock, calm: int) -> None:
    """The one after them is a meeting again."""
    rhythm = Rhythm(clock)
    rhythm.is_time(counted=True)
    rhythm.met(0.001, calm)
    assert [rhythm.is_time(counted=True) for _ in range(calm + 1)] == [False] * calm + [True]


def test_what_is_not_counted_is_never_missed(clock: Clock) -> None:
    """The end of an epoch is a meeting for all, however many calls were to pass; then the count begins anew."""
    rhythm = Rhythm(clock)
    rhythm.is_time(counted=True)
    rhythm.met(0.001, 50)
    assert not rhythm.is_time(counted=True)
    assert rhythm.is_time(counted=False)
    rhythm.met(0.001, 1)
    assert [rhythm.is_time(counted=True) for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("step_s", "cost_s", "calm"),
    [(0.125, 0.0025, 2), (1.0, 0.0025, 0), (0.0625, 0.02, 8), (0.0625, 5.0, 8), (0.001953125, 0.0025, 128)],
)
def test_how_many_may_pass(clock: Clock, step_s: float, cost_s: float, calm: int) -> None:
    """Meetings take a hundredth of the time, and there are half a second between them at most."""
    rhythm = Rhythm(clock)
    rhythm.is_time(counted=True)
    rhythm.met(cost_s, 0)
    steps_until_meeting(rhythm, clock, step_s)
    assert rhythm.calm() == calm


def test_waiting_for_another_is_no_cost(clock: Clock) -> None:
    """The shortest meeting counts."""
    rhythm = Rhythm(clock)
    for took_s in (3.0, 0.0025, 60.0):
        clock.now_s += 0.125
        rhythm.is_time(counted=True)
        rhythm.met(took_s, 0)
    steps_until_meeting(rhythm, clock, 0.125)
    assert rhythm.calm() == 2


def test_a_call_right_after_a_step_does_not_silence_them(clock: Clock) -> None:
    """``end_epoch()`` or ``save()`` comes at once after a step: that is not how long a step takes."""
    rhythm = Rhythm(clock)
    clock.now_s += 0.5
    rhythm.is_time(counted=True)
    rhythm.met(0.01, 0)
    clock.now_s += 0.5
    rhythm.is_time(counted=True)
    rhythm.met(0.01, rhythm.calm())
    clock.now_s += 1e-5
    rhythm.is_time(counted=False)
    calm = rhythm.calm()
    assert calm <= 1
    rhythm.met(0.01, calm)
    assert steps_until_meeting(rhythm, clock, 0.5) <= 2


def test_accumulated_batches_are_quick(clock: Clock) -> None:
    """Of calls between two meetings the slowest counts, wherever the last one fell."""
    rhythm = Rhythm(clock)
    rhythm.is_time(counted=True)
    rhythm.met(1.0, 3)
    for step_s in (0.25, 0.001, 0.001, 0.001):
        clock.now_s += step_s
        met = rhythm.is_time(counted=True)
    assert met
    assert rhythm.calm() == 2
