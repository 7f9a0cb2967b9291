"""``Every(overhead=...)`` in a training loop, by a clock that the test turns."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Checkpointer, Every, KeepLast, Run, block
from holdfast.pace import Pace
from holdfast.policies import daly_s
from holdfast.writer import Writer

STEP_S = 1.0


class Clock:
    """Goes by the steps of the training, and by what a save takes."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.save_s = 2.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What Checkpointers look at."""
    clock = Clock()
    save = Writer.save

    def saving(self: Writer, *args: Any) -> Any:
        clock.now_s += clock.save_s
        return save(self, *args)

    monkeypatch.setattr(block, "Pace", functools.partial(Pace, clock))
    monkeypatch.setattr(Writer, "save", saving)
    return clock


def train(path: Path, clock: Clock, policy: Any, steps: int, change_at: int = 0, change_to: float = 0.0) -> list[int]:
    """A training with saves that block; from one step on they take longer or shorter. The steps that were saved."""
    state = {"x": torch.zeros(1)}
    with Checkpointer(path, state, save=policy, keep=KeepLast(1000), background=False) as ckpt:
        for step in range(1, steps + 1):
            if step == change_at:
                clock.save_s = change_to
            clock.now_s += STEP_S
            ckpt.step()
        clock.save_s = 0.0  # the last save is the end's
    return [checkpoint.step for checkpoint in Run(path) if checkpoint.reason != "end of training"]


def test_no_more_than_its_share(tmp_path: Path, clock: Clock) -> None:
    """The first save comes at once; from then on 2 seconds are a tenth of the 20 between two saves."""
    assert train(tmp_path / "run", clock, Every(overhead=0.1), 70) == [1, 21, 41, 61]


def test_it_follows_what_saves_cost(tmp_path: Path, clock: Clock) -> None:
    """The mean of the last saves counts, without the first: saves that get dearer move apart."""
    saved = train(tmp_path / "run", clock, Every(overhead=0.1), 200, change_at=50, change_to=4.0)

    assert saved == [1, 21, 41, 61, 88, 118, 150, 184]


def test_failures_that_are_rare_space_saves_further_apart(tmp_path: Path, clock: Clock) -> None:
    """The optimum, where that costs less than the share that is allowed."""
    spacing_s = daly_s(cost_s=2.0, mtbf_s=3600)
    assert 100 < spacing_s < 130

    saved = train(tmp_path / "run", clock, Every(overhead=0.1, mtbf_hours=1), 250)

    assert saved == [1, 1 + round(spacing_s + 0.5), 1 + 2 * round(spacing_s + 0.5)]


def test_it_says_when_it_changes_its_mind(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """One line when it learns what a save costs, and one each time that it has changed by more than a quarter."""
    with caplog.at_level(logging.INFO, "holdfast"):
        train(tmp_path / "run", clock, Every(overhead=0.1), 200, change_at=50, change_to=4.0)

    told = [line.split(": ", 1)[1] for line in caplog.messages if "from now on" in line]
    assert told == [
        "a save takes 2 s from the training; from now on one every 20 s (Every(overhead=0.1))",
        "a save takes 2.67 s from the training; from now on one every 26.7 s (Every(overhead=0.1))",
        "a save takes 3.33 s from the training; from now on one every 33.3 s (Every(overhead=0.1))",
    ]


def test_other_policies_do_not_speak_of_costs(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing follows from them there."""
    with caplog.at_level(logging.INFO, "holdfast"):
        train(tmp_path / "run", clock, Every(steps=5), 20)

    assert [line for line in caplog.messages if "from now on" in line] == []
