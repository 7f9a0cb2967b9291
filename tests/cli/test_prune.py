"""``holdfast prune``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import Run

Command = Callable[..., Any]


def names(run: Run) -> list[str]:
    """What is there, by step and generation."""
    return [f"{name.step}.{name.generation}" for name in run.names()]


def verdicts(answer: Any) -> dict[str, str]:
    """What it says of each checkpoint."""
    lines = [line.split(maxsplit=1) for line in answer.out.splitlines()[:-1]]
    return {name: " ".join(rest.split()) for name, rest in lines}


def test_what_goes_what_stays_and_why(run: Run, holdfast_cli: Command) -> None:
    """One line a checkpoint; what goes is gone."""
    answer = holdfast_cli("prune", run.path, "--keep-last", 1, "--keep-best", "loss:min")
    assert answer.code == 0
    assert verdicts(answer) == {
        "step-000000000002": "removed no policy keeps it",
        "step-000000000010": "stays best loss",
        "step-000000000010.g2": "removed no policy keeps it",
        "step-000000000030": "stays last 1",
    }
    assert answer.out.splitlines()[-1].startswith("2 removed (")
    assert answer.out.splitlines()[-1].endswith("2 stay")
    assert names(run) == ["10.1", "30.1"]


def test_dry_run(run: Run, holdfast_cli: Command) -> None:
    """It says what would go, and removes nothing."""
    answer = holdfast_cli("prune", run.path, "--keep-last", 2, "--dry-run")
    assert verdicts(answer)["step-000000000002"] == "would go no policy keeps it"
    assert answer.out.splitlines()[-1].startswith("2 would go (")
    assert names(run) == ["2.1", "10.1", "10.2", "30.1"]


def test_pinned_and_broken_ones_stay(damaged: Run, holdfast_cli: Command) -> None:
    """Pinned ones because they are, broken ones because nobody knows better."""
    damaged.pin(2)
    answer = holdfast_cli("prune", damaged.path, "--keep-last", 1)
    assert verdicts(answer) == {
        "step-000000000002": "stays pinned",
        "step-000000000010": "removed no policy keeps it",
        "step-000000000010.g2": "stays last 1",
        "step-000000000030": "stays broken, and left as it is",
    }
    assert names(damaged) == ["2.1", "10.2", "30.1"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep-every-steps", "10"], ["10.1", "10.2", "30.1"]),
        (["--keep-every-epochs", "2"], ["10.2", "30.1"]),
        (["--keep-best", "loss:max", "--keep-best", "loss:min"], ["2.1", "10.1", "30.1"]),
        (["--keep-best", "other:min"], ["30.1"]),
        (["--keep-last", "99"], ["2.1", "10.1", "10.2", "30.1"]),
    ],
)
def test_policies(run: Run, holdfast_cli: Command, options: list[str], left: list[str]) -> None:
    """Any of them keeps; the newest always stays."""
    assert holdfast_cli("prune", run.path, *options).code == 0
    assert names(run) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to keep"),
        (["--dry-run"], "say what to keep"),
        (["--keep-last", "0"], "expected a positive whole number, found 0"),
        (["--keep-best", "loss"], "expected METRIC:min or METRIC:max"),
        (["--keep-every-steps", "-1"], "expected a positive whole number, found -1"),
    ],
)
def test_used_wrongly(run: Run, holdfast_cli: Command, options: list[str], message: str) -> None:
    """Nothing goes by mistake."""
    answer = holdfast_cli("prune", run.path, *options)
    assert answer.code == 2
    assert message in answer.err
    assert len(names(run)) == 4


def test_what_is_no_run(run: Run, tmp_path: Path, holdfast_cli: Command) -> None:
    """Neither a checkpoint nor nothing."""
    for path in (run[2].path, tmp_path / "nothing"):
        assert holdfast_cli("prune", path, "--keep-last", 1).code == 2
    assert len(names(run)) == 4


def test_json(damaged: Run, holdfast_cli: Command) -> None:
    """The report, in parts."""
    answer = holdfast_cli("prune", damaged.path, "--keep-last", 1, "--dry-run", "--json").json
    removed = [item["name"] for item in answer.pop("removed")]
    assert removed == ["step-000000000002", "step-000000000010"]
    assert answer == {
        "run": damaged.path,
        "dry_run": True,
        "kept": {"step-000000000010.g2": "last 1"},
        "busy": [],
        "broken": ["step-000000000030"],
    }
