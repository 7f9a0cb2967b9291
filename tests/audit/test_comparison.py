"""Two runs beside each other."""

from __future__ import annotations

from holdfast.audit.comparison import ABSENT, compare
from holdfast.audit.digests import plain_leaf
from holdfast.audit.records import Leaf, Outcome, Point


def leaf(value: object) -> Leaf:
    """A value, recorded."""
    return plain_leaf(value, "int", str(value))


def point(at: str, step: int, *, loss: int | None = None, generator: int = 0, **state: int) -> Point:
    """What was recorded at one moment."""
    losses = {} if loss is None else {"loss": leaf(loss)}
    values = {name: leaf(value) for name, value in state.items()}
    return Point(at, step, losses, values, {"generator": leaf(generator)})  # type: ignore[arg-type]


WHOLE = Outcome(points=[point("begun", 0), point("built", 0, a=0), *(point("step", n, loss=n, a=n) for n in (1, 2, 3))])


def test_equal_runs() -> None:
    """Nothing differs over the moments that both have."""
    assert compare(WHOLE, WHOLE) is None
    assert compare(WHOLE, Outcome(points=WHOLE.points[:3])) is None


def test_the_loss_comes_first_then_the_state_then_generators() -> None:
    """In the order in which a step computes them, and at the first moment that differs."""
    other = Outcome(points=[*WHOLE.points[:3], point("step", 2, loss=5, a=6, generator=7), point("step", 3, loss=9)])
    divergence = compare(WHOLE, other)

    assert divergence is not None
    assert divergence.moment == "step 2"
    assert [(item.name, item.expected.shown, item.found.shown) for item in divergence.differences] == [
        ("loss", "2", "5"),
        ("a", "2", "6"),
        ("generator", "0", "7"),
    ]


def test_what_was_restored_is_compared_with_the_state_after_that_step() -> None:
    """Its loss is nobody's business, nor what was there before it was restored."""
    same = Outcome(points=[point("built", 0, a=8), point("restored", 2, a=2), point("step", 3, loss=3, a=3)])
    other = Outcome(points=[point("built", 0, a=0), point("restored", 2, a=0), point("step", 3, loss=3, a=3)])

    assert compare(WHOLE, same) is None
    divergence = compare(WHOLE, other)
    assert divergence is not None
    assert (divergence.at, divergence.moment) == ("restored", "after the restore, before step 3")


def test_a_value_that_only_one_run_has() -> None:
    """It differs from nothing at all, on either side."""
    divergence = compare(Outcome(points=[point("built", 0, a=1)]), Outcome(points=[point("built", 0, b=1)]))

    assert divergence is not None
    assert [(item.name, item.expected is ABSENT, item.found is ABSENT) for item in divergence.differences] == [
        ("a", False, True),
        ("b", True, False),
    ]


def test_what_a_process_begins_with_is_not_compared() -> None:
    """Generators without a seed differ between processes; what counts is what a training makes of them."""
    other = Outcome(points=[point("begun", 0, generator=5), *WHOLE.points[1:]])

    assert compare(WHOLE, other) is None
