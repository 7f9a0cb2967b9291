"""``holdfast ls``."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import Run
from holdfast.cli import output

Command = Callable[..., Any]


def test_the_table(run: Run, holdfast_cli: Command) -> None:
    """Oldest first, by number; a generation is marked, and markup in a reason is shown as it is."""
    run.pin(2)
    answer = holdfast_cli("ls", run.path, "--best", "loss:min")
    size = output.size(run[2].nbytes).split()
    rows = [[word for word in row if word not in {"s", "0", "1", "2", "3"}] for row in answer.rows()]
    assert answer.code == 0
    assert answer.rows()[0] == ["step", "epoch", "metrics", "size", "age", "reason"]
    assert [row[:2] for row in answer.rows()[1:]] == [["2", "0"], ["10", "1"], ["10.g2", "2"], ["30", "3"]]
    assert [row[-2:] for row in rows[1:]] == [
        ["[bold]step", "pinned"],
        ["best", "loss"],
        ["[bold]step", "10"],
        ["30", "newest"],
    ]
    assert [row[2] for row in answer.rows()[1:]] == ["loss=0.5", "loss=0.125", "loss=0.125", "loss=0.25"]
    assert all(" ".join(size) in line for line in answer.out.splitlines()[1:])


def test_broken_ones(damaged: Run, holdfast_cli: Command) -> None:
    """They are listed with what is wrong; the newest is the newest intact one."""
    answer = holdfast_cli("ls", damaged.path)
    last, before = answer.out.splitlines()[-1], answer.out.splitlines()[-2]
    assert answer.code == 0
    assert last.split()[0] == "30"
    assert "model.safetensors" in last
    assert last.endswith("broken")
    assert before.split()[-1] == "newest"


def test_broken_ones_are_red(damaged: Run, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, and only they."""
    from rich.console import Console

    monkeypatch.setattr(output, "console", lambda: Console(force_terminal=True, color_system="standard", width=200))
    lines = holdfast_cli("ls", damaged.path).out.splitlines()
    assert ["\x1b[31m" in line for line in lines] == [False, False, False, False, True]


def test_json(damaged: Run, holdfast_cli: Command) -> None:
    """Everything that the table shows, and the ids."""
    answer = holdfast_cli("ls", damaged.path, "--best", "loss:max", "--json").json
    assert list(answer) == ["run", "checkpoints"]
    assert answer["run"] == damaged.path
    first, *_, last = answer["checkpoints"]
    saved = damaged[2]
    assert first == {
        "name": "step-000000000002",
        "path": saved.path,
        "step": 2,
        "generation": 1,
        "epoch": 0,
        "metrics": {"loss": 0.5},
        "bytes": saved.nbytes,
        "created_at": saved.created_at.isoformat(),
        "reason": "[bold]step 2",
        "pinned": False,
        "tags": [],
        "checkpoint_id": saved.checkpoint_id,
        "run_id": saved.run_id,
        "parent": None,
        "marks": ["best loss"],
        "broken": None,
    }
    assert sorted(last) == ["broken", "name", "path", "step"]
    assert "model.safetensors" in last["broken"]


def test_metrics_that_json_has_no_number_for(tmp_path: Path, holdfast_cli: Command) -> None:
    """They become text, so that every parser reads the answer."""
    Run(tmp_path).save({"x": 1}, step=1, metrics={"loss": float("nan"), "best": float("inf")})
    assert holdfast_cli("ls", tmp_path, "--json").json["checkpoints"][0]["metrics"] == {"loss": "nan", "best": "inf"}


def test_an_empty_run(tmp_path: Path, holdfast_cli: Command) -> None:
    """It says so."""
    answer = holdfast_cli("ls", tmp_path)
    assert (answer.code, answer.out) == (0, f"{tmp_path} holds no checkpoints.\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "does not exist; expected the directory of a run"),
        (lambda path: path / "file", "is not a directory; a run is a directory of checkpoints"),
        (lambda path: path / "run" / "step-000000000002", "is one checkpoint, not a run; try: holdfast show"),
    ],
)
def test_what_is_no_run(run: Run, tmp_path: Path, holdfast_cli: Command, make: Any, message: str) -> None:
    """Used wrongly, with the way out."""
    (tmp_path / "file").write_text("mine")
    answer = holdfast_cli("ls", make(tmp_path))
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err


@pytest.mark.parametrize("text", ["loss", "loss:low", ":min"])
def test_a_best_without_a_mode(run: Run, holdfast_cli: Command, text: str) -> None:
    """Used wrongly."""
    answer = holdfast_cli("ls", run.path, "--best", text)
    assert answer.code == 2
    assert "expected METRIC:min or METRIC:max" in answer.err


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (99_500, "100 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (1_490_000_000, "1.5 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes(nbytes: float, expected: str) -> None:
    """In the unit that suits."""
    assert output.size(nbytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (9e5, "10 d")]
)
def test_ages(seconds: float, expected: str) -> None:
    """In the largest unit; a clock that went back makes nothing negative."""
    assert output.age(datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)) == expected
