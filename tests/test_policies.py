"""When to save and what to keep, as tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from holdfast import Every, KeepBest, KeepEvery, KeepLast
from holdfast.errors import UsageError
from holdfast.policies import Moment, daly_s, ranking_metrics, spacing_s

NAN = float("nan")
INF = float("inf")


# ------------------------------------------------------------------------------------------------------- when to save


class Never:
    """A user's own save policy."""

    def due(self, moment: Moment) -> str | None:
        """Never."""
        return None


class AtStepSeven:
    """A user's own save policy."""

    def due(self, moment: Moment) -> str | None:
        """Why."""
        return "seven" if moment.step == 7 else None


S, E, B = "step", "epoch", "batch"
SAVES = [
    # policy, (event, step, epoch, seconds since the last save), reason
    (Every(steps=5), (S, 5, 0, 0.0), "every 5 steps"),
    (Every(steps=5), (S, 10, 3, 0.0), "every 5 steps"),
    (Every(steps=5), (S, 4, 0, 9e9), None),
    (Every(steps=5), (E, 5, 1, 0.0), None),  # the step itself was asked already
    (Every(steps=1), (S, 3, 0, 0.0), "every step"),
    (Every(epochs=1), (E, 7, 1, 0.0), "every epoch"),
    (Every(epochs=1), (S, 7, 1, 0.0), None),
    (Every(epochs=3), (E, 7, 2, 0.0), None),
    (Every(epochs=3), (E, 7, 3, 0.0), "every 3 epochs"),
    (Every(epochs=3), (E, 7, 6, 0.0), "every 3 epochs"),
    (Every(minutes=10), (S, 1, 0, 599.9), None),
    (Every(minutes=10), (S, 1, 0, 600.0), "every 10 minutes"),
    (Every(minutes=10), (E, 1, 1, 4000.0), "every 10 minutes"),
    (Every(minutes=0.5), (S, 1, 0, 30.0), "every 0.5 minutes"),
    (Every(minutes=1), (S, 1, 0, 60.0), "every minute"),
    (Every(steps=5) | Every(epochs=1), (S, 5, 0, 0.0), "every 5 steps"),
    (Every(steps=5) | Every(epochs=1), (E, 6, 1, 0.0), "every epoch"),
    (Every(steps=5) | Every(epochs=1), (S, 6, 1, 0.0), None),
    (Every(steps=5) | Every(minutes=1), (S, 5, 0, 60.0), "every 5 steps, every minute"),
    (Every(steps=5) | Every(steps=3) | Every(steps=2), (S, 30, 0, 0.0), "every 5 steps, every 3 steps, every 2 steps"),
    (Never() | Every(steps=5), (S, 5, 0, 0.0), "every 5 steps"),
    (Every(steps=5) | AtStepSeven(), (S, 7, 0, 0.0), "seven"),
    (Every(steps=5), (B, 5, 0, 9e9), None),  # no step: the batch only added its gradients
    (Every(minutes=1), (B, 5, 0, 60.0), "every minute"),
    # event, step, epoch, seconds since the last save, saves, cost of one in seconds, whether one is under way
    (Every(overhead=0.02), (S, 1, 0, 0.0, 0, None), "at most 0.02 of the time: the first, to be measured"),
    (Every(overhead=0.02), (S, 9, 0, 9e9, 1, None), None),  # not measured yet
    (Every(overhead=0.02), (S, 9, 0, 49.9, 1, 1.0), None),
    (Every(overhead=0.02), (S, 9, 0, 50.0, 1, 1.0), "at most 0.02 of the time: every 50 s"),
    (Every(overhead=0.02), (E, 9, 1, 50.0, 1, 1.0), "at most 0.02 of the time: every 50 s"),
    (Every(overhead=0.02), (B, 9, 0, 50.0, 1, 1.0), "at most 0.02 of the time: every 50 s"),
    (Every(overhead=0.02), (S, 9, 0, 9e9, 2, 1.0, True), None),  # the one under way is not measured yet
    (Every(overhead=0.5), (S, 9, 0, 0.2, 1, 0.1), "at most 0.5 of the time: every 0.2 s"),
    # Daly: sqrt(2 * 1 * 36000) is 268 s, of which the higher order takes 0.7 s
    (Every(overhead=0.02, mtbf_hours=10), (S, 9, 0, 267.0, 1, 1.0), None),
    (Every(overhead=0.02, mtbf_hours=10), (S, 9, 0, 268.0, 1, 1.0), "at most 0.02 of the time: every 268 s"),
    # of which the budget allows only one in 1000 s
    (Every(overhead=0.001, mtbf_hours=10), (S, 9, 0, 999.0, 1, 1.0), None),
    (Every(overhead=0.001, mtbf_hours=10), (S, 9, 0, 1000.0, 1, 1.0), "at most 0.001 of the time: every 1e+03 s"),
    (Every(overhead=0.5) | Every(steps=5), (S, 5, 0, 0.0, 1, 9.0), "every 5 steps"),
]


