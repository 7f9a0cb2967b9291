"""A rank that never comes, or that stops coming: nobody waits for it for ever, and nothing is half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Launch, Outcome

from holdfast import Run

SETTINGS: dict[str, Any] = {"layout": "alone", "epochs": 1}
"""No collectives in the training itself: whoever misses a rank is the Checkpointer."""


def temporary(directory: Path) -> list[str]:
    """What saves under way have left."""
    return sorted(path.name for path in (directory / "run").glob(".tmp-*"))


def assert_all_but_one_raise(outcome: Outcome, missing: int) -> None:
    """RankTimeoutError, which names who is missing, on each of the others; and they end, not with 0."""
    others = [rank for rank in range(len(outcome.ranks)) if rank != missing]
    assert outcome.late == ()
    assert [outcome.ranks[rank].status for rank in others] == [3] * len(others), outcome.story()
    for rank in others:
        error = outcome.errors[rank]
        assert "RankError" in error["kinds"], error
        assert f"rank {missing}" in error["message"], error
    assert "RankTimeoutError" in {kind for rank in others for kind in outcome.errors[rank]["kinds"]}


@pytest.mark.parametrize("missing", [0, 3])
def test_a_rank_that_never_constructs_its_checkpointer(missing: int, launch: Launch, tmp_path: Path) -> None:
    """The others raise when the time is over; there is no checkpoint, and nothing else either."""
    outcome = launch(
        "train", tmp_path, 4, absent=[missing], bystanders=[missing], patience_s=2.0, timeout_s=60.0, **SETTINGS
    )

    assert_all_but_one_raise(outcome, missing)
    assert list(Run(tmp_path / "run")) == []
    assert temporary(tmp_path) == []


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_stops_before_a_save(missing: int, launch: Launch, tmp_path: Path) -> None:
    """The others raise; what was saved before stays, nothing is committed, and the next start removes the rest."""
    idle = {str(missing): 3}
    outcome = launch("train", tmp_path, 2, idle=idle, bystanders=[missing], patience_s=2.0, timeout_s=60.0, **SETTINGS)

    assert_all_but_one_raise(outcome, missing)
    assert [checkpoint.step for checkpoint in Run(tmp_path / "run")] == [1, 2]

    again = launch("train", tmp_path, 2, **SETTINGS)

    assert [result["resumed"] for result in again.results] == [2, 2]
    assert [result["steps"] for result in again.results] == [4, 4]
    assert temporary(tmp_path) == []
