"""Which checkpoint a training continues from."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast import Checkpoint, Checkpointer, Every, KeepBest, KeepLast, Resume, Run
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
    StorageError,
    UnsupportedValueError,
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


def test_none_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is no reason to start anew: what it holds may be there again tomorrow."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"cannot read .*step-000000000003: Input/output error"):
        resumed(path)


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


# ------------------------------------------------------------------------------------------ with changes, or in part


def training() -> dict[str, Any]:
    """A model with an optimizer and a scheduler, and something to configure."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "settings": {"heat": 1.0}}


def advance(state: dict[str, Any], ckpt: Checkpointer, steps: int) -> list[float]:
    """Some steps of it; the rate that each was made with."""
    rates = []
    for _ in range(steps):
        rates.append(state["optimizer"].param_groups[0]["lr"])
        state["model"](torch.ones(1, 2)).sum().backward()
        state["optimizer"].step()
        state["scheduler"].step()
        ckpt.step()
    return rates


def run_process(path: Path, steps: int, **options: Any) -> list[float]:
    """One process of a training."""
    state = training()
    with Checkpointer(path, state, **options) as ckpt:
        return advance(state, ckpt, steps)


def test_a_learning_rate_that_is_changed_goes_on_from_there(tmp_path: Path) -> None:
    """The next step is made with it, and the schedule goes on as it would have, in proportion."""
    run_process(tmp_path / "run", 2)

    rates = run_process(tmp_path / "run", 2, resume=Resume(override={"optimizer.lr": 1.0}))

    assert rates == pytest.approx([1.0, 0.75])  # it would have been 1/6 and 1/8


def test_an_override_is_set_once(tmp_path: Path) -> None:
    """A process that continues from a checkpoint saved under it does not turn the schedule back."""
    override = Resume(override={"optimizer.lr": 1.0, "settings.heat": 2.0})
    run_process(tmp_path / "run", 2)
    run_process(tmp_path / "run", 2, resume=override)

    assert run_process(tmp_path / "run", 1, resume=override) == pytest.approx([0.6])


def test_another_value_is_another_override(tmp_path: Path) -> None:
    """What is new in it is set; what is as before is left as it has become."""
    run_process(tmp_path / "run", 2)
    run_process(tmp_path / "run", 2, resume=Resume(override={"optimizer.lr": 1.0}))
    both = Resume(override={"optimizer.lr": 1.0, "settings.heat": 3.0})

    assert run_process(tmp_path / "run", 1, resume=both) == pytest.approx([0.6])
    assert holdfast.load(Run(tmp_path / "run")[5].path)["settings"] == {"heat": 3.0}


def test_an_override_that_was_taken_back_counts_again(tmp_path: Path) -> None:
    """What counts is the override of the process that saved."""
    override = Resume(override={"optimizer.lr": 1.0})
    run_process(tmp_path / "run", 2)
    run_process(tmp_path / "run", 2, resume=override)
    run_process(tmp_path / "run", 1)

    assert run_process(tmp_path / "run", 1, resume=override) == [1.0]


def test_a_new_run_is_not_overridden(tmp_path: Path) -> None:
    """There is nothing to resume: the script's own values count."""
    assert run_process(tmp_path / "run", 1, resume=Resume(override={"optimizer.lr": 9.0})) == [0.5]