@pytest.mark.parametrize(("policy", "moment", "expected"), SAVES)
def test_when_a_save_is_due(policy: Any, moment: tuple[Any, ...], expected: str | None) -> None:
    """The reason of every policy that is due, or None."""
    assert policy.due(Moment(*moment)) == expected


@pytest.mark.parametrize(
    ("policy", "cost_s", "expected"),
    [
        (Every(overhead=0.02), 1.0, 50.0),
        (Every(steps=5), 1.0, None),
        (Every(steps=5) | Every(overhead=0.02) | Every(overhead=0.1), 1.0, 10.0),
        (Every(steps=5) | Every(epochs=1), 1.0, None),
        (AtStepSeven(), 1.0, None),
    ],
)
def test_how_far_apart_saves_are_at_a_cost(policy: Any, cost_s: float, expected: float | None) -> None:
    """The shortest of those that go by the cost; a user's own policy need not know of it."""
    assert spacing_s(policy, cost_s) == expected


def test_the_optimum_loses_least_time() -> None:
    """Daly's estimate is where the expected loss, by his own model of a whole run, is least."""
    cost_s, mtbf_s = 10.0, 3600.0

    def lost(spacing: float) -> float:
        # Expected time per second of work with failures that come at random: equation 20, without restart.
        return mtbf_s * (math.exp((spacing + cost_s) / mtbf_s) - 1) / spacing

    best = min(range(50, 1000), key=lost)

    assert daly_s(cost_s, mtbf_s) == pytest.approx(best, rel=0.01)


def test_the_optimum_when_a_save_takes_longer_than_machines_live() -> None:
    """Beyond the range of the estimate, the mean time between failures."""
    assert daly_s(cost_s=100.0, mtbf_s=40.0) == 40.0


# -------------------------------------------------------------------------------------------------------- what to keep


@dataclass(frozen=True)
class Saved:
    """As much of a checkpoint as a policy looks at."""

    step: int
    epoch: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.step)


def losses(*values: Any) -> list[Saved]:
    """Checkpoints of steps 1, 2, ... with these losses; None for one that was not measured."""
    return [Saved(step, step, {} if v is None else {"loss": v}) for step, v in enumerate(values, 1)]


def epochs(*values: int) -> list[Saved]:
    """Checkpoints of steps 1, 2, ... in these epochs."""
    return [Saved(step, epoch) for step, epoch in enumerate(values, 1)]


class Even:
    """A user's own retention policy."""

    def keep(self, checkpoints: Sequence[Any]) -> Mapping[str, str]:
        """Those of even steps."""
        return {checkpoint.name: "even" for checkpoint in checkpoints if checkpoint.step % 2 == 0}


LOW, HIGH = KeepBest("loss", "min"), KeepBest("loss", "max")
KEEPS = [
    # policy, checkpoints (oldest first), the steps that stay
    (KeepLast(2), losses(1, 2, 3), "2 3"),
    (KeepLast(5), losses(1, 2, 3), "1 2 3"),
    (KeepLast(1), [], ""),
    (LOW, losses(3, 1, 2), "2"),
    (HIGH, losses(1, 3, 2), "2"),
    (LOW, losses(1, 1, 1), "1"),  # of equals the earliest
    (HIGH, losses(1, 1, 1), "1"),
    (LOW, losses(NAN, 5, NAN), "2"),
    (HIGH, losses(NAN, 5, NAN), "2"),
    (LOW, losses(NAN, NAN), ""),
    (LOW, losses(INF, 5), "2"),
    (HIGH, losses(-INF, 5), "2"),
    (LOW, losses(-INF, 5), "1"),
    (LOW, losses(None, 5, None), "2"),  # saved between evaluations: no candidate
    (LOW, losses(None, None), ""),
    (LOW, losses("0", 5), "2"),  # text is no number
    (LOW, losses(True, 5), "2"),
    (LOW, losses(0, -0.0), "1"),
    (KeepBest("loss", "min", n=2), losses(4, 2, 3, 2), "2 4"),
    (KeepBest("loss", "min", n=2), losses(4, 3, 3, 3), "2 3"),
    (KeepBest("loss", "max", n=9), losses(4, NAN), "1"),
    (KeepBest("other", "min"), losses(4, 2), ""),
    (KeepEvery(steps=2), losses(1, 1, 1, 1, 1), "2 4"),
    (KeepEvery(steps=10), losses(1, 1), ""),
    (KeepEvery(epochs=2), epochs(0, 1, 1, 2, 2, 3, 4), "4 7"),  # the first that was saved after the epoch ended
    (KeepEvery(epochs=1), epochs(0, 0, 1), "3"),  # before the end of the first there is none
    (KeepLast(1) | LOW, losses(1, 2, 3), "1 3"),
    (KeepLast(1) | LOW | KeepEvery(steps=2), losses(1, 2, 3, 4, 5), "1 2 4 5"),
    (Even() | KeepLast(1), losses(1, 2, 3), "2 3"),
    (KeepLast(1) | Even(), losses(1, 2, 3), "2 3"),
]


