"""On another number of ranks: the data goes on where it was, and what each rank had of its own follows the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab.ranks import Launch, Outcome
from lab.ranks_training import together

SETTINGS: dict[str, Any] = {"layout": "ddp", "epochs": 2}


@pytest.mark.parametrize(
    ("policy", "before", "after"), [("reassign", 4, 2), ("reseed", 2, 4), ("reassign", 1, 4), ("reseed", 4, 1)]
)
def test_the_samples_go_on(
    before: int,
    after: int,
    policy: str,
    launch: Launch,
    undisturbed: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    """With the global batch kept, the samples of each step are those of a training that kept its ranks, in order."""
    launch("train", tmp_path, before, stop=3, **SETTINGS)
    first = together(tmp_path, before)
    for log in tmp_path.glob("log-*.jsonl"):
        log.unlink()

    outcome = launch("train", tmp_path, after, per_rank=policy, **SETTINGS)

    assert [result["resumed"] for result in outcome.results] == [3] * after
    whole = undisturbed(2, **SETTINGS)
    assert [*first, *together(tmp_path, after)] == together(Path(whole.results[0]["directory"]), 2)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 1)])
def test_by_default_another_world_size_is_refused(before: int, after: int, launch: Launch, tmp_path: Path) -> None:
    """Nobody asked what shall become of the generators: an error that says so, and what to do; nothing was touched."""
    launch("train", tmp_path, before, stop=2, **SETTINGS)

    outcome = launch("train", tmp_path, after, **SETTINGS)

    assert outcome.statuses == [3] * after, outcome.story()
    for error in outcome.errors.values():
        assert "StateMismatchError" in error["kinds"], error
        assert "per_rank" in error["message"]


def test_reassigned_generators_come_from_the_ranks_that_had_them(launch: Launch, tmp_path: Path) -> None:
    """From 4 to 2: the first two get back their own."""
    at_save = launch("train", tmp_path, 4, stop=2, **SETTINGS)

    outcome = launch("resume", tmp_path, 2, per_rank="reassign", **SETTINGS)

    names = ("random", "numpy", "torch")
    found = [{name: result["own"][name] for name in names} for result in outcome.results]
    assert found == [{name: result["own"][name] for name in names} for result in at_save.results[:2]]


def test_reseeded_generators_differ_between_ranks(launch: Launch, tmp_path: Path) -> None:
    """From 2 to 4: every rank has its own, and the same each time."""
    launch("train", tmp_path, 2, stop=2, **SETTINGS)

    outcome = launch("resume", tmp_path, 4, per_rank="reseed", **SETTINGS)
    again = launch("resume", tmp_path, 4, per_rank="reseed", **SETTINGS)

    found = [result["own"]["torch"] for result in outcome.results]
    assert len(set(found)) == 4
    assert [result["own"]["torch"] for result in again.results] == found
