"""The main job: a training run that is killed again and again ends with the bits of one that nobody killed."""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import TORTURE

from holdfast import Run

EPOCHS = 12
KILLS = 20 if TORTURE else 10
KILLS_PER_TRAINER = 10  # then the next comes out of a process of its own, with its own seed of hashes
# Each seed is another choice of moments: one by default, which takes a minute, more in `make torture`.
SEEDS = range(10 if TORTURE else 1)


@dataclass(frozen=True)
class Whole:
    """What the run that nobody killed came to."""

    run: Path
    report: dict[str, Any]
    checkpoints: list[str]
    steps_per_epoch: int
    moments: list[int]  # on the disk, in the save after each epoch


@pytest.fixture(scope="module")
def train_digits(trainer: Callable[..., Any]) -> Callable[[Path, Path], Any]:
    """Trains digits, each time in a new process that runs the example from its beginning."""
    return lambda run, report: trainer("digits.py", "--run", run, "--report", report, "--epochs", EPOCHS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_digits: Callable[[Path, Path], Any]) -> Whole:
    """A run that nobody kills."""
    directory = tmp_path_factory.mktemp("whole")
    with train_digits(directory / "run", directory / "report.json") as trainer:
        ended = trainer.train()
    assert ended.status == 0, ended
    report = json.loads((directory / "report.json").read_text())
    steps_per_epoch = report["steps"] // EPOCHS
    in_epochs = [0] * (EPOCHS + 1)
    for step, count in ended.moments.items():
        in_epochs[int(step) // steps_per_epoch] += count
    return Whole(directory / "run", report, names_in(directory / "run"), steps_per_epoch, in_epochs[1:])


class Kills:
    """Random moments to kill at, in batches and inside saves.

    The moments inside saves come from all parts of a save: each of its stretches has its turn, in random order.
    """

    STRETCHES = 12

    def __init__(self, rng: random.Random, whole: Whole) -> None:
        self.in_saves = 0
        self._rng = rng
        self._whole = whole
        self._stretches = itertools.cycle(rng.sample(range(self.STRETCHES), self.STRETCHES))

    def choose(self, epochs_done: int, *, is_last: bool) -> tuple[int, int]:
        """A step of the next process, and a moment on the disk after it (0: none), such that something is left to kill.

        In a batch of the next one and a half epochs, or inside the save of the next epoch. Neither can bring the run
        to its end, except that the last kill may fall into the last save.
        """
        epochs_left = EPOCHS - epochs_done
        if self._rng.random() < 0.7 and (epochs_left > 1 or is_last):
            self.in_saves += 1
            place = (next(self._stretches) + self._rng.random()) / self.STRETCHES
            return self._whole.steps_per_epoch, 1 + int(place * self._whole.moments[epochs_done])
        return self._rng.randint(1, int(self._whole.steps_per_epoch * min(epochs_left, 1.5))), 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_nobody_killed(
    seed: int, whole: Whole, tmp_path: Path, train_digits: Callable[[Path, Path], Any]
) -> None:
    """Killed at random moments, in batches and inside saves, it ends bit-identical in everything.

    After each kill every checkpoint that can be seen is intact, and the next process continues from the newest one.
    """
    kills = Kills(random.Random(seed), whole)
    run, report = tmp_path / "run", tmp_path / "report.json"
    for first in range(0, KILLS, KILLS_PER_TRAINER):
        with train_digits(run, report) as trainer:
            for kill in range(first, first + KILLS_PER_TRAINER):
                epochs_done = newest_epoch(run)
                step, moment = kills.choose(epochs_done, is_last=kill == KILLS - 1)

                ended = trainer.train(step=step, moment=moment)

                where = f"kill {kill} (epoch {epochs_done}, step {step}, moment {moment}): {ended}"
                assert ended.status == -signal.SIGKILL, where
                assert resumed_after(ended) == epochs_done, where
                for checkpoint in Run(run):
                    checkpoint.verify()
                assert Run(run).broken() == [], where
                # What was saved before the kill is there; of a save that was killed, all or nothing. The save of the
                # last epoch that was done may have been under way.
                saved = 1 if moment else (step - 1) // whole.steps_per_epoch
                assert newest_epoch(run) - epochs_done in {saved, max(0, saved - 1)}, where
    with train_digits(run, report) as trainer:
        ended = trainer.train()

    assert ended.status == 0, ended
    assert json.loads(report.read_text()) == whole.report
    assert names_in(run) == whole.checkpoints
    assert 0 < kills.in_saves < KILLS


def test_a_finished_run_reports_the_same_again(
    whole: Whole, tmp_path: Path, train_digits: Callable[[Path, Path], Any]
) -> None:
    """Started again after its end, it trains nothing and has the state that it ended with."""
    with train_digits(whole.run, tmp_path / "report.json") as trainer:
        ended = trainer.train()

    assert ended.status == 0, ended
    assert resumed_after(ended) == EPOCHS
    assert json.loads((tmp_path / "report.json").read_text()) == whole.report
    assert names_in(whole.run) == whole.checkpoints


def newest_epoch(run: Path) -> int:
    """Epochs done in the newest checkpoint."""
    newest = Run(run).latest()
    return 0 if newest is None else newest.epoch


def resumed_after(ended: Any) -> int:
    """The number of epochs from which a process went on, by its own words."""
    first_line = ended.stdout[0] if ended.stdout else ""
    return int(first_line.split()[-1]) if first_line.startswith("resuming") else 0


def names_in(run: Path) -> list[str]:
    """Everything in the directory of a run."""
    return sorted(path.name for path in run.iterdir())
