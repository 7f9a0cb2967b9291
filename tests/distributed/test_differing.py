"""Ranks that see different things decide as one; what has to be the same and is not is an error that says what."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Launch

from holdfast import Run

SETTINGS: dict[str, Any] = {"layout": "ddp", "epochs": 2}


def steps(directory: Path) -> list[int]:
    """Of the checkpoints that are there."""
    return sorted({checkpoint.step for checkpoint in Run(directory / "run")})


def test_a_plain_value_that_differs(launch: Launch, tmp_path: Path) -> None:
    """An error on all ranks that names the key and the ranks; nothing is saved."""
    values = {"0": 1, "1": 1, "2": 7, "3": 1}

    outcome = launch("train", tmp_path, 4, values=values, **SETTINGS)

    assert outcome.kinds() == dict.fromkeys(range(4), "RanksDifferError"), outcome.story()
    for error in outcome.errors.values():
        assert "plain.deep[0]" in error["message"]
        assert "7" in error["message"]
        assert error["ranks"] == [2]
    assert steps(tmp_path) == []


def test_a_value_that_each_rank_has_its_own_of(launch: Launch, tmp_path: Path) -> None:
    """Wrapped in PerRank it may differ, and comes back to each."""
    values = {"0": 1, "1": 2}
    launch("train", tmp_path, 2, own_values=values, stop=2, **SETTINGS)

    outcome = launch("resume", tmp_path, 2, own_values={"0": 0, "1": 0}, **SETTINGS)

    assert [result["resumed"] for result in outcome.results] == [2, 2]
    assert [result["own value"] for result in outcome.results] == [{"deep": [1]}, {"deep": [2]}]


def test_metrics_that_differ(launch: Launch, tmp_path: Path) -> None:
    """What rank 0 says counts, and it is said that others say something else."""
    outcome = launch("train", tmp_path, 2, metrics={"0": 0.25, "1": 0.75}, **SETTINGS)

    assert outcome.statuses == [0, 0], outcome.story()
    newest = Run(tmp_path / "run").latest()
    assert newest is not None
    assert newest.metrics == {"val_loss": 0.25}
    assert "0.75" in outcome.ranks[0].output + outcome.ranks[1].output


def test_clocks_that_differ(launch: Launch, tmp_path: Path) -> None:
    """Whether it is time to save is decided once: a rank whose clock races does not save alone."""
    outcome = launch("train", tmp_path, 2, minutes=60.0, faults={1: [["long_since_save"]]}, **SETTINGS)

    assert outcome.statuses == [0, 0], outcome.story()
    assert steps(tmp_path) == [8]


def test_the_clock_of_the_first_rank_counts(launch: Launch, tmp_path: Path) -> None:
    """When it says that it is time, all save; whether it does may be asked less often than each step."""
    outcome = launch("train", tmp_path, 2, minutes=60.0, faults={0: [["long_since_save"]]}, **SETTINGS)

    assert outcome.statuses == [0, 0], outcome.story()
    assert len(steps(tmp_path)) > 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_listing_that_lacks_the_newest(rank: int, launch: Launch, tmp_path: Path) -> None:
    """All resume from the same checkpoint, whatever one of them sees in the directory."""
    launch("train", tmp_path, 2, stop=3, **SETTINGS)
    unseen = ["unseen", str((tmp_path / "run").resolve()), ["step-000000000003"]]

    outcome = launch("train", tmp_path, 2, faults={rank: [unseen]}, stop=3, **SETTINGS)

    assert len({result["resumed"] for result in outcome.results}) == 1
    assert len({str(result["gathered"]) for result in outcome.results}) == 1


@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_one_rank(rank: int, launch: Launch, tmp_path: Path) -> None:
    """All save the same step, and leave with the exit code of a preemption."""
    signalled = ["signalled", int(signal.SIGTERM), 3]

    outcome = launch("train", tmp_path, 4, save_steps=100, faults={rank: [signalled]}, **SETTINGS)

    assert outcome.statuses == [75] * 4, outcome.story()
    (step,) = steps(tmp_path)
    assert step in (3, 4)
    again = launch("train", tmp_path, 4, **SETTINGS)
    assert [result["resumed"] for result in again.results] == [step] * 4