def test_what_was_overridden_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the value before and after."""
    run_process(tmp_path / "run", 1)

    run_process(tmp_path / "run", 0, resume=Resume(override={"settings.heat": 2.0}))

    assert "settings.heat: 1.0 -> 2.0" in caplog.text


def test_only_the_model_of_another_run(tmp_path: Path) -> None:
    """Step, epoch, optimizer and generators are fresh; the model is trained."""
    run_process(tmp_path / "pretrained", 3)
    trained = holdfast.load(Run(tmp_path / "pretrained")[3].path, only="model")["model"]["weight"]
    state = training()
    torch.manual_seed(77)
    generator = torch.get_rng_state()

    with Checkpointer(tmp_path / "run", state, resume=Resume(tmp_path / "pretrained", only=["model"])) as ckpt:
        assert (ckpt.global_step, ckpt.epoch) == (0, 0)
        assert torch.equal(state["model"].weight, trained)
        assert torch.equal(torch.get_rng_state(), generator)
        assert advance(state, ckpt, 1) == [0.5]


def test_a_fine_tuning_is_resumed_whole(tmp_path: Path) -> None:
    """Once the run has a checkpoint of its own, that is where it continues, with everything."""
    run_process(tmp_path / "pretrained", 3)
    spec = Resume(tmp_path / "pretrained", only=["model"])
    run_process(tmp_path / "run", 2, resume=spec)

    state = training()
    with Checkpointer(tmp_path / "run", state, resume=spec) as ckpt:
        assert ckpt.global_step == 2
        assert advance(state, ckpt, 1) == pytest.approx([0.5 / 3])


def test_a_new_head_on_a_trained_body(tmp_path: Path) -> None:
    """``strict=False`` takes what matches, and the report says what does not."""
    holdfast.save(tmp_path / "old", {"model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 9))})
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
    spec = Resume(tmp_path / "old", only=["model"], strict=False)

    with Checkpointer(tmp_path / "run", {"model": model}, resume=spec) as ckpt:
        assert ckpt.report is not None
        assert [item.name for item in ckpt.report.misshapen] == ["model/1.weight", "model/1.bias"]

    assert torch.equal(model[0].weight, holdfast.load(tmp_path / "old")["model"]["0.weight"])


def test_where_a_run_came_from(tmp_path: Path) -> None:
    """It is remembered by every checkpoint, also after the run was resumed itself; the parent is the last one."""
    run_process(tmp_path / "first", 3)
    origin = Run(tmp_path / "first")[3]

    run_process(tmp_path / "second", 1, resume=tmp_path / "first")
    run_process(tmp_path / "second", 1, resume=tmp_path / "first")

    began, went_on = list(Run(tmp_path / "second"))
    expected = {"run_id": origin.run_id, "checkpoint_id": origin.checkpoint_id, "step": 3}
    assert [began.loop["origin"], went_on.loop["origin"]] == [expected, expected]
    assert [began.parent, went_on.parent] == [origin.checkpoint_id, began.checkpoint_id]
    assert began.run_id == went_on.run_id != origin.run_id


def test_a_run_of_its_own_has_no_origin(tmp_path: Path) -> None:
    """Nothing is made up."""
    run_process(tmp_path / "run", 1)

    assert "origin" not in Run(tmp_path / "run")[1].loop


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": True}, "expected 'latest', 'never', 'best:<metric>', a step or a path, found True"),
        ({"source": None}, "found None"),
        ({"override": ["optimizer.lr"]}, "expected paths to values"),
        ({"only": ["model"]}, "it starts a new run from the path"),
        ({"source": 3, "only": ["model"]}, "it starts a new run from the path"),
        ({"source": "best:loss", "only": ["model"]}, "it starts a new run from the path"),
        ({"strict": False}, "say with only= what to start from"),
    ],
)
def test_a_resume_that_contradicts_itself(options: dict[str, Any], words: str) -> None:
    """It is refused when it is made, before any directory is."""
    with pytest.raises(UsageError, match=words):
        Resume(**options)


# ---------------------------------------------------------------------------------------------------- configurations


def configured(path: Path, config: Any) -> Checkpointer:
    """A process that records a configuration, ended."""
    with Checkpointer(path, {"x": torch.zeros(1)}, config=config) as ckpt:
        ckpt.step()
    return ckpt


def test_a_configuration_is_in_each_checkpoint(tmp_path: Path) -> None:
    """As it was given."""
    configured(tmp_path / "run", {"lr": 0.1, "betas": (0.9, 0.95)})

    assert Run(tmp_path / "run")[1].config == {"lr": 0.1, "betas": (0.9, 0.95)}


def test_what_changed_in_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is shown as a diff, and can be asked for."""
    configured(tmp_path / "run", {"lr": 0.1, "name": "x"})

    ckpt = configured(tmp_path / "run", {"lr": 0.2, "name": "x", "warmup": 10})

    assert list(map(str, ckpt.config_changes)) == ["  lr: 0.1 -> 0.2", "+ warmup: 10"]
    assert "lr: 0.1 -> 0.2\n  + warmup: 10" in caplog.text


def test_the_same_configuration_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither does one that is recorded for the first time."""
    configured(tmp_path / "run", None)
    first = configured(tmp_path / "run", {"lr": 0.1})
    second = configured(tmp_path / "run", {"lr": 0.1})

    assert (first.config_changes, second.config_changes) == ((), ())
    assert "configuration" not in caplog.text


def test_a_configuration_that_cannot_be_saved(tmp_path: Path) -> None:
    """It fails at once, not at the first save."""
    with pytest.raises(UnsupportedValueError, match=r"config\.loss"):
        Checkpointer(tmp_path / "run", {}, config={"loss": print})
