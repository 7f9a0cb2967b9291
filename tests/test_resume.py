"""Which checkpoint a training continues from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast import Checkpoint, Checkpointer, Every, KeepBest, KeepLast, Run
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
    UsageError,
)
from holdfast.format import envelope

LOSSES = (0.5, 0.1, 0.3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of three epochs of one step each; ``x`` is the epoch's number."""
    state = {"x": torch.zeros(1)}
    with Checkpointer(tmp_path / "run", state, save=Every(epochs=1)) as ckpt:
        for loss in LOSSES:
            state["x"] += 1
            ckpt.step()
            ckpt.end_epoch({"loss": loss})
    return tmp_path / "run"


def resumed(path: Path, **options: Any) -> tuple[int, int, float]:
    """Where a training continues: step, epoch and ``x``."""
    state = {"x": torch.full((1,), -1.0)}
    with Checkpointer(path, state, **options) as ckpt:
        return ckpt.global_step, ckpt.epoch, state["x"].item()


def damage(checkpoint: Checkpoint) -> None:
    """Change a byte of its data, which only reading finds."""
    with Path(checkpoint.path, "x.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (3, 3, 3.0)),
        ({"resume": "latest"}, (3, 3, 3.0)),
        ({"resume": 1}, (1, 1, 1.0)),
        ({"resume": "best:loss:min"}, (2, 2, 2.0)),
        ({"resume": "best:loss:max"}, (1, 1, 1.0)),
        ({"resume": "best:loss", "keep": KeepLast(9) | KeepBest("loss", "min")}, (2, 2, 2.0)),
        ({"resume": "best:loss", "keep": KeepBest("loss", "max")}, (1, 1, 1.0)),
    ],
)
def test_what_is_asked_for(path: Path, options: Any, expected: Any) -> None:
    """The newest, the best, or a step; the mode of the best comes from the policy or is written."""
    assert resumed(path, **options) == expected


def test_a_new_run(tmp_path: Path) -> None:
    """Where nothing is, training starts, whatever is asked of this run."""
    for index, resume in enumerate(("latest", "never", "best:loss:min")):
        assert resumed(tmp_path / str(index), resume=resume) == (0, 0, -1.0)


def test_never(path: Path) -> None:
    """A run that has checkpoints is not started anew in the same place: they would stay the newest."""
    with pytest.raises(CheckpointExistsError, match="has checkpoints up to step 3") as caught:
        resumed(path, resume="never")
    assert caught.value.path == str(path)
    assert [c.step for c in Run(path)] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------- broken ones


