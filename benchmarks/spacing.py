"""The share of its time that a training loses under ``Every(overhead=...)``, beside the share that it was to lose."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from benchmarks import measures
from benchmarks.files import remove
from benchmarks.rounds import Figures, Samples, interleave
from benchmarks.training import Training
from holdfast import Checkpointer, Every, KeepLast

STEPS = {"full": 100, "small": 1000}
"""Of a stretch: long enough for several saves at the full scale."""


def spacing_rounds(
    training: Training, scale: str, directory: Path, rounds: int, tell: Callable[[str], None]
) -> Samples:
    """Measure each budget, in each round."""
    turns: dict[str, Callable[[], Figures]] = {
        measures.budget(share): partial(measure_share, share, training, STEPS[scale], directory / "spacing")
        for share in measures.BUDGETS
    }
    return interleave(turns, rounds, tell)


def measure_share(share: float, training: Training, steps: int, directory: Path) -> Figures:
    """Steps with saves, compared with as many before and after without.

    The policy is given half a stretch to learn what saves cost, which is not counted.
    """
    os.sync()
    try:
        before_s = _stretch(training, steps // 2, lambda: None)
        with Checkpointer(
            directory,
            {"model": training.model, "optimizer": training.optimizer},
            save=Every(overhead=share),
            keep=KeepLast(1),
            preemption=None,
        ) as ckpt:
            _stretch(training, steps // 2, ckpt.step)
            saving_s = _stretch(training, steps, ckpt.step)
            saves = len(ckpt.run.events())
        after_s = _stretch(training, steps // 2, lambda: None)
    finally:
        remove(directory)
    lost = 1 - (before_s + after_s) / saving_s
    return {measures.SHARE: lost, measures.OF_BUDGET: lost / share, measures.SAVES: saves}


def _stretch(training: Training, steps: int, stepped: Callable[[], object]) -> float:
    """Seconds that some steps take."""
    start = time.perf_counter()
    for _ in range(steps):
        training.step(nullcontext())
        stepped()
    return time.perf_counter() - start
