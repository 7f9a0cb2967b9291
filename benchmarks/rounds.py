"""Rounds: in each, everybody is measured once, in turning order, so that a slow minute of the disk hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.measures import Measure

Figures = dict[Measure, float]
"""What one turn measured: seconds, bytes or a ratio."""

Samples = dict[str, dict[str, list[float]]]
"""The name of a measure, then who, to one figure a round."""


def interleave(turns: Mapping[str, Callable[[], Figures]], rounds: int, tell: Callable[[str], None]) -> Samples:
    """Give everybody one turn in each round; each round begins one further on.

    Args:
        turns: who, to what measures them once.
        rounds: how many.
        tell: is told who is being measured.
    """
    samples: Samples = {}
    names = list(turns)
    for number in range(rounds):
        turn = number % max(len(names), 1)
        for name in [*names[turn:], *names[:turn]]:
            tell(f"round {number + 1} of {rounds}: {name}")
            record(samples, name, turns[name]())
    return samples


def record(samples: Samples, name: str, figures: Figures) -> None:
    """Add what one turn measured."""
    for measure, figure in figures.items():
        samples.setdefault(measure.name, {}).setdefault(name, []).append(figure)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