def test_the_newest_is_damaged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one before is taken, with a warning that names file and tensor; the damaged one stays where it is."""
    damage(Run(path)[3])
    before = sorted(p.name for p in path.rglob("*"))
    assert resumed(path) == (2, 2, 2.0)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "step-000000000003, which is left as it is" in warning
    assert "x.safetensors, chunk 0" in warning
    assert "x/x" in warning
    assert sorted(p.name for p in path.rglob("*")) == before


def test_the_best_is_damaged(path: Path) -> None:
    """The next best is taken."""
    damage(Run(path)[2])
    assert resumed(path, resume="best:loss:min") == (3, 3, 3.0)


def test_a_damaged_step_that_was_asked_for(path: Path) -> None:
    """A step asked for is not replaced by another one."""
    damage(Run(path)[2])
    with pytest.raises(CorruptCheckpointError, match="step-000000000002"):
        resumed(path, resume=2)


def test_all_are_damaged(path: Path) -> None:
    """Training does not start anew beside checkpoints that a person may repair."""
    for checkpoint in list(Run(path)):
        damage(checkpoint)
    before = sorted(p.name for p in path.rglob("*"))
    with pytest.raises(CorruptCheckpointError, match="none that can be resumed from is intact"):
        resumed(path)
    assert sorted(p.name for p in path.rglob("*")) == before


def test_after_a_fallback_training_goes_on(path: Path) -> None:
    """The step of the damaged one is saved again as another generation, which is the newest then."""
    damage(Run(path)[3])
    state = {"x": torch.zeros(1)}
    with Checkpointer(path, state, save=Every(epochs=1)) as ckpt:
        ckpt.step()
        ckpt.end_epoch()
    assert Run(path).latest().name == "step-000000000003.g2"
    assert Run(path).latest().parent == Run(path)[2].checkpoint_id
    assert (path / "step-000000000003").exists()


def test_from_a_newer_version(path: Path) -> None:
    """It is not broken but out of reach: training stops rather than going back behind it."""
    manifest = Path(Run(path)[3].path, "manifest.json")
    inner = json.loads(manifest.read_bytes())["manifest"]
    inner["format"] = "holdfast/2"
    manifest.write_bytes(envelope.seal("manifest", json.dumps(inner).encode()))
    with pytest.raises(FormatVersionError, match="holdfast/2"):
        resumed(path)
    assert [name.step for name in Run(path).names()] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("source", ["checkpoint", "run"])
def test_from_another_run(tmp_path: Path, path: Path, source: str) -> None:
    """A path starts a run of its own from a checkpoint elsewhere, once: after that its own checkpoints count."""
    other = Run(path)[2].path if source == "checkpoint" else str(path)
    start = 2 if source == "checkpoint" else 3
    state = {"x": torch.zeros(1)}
    with Checkpointer(tmp_path / "new", state, save=Every(steps=1), resume=other) as ckpt:
        assert (ckpt.global_step, state["x"].item()) == (start, float(start))
        state["x"] += 10
        ckpt.step()
    first = Run(tmp_path / "new").latest()
    assert first.parent == Run(path)[start].checkpoint_id
    assert first.run_id != Run(path)[start].run_id
    assert resumed(tmp_path / "new", resume=other)[::2] == (start + 1, start + 10.0)
    assert [c.step for c in Run(path)] == [1, 2, 3]


def test_from_a_path_with_nothing(tmp_path: Path) -> None:
    """A path that was asked for and is not there is an error, not a new start."""
    for resume in (tmp_path / "nothing", str(tmp_path / "nothing"), "newest"):
        with pytest.raises(CheckpointNotFoundError):
            resumed(tmp_path / "new", resume=resume)


def test_a_copied_run(tmp_path: Path, path: Path) -> None:
    """A run can be moved to another place and goes on there."""
    shutil.move(path, tmp_path / "moved")
    assert resumed(tmp_path / "moved") == (3, 3, 3.0)


# ------------------------------------------------------------------------------------------------- steps and modes


def test_an_older_step(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Going back is told with its consequence, and nothing of the other branch is removed."""
    assert resumed(path, resume=1) == (1, 1, 1.0)
    assert "although it goes up to step 3" in caplog.text
    assert [c.step for c in Run(path)] == [1, 2, 3]


def test_what_is_saved_after_going_back_stays(path: Path) -> None:
    """It is not the newest of the run, and yet retention does not remove what was just saved."""
    with Checkpointer(path, {"x": torch.zeros(1)}, save=Every(steps=1), keep=KeepLast(1), resume=1) as ckpt:
        ckpt.step()
    assert [checkpoint.name for checkpoint in Run(path)] == ["step-000000000002.g2", "step-000000000003"]


def test_a_step_that_is_not_there(path: Path) -> None:
    """It says which there are."""
    with pytest.raises(CheckpointNotFoundError, match="it has steps 1, 2, 3"):
        resumed(path, resume=7)


@pytest.mark.parametrize(
    ("resume", "error", "message"),
    [
        ("best:loss", UsageError, "write 'best:loss:min' or 'best:loss:max'"),
        ("best:f1:max", CheckpointNotFoundError, "has no checkpoint with the metric 'f1'"),
        ("best:loss:low", UsageError, "expected 'min' or 'max', found 'low'"),
        (True, UsageError, "resume: expected 'latest', 'never'"),
        (None, UsageError, "resume: expected 'latest', 'never'"),
        (1.5, UsageError, "resume: expected 'latest', 'never'"),
    ],
)
def test_what_cannot_be_meant(path: Path, resume: Any, error: type[Exception], message: str) -> None:
    """Refused with what would do; the run is free afterwards."""
    with pytest.raises(error, match=message):
        resumed(path, resume=resume)
    assert resumed(path) == (3, 3, 3.0)


def test_differences_are_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the checkpoint has and the state has not is named."""
    state = {"x": torch.zeros(1), "y": torch.zeros(1)}
    holdfast.Run(path).save(state, step=4)
    resumed(path)
    assert "not in the state, and so not restored: y" in caplog.text
