"""Two runs beside each other, moment by moment and bit by bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.audit.records import Leaf, Outcome, Point

ABSENT = Leaf("", "not there", "not there", 0)


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that two runs do not share.

    Attributes:
        name: its path, such as ``optimizer.state.model.weight.exp_avg``, or the name of a generator.
        expected: in the uninterrupted run.
        found: in the other one.
    """

    name: str
    expected: Leaf
    found: Leaf


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first moment at which two runs differ.

    Attributes:
        at: ``built``, ``restored`` or ``step``.
        step: steps done by then.
        moment: the same in words.
        differences: everything that differs then, in the order in which a step computes it.
    """

    at: str
    step: int
    moment: str
    differences: tuple[Difference, ...]

    @property
    def first(self) -> Difference:
        """What differs first."""
        return self.differences[0]


def compare(expected: Outcome, found: Outcome) -> Divergence | None:
    """The first divergence of ``found`` from ``expected``, over the moments that both recorded; None without any.

    What a second half restored is compared with what the other run had after the same step.
    """
    for point, other in pairs(expected, found):
        differences = _differences(point, other)
        if differences:
            return Divergence(other.at, other.step, other.name, tuple(differences))
    return None


def pairs(expected: Outcome, found: Outcome) -> Iterable[tuple[Point, Point]]:
    """The moments that both recorded."""
    resumed = any(point.at == "restored" for point in found.points)
    for other in found.points:
        if other.at == "begun" or (resumed and other.at == "built"):
            continue  # what was built is overwritten by the restore
        at = "step" if other.at == "restored" else other.at
        point = expected.point(at, other.step)
        if point is not None:
            yield point, other


def _differences(expected: Point, found: Point) -> list[Difference]:
    wanted, given = expected.leaves(), found.leaves()
    if found.at == "restored":  # no step was done since, so there is no loss
        wanted = {**expected.state, **expected.generators}
    names = [*wanted, *(name for name in given if name not in wanted)]
    pairs = ((name, wanted.get(name, ABSENT), given.get(name, ABSENT)) for name in names)
    return [Difference(name, one, other) for name, one, other in pairs if one.digest != other.digest]