@pytest.mark.parametrize(("policy", "checkpoints", "expected"), KEEPS)
def test_what_stays(policy: Any, checkpoints: list[Any], expected: str) -> None:
    """The checkpoints that a policy keeps."""
    assert sorted(policy.keep(checkpoints), key=int) == expected.split()


def test_why_it_stays() -> None:
    """A checkpoint that several policies keep has all their reasons."""
    policy = KeepLast(2) | LOW | KeepEvery(steps=3) | KeepEvery(epochs=3)
    assert policy.keep(losses(2, 1, 0)) == {"2": "last 2", "3": "last 2, best loss, every 3 steps, every 3 epochs"}


def test_what_metrics_are_needed() -> None:
    """A composition needs what its parts need; a user's policy may say what it needs."""

    class Mine(Even):
        metrics = ("f1",)

    assert ranking_metrics(KeepLast(3)) == ()
    assert ranking_metrics(KeepLast(3) | KeepBest("a", "min") | KeepBest("b", "max") | Mine()) == ("a", "b", "f1")


# ----------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize(
    "policy",
    [Every(steps=1), KeepLast(1), KeepBest("a", "min"), KeepEvery(steps=1), Every(steps=1) | Every(epochs=1)],
)
def test_frozen_and_equal_by_value(policy: Any) -> None:
    """Policies are values."""
    attribute = dataclasses.fields(policy)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, attribute, 5)
    assert policy == dataclasses.replace(policy)
    assert hash(policy) == hash(dataclasses.replace(policy))


def test_composition_is_flat() -> None:
    """However it was written, a composition is one row of policies."""
    a, b, c, d = Every(steps=1), Every(steps=2), Every(steps=3), Every(steps=4)
    assert (a | b) | (c | d) == a | (b | c) | d
    w, x, y, z = KeepLast(1), KeepLast(2), KeepLast(3), KeepLast(4)
    assert (w | x) | (y | z) == w | (x | y) | z


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Every(steps=5), "Every(steps=5)"),
        (Every(overhead=0.02, mtbf_hours=24), "Every(overhead=0.02, mtbf_hours=24)"),
        (Every(steps=5) | Every(minutes=0.5), "Every(steps=5) | Every(minutes=0.5)"),
        (KeepEvery(epochs=2), "KeepEvery(epochs=2)"),
        (KeepLast(3) | KeepBest("loss", "min"), "KeepLast(n=3) | KeepBest(metric='loss', mode='min', n=1)"),
    ],
)
def test_policies_are_told_as_they_are_written(policy: Any, text: str) -> None:
    """In messages: what was not given is not shown."""
    assert repr(policy) == str(policy) == text


WRONG = [
    (Every, "exactly one of steps="),
    (lambda: Every(steps=1, epochs=1), "exactly one of steps="),
    (lambda: Every(steps=0), "Every(steps=): expected a positive whole number, found 0"),
    (lambda: Every(steps=1.5), "Every(steps=)"),  # type: ignore[arg-type]
    (lambda: Every(steps=True), "Every(steps=)"),
    (lambda: Every(minutes=-1), "Every(minutes=): expected a positive number, found -1"),
    (lambda: Every(minutes=NAN), "Every(minutes=)"),
    (lambda: Every(minutes=INF), "Every(minutes=)"),
    (lambda: Every(overhead=1), "Every(overhead=): expected a share between 0 and 1"),
    (lambda: Every(overhead=0), "Every(overhead=): expected a positive number"),
    (lambda: Every(overhead=0.1, minutes=1), "exactly one of steps="),
    (lambda: Every(mtbf_hours=3), "exactly one of steps="),
    (lambda: Every(minutes=1, mtbf_hours=3), "it belongs to overhead="),
    (lambda: Every(overhead=0.1, mtbf_hours=0), "Every(mtbf_hours=): expected a positive number"),
    (lambda: KeepLast(0), "KeepLast(n)"),
    (lambda: KeepLast("3"), "KeepLast(n)"),  # type: ignore[arg-type]
    (lambda: KeepBest("loss", "lowest"), "KeepBest('loss', mode): expected 'min' or 'max', found 'lowest'"),
    (lambda: KeepBest("", "min"), "KeepBest(metric)"),
    (lambda: KeepBest("loss", "min", n=0), "KeepBest(n=)"),
    (KeepEvery, "KeepEvery: expected exactly one"),
    (lambda: KeepEvery(steps=1, epochs=2), "KeepEvery: expected exactly one"),
    (lambda: KeepEvery(epochs=0), "KeepEvery(epochs=)"),
    (lambda: Every(steps=1) | KeepLast(1), "a save policy has a method due(moment); found KeepLast(n=1)"),
    (lambda: KeepLast(1) | Every(steps=1), "a retention policy has a method keep(checkpoints); found Every("),
    (lambda: KeepLast(1) | 3, "found 3"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_policies(make: Any, message: str) -> None:
    """What cannot mean anything is refused where it is written."""
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)
