"""The whole promise at once: dropout, workers, accumulation, autocast, and processes killed or asked to leave."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import TORTURE

from holdfast import Run

EPOCHS, STEPS, ACCUMULATE = 5, 10, 2
SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}  # and how the process ends
FURTHEST_STEPS = 0.8
EACH = 20 if TORTURE else 4
# Each seed is another choice of moments: one by default, more in `make torture`.
SEEDS = range(10 if TORTURE else 1)


@pytest.fixture(scope="module")
def train_gpt(trainer: Callable[..., Any]) -> Callable[[Path, Path], Any]:
    """Trains a small GPT with two workers, gradients of two batches in a step, and a save after each step."""
    size = "--characters 20000 --context 16 --batch-size 4 --width 16 --layers 1 --sample 1 --save-steps 1 --workers 2"
    length = f"--epochs {EPOCHS} --steps {STEPS} --accumulate {ACCUMULATE} --dropout 0.2"
    return lambda run, report: trainer("gpt.py", *size.split(), *length.split(), "--run", run, "--report", report)


@dataclass(frozen=True)
class Whole:
    """What the run that nobody stopped came to."""

    report: dict[str, Any]
    forwards_in_step: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_gpt: Callable[[Path, Path], Any]) -> Whole:
    """A run that nobody stops."""
    directory = tmp_path_factory.mktemp("whole")
    with train_gpt(directory / "run", directory / "report.json") as trainer:
        ended = trainer.train()
    assert ended.status == 0, ended
    return Whole(json.loads((directory / "report.json").read_text()), ended.forwards / (EPOCHS * STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_stopped_again_and_again_ends_like_one_that_nobody_stopped(
    seed: int, whole: Whole, tmp_path: Path, train_gpt: Callable[[Path, Path], Any]
) -> None:
    """Killed at random moments and asked to leave at as many, it ends bit-identical, every sample it saw included.

    A moment is before the forward of any module, in training or evaluation. A process that was asked to leave has
    saved what it had done, to the batch; one that was killed has lost no save that was durable.
    """
    rng = random.Random(seed)
    run, report = tmp_path / "run", tmp_path / "report.json"
    ended_by: Counter[int] = Counter()
    with train_gpt(run, report) as trainer:
        for number in rng.sample([*SIGNALS] * EACH, 2 * EACH):
            before = progress(run)

            # Not far, so that something is left for those who come after.
            furthest = int(FURTHEST_STEPS * whole.forwards_in_step)
            ended = trainer.train(forward=rng.randint(1, furthest), signal=int(number))

            assert ended.status == SIGNALS[number], (before, ended)
            ended_by[number] += 1
            for checkpoint in Run(run):
                checkpoint.verify()
            assert progress(run) >= before + (number == signal.SIGTERM), (before, ended)
        ended = trainer.train()

    assert ended.status == 0, ended
    assert json.loads(report.read_text()) == whole.report
    assert ended_by == dict.fromkeys(SIGNALS, EACH)


def progress(run: Path) -> int:
    """Batches that the newest checkpoint has been trained on, and epochs that it has been evaluated after."""
    newest = Run(run).latest()
    return 0 if newest is None else newest.step * ACCUMULATE + newest.loop["accumulated"] + newest.epoch
