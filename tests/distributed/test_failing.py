"""One rank cannot do its part of a save: all raise one error that names it, nothing is lost, and it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Launch, Outcome
from lab.ranks_kills import differences

from holdfast import Run

SETTINGS: dict[str, Any] = {"layout": "fsdp", "epochs": 2}


def steps(directory: Path) -> list[int]:
    """Of the checkpoints that are there, which are intact."""
    for checkpoint in Run(directory / "run"):
        checkpoint.verify()
    assert Run(directory / "run").broken() == []
    return sorted({checkpoint.step for checkpoint in Run(directory / "run")})


@pytest.mark.parametrize("rank", [0, 3])
def test_a_full_disk_on_one_rank(rank: int, launch: Launch, tmp_path: Path) -> None:
    """All raise an error that names the rank and says that there is no space; earlier checkpoints are intact."""
    launch("train", tmp_path, 4, stop=2, **SETTINGS)
    full = ["full_disk", str(tmp_path)]

    outcome = launch("train", tmp_path, 4, faults={rank: [full]}, **SETTINGS)

    assert outcome.statuses == [3] * 4, outcome.story()
    for error in outcome.errors.values():
        assert "RankError" in error["kinds"]
        assert f"rank {rank}" in error["message"]
        assert "No space left on device" in error["message"]
        assert error["ranks"] == [rank]
    assert steps(tmp_path) == [1, 2]


def test_an_error_of_one_rank(launch: Launch, tmp_path: Path) -> None:
    """Whatever it is, all raise the same, with its words."""
    fault = ["failing_call", "holdfast.storage.local_pending:LocalPending.write_files", 2, "a gamma ray"]

    outcome = launch("train", tmp_path, 2, faults={1: [fault]}, **SETTINGS)

    assert outcome.statuses == [3, 3], outcome.story()
    assert len({error["message"] for error in outcome.errors.values()}) == 1
    for error in outcome.errors.values():
        assert "rank 1" in error["message"]
        assert "a gamma ray" in error["message"]
    assert 2 not in steps(tmp_path)  # the third was under way when the second was known to have failed


def test_a_training_goes_on_after_a_save_that_failed(launch: Launch, undisturbed: Any, tmp_path: Path) -> None:
    """Who catches the error trains on; the next save works, and the training is the one that nobody disturbed."""
    fault = ["failing_call", "holdfast.storage.local_pending:LocalPending.write_files", 2]

    outcome: Outcome = launch("train", tmp_path, 2, faults={1: [fault]}, patient=True, **SETTINGS)

    assert [len(result["caught"]) for result in outcome.results] == [1, 1]
    assert list(differences(undisturbed(2, **SETTINGS), outcome, tmp_path)) == []
    assert steps(tmp_path) == [7, 8]  # the last one twice: after the step, and at the end
    assert list((tmp_path / "run").glob(".tmp-*")) == []
