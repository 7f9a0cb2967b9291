"""What Holdfast itself spends on the plan when the structure of the state did not change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import holdfast
from benchmarks import measures
from benchmarks.files import remove
from benchmarks.rounds import Figures, Samples, interleave

COUNTS = {"full": (500, 20_000), "small": (50, 500)}


def planning_rounds(scale: str, directory: Path, rounds: int, tell: Callable[[str], None]) -> Samples:
    """Measure each number of tensors in each round."""
    turns: dict[str, Callable[[], Figures]] = {
        f"holdfast, {count:,} tensors": partial(measure_plan, count, directory / "planning") for count in COUNTS[scale]
    }
    return interleave(turns, rounds, tell)


def measure_plan(count: int, directory: Path) -> Figures:
    """A first save, which makes the plan, and a second one, of other values, which tells its costs."""
    tensors = {f"tensor_{index:05d}": torch.zeros(8) for index in range(count)}
    try:
        with holdfast.Checkpointer(directory, {"tensors": tensors}, save=holdfast.Every(steps=10**9)) as checkpointer:
            checkpointer.save().result()
            for tensor in tensors.values():
                tensor.add_(1)
            checkpointer.step()
            return {measures.PLAN: checkpointer.save().report().plan_s}
    finally:
        remove(directory)
