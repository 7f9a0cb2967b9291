"""``holdfast show``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast import Checkpointer, Every, KeepLast, Run

Command = Callable[..., Any]


def test_what_it_shows(run: Run, holdfast_cli: Command) -> None:
    """The state tree with shapes and types, tied names, files and versions; text as it was saved."""
    answer = holdfast_cli("show", run[30].path)
    assert answer.code == 0
    for text in (
        "first.weight: float32 [2, 2]",
        "second.weight: float32 [2, 2] = model/first.weight",
        "history: [0.5, 0.25]",
        "note: '[red]x'",
        "loss=0.25",
        "[bold]step 30",
        "model.safetensors (",
        "holdfast=",
        "torch=2.",
        run[30].checkpoint_id,
    ):
        assert text in answer.out, text


def test_lineage(tmp_path: Path, holdfast_cli: Command) -> None:
    """The checkpoint that its process had resumed from, by name."""
    for _ in range(2):
        with Checkpointer(tmp_path, {"x": 1}, save=Every(steps=1), keep=KeepLast(9)) as ckpt:
            ckpt.step()
    first, second = Run(tmp_path)
    assert "saved by a process that started anew" in holdfast_cli("show", first.path).out
    assert f"{first.checkpoint_id} (step-000000000001)" in holdfast_cli("show", second.path).out


def test_what_was_recorded_and_where_it_began(tmp_path: Path, holdfast_cli: Command) -> None:
    """The configuration, and the checkpoint of another run that this one began with."""
    for name, resume in (("first", "latest"), ("second", tmp_path / "first")):
        with Checkpointer(tmp_path / name, {"x": 1}, resume=resume, config={"lr": 0.5, "layers": [1, 2]}) as ckpt:
            ckpt.step()
    (first,), (second,) = Run(tmp_path / "first"), Run(tmp_path / "second")
    shown = holdfast_cli("show", second.path)
    answer = holdfast_cli("show", second.path, "--json").json
    assert f"{first.checkpoint_id} (step 1 of run {first.run_id})" in shown.out
    assert "lr: 0.5" in shown.out
    assert answer["config"] == {"lr": 0.5, "layers": [1, 2]}
    assert answer["origin"] == {"run_id": first.run_id, "checkpoint_id": first.checkpoint_id, "step": 1}


def test_the_newest_of_a_run(run: Run, holdfast_cli: Command) -> None:
    """A run stands for its newest checkpoint."""
    assert holdfast_cli("show", run.path).out == holdfast_cli("show", run[30].path).out


def test_json(run: Run, holdfast_cli: Command) -> None:
    """Everything, in one object."""
    answer = holdfast_cli("show", run[30].path, "--json").json
    assert list(answer)[-6:] == ["environment", "config", "origin", "files", "tensors", "state"]
    assert answer["step"] == 30
    whole = {"dtype": "float32", "shape": [2, 2], "bytes": 16, "parts": 1, "files": 1}
    assert answer["tensors"] == {
        "model/first.weight": {**whole, "alias_of": None},
        "model/second.weight": {**whole, "alias_of": "model/first.weight"},
    }
    assert answer["state"]["data"] == {"history": [0.5, 0.25], "note": "[red]x"}
    assert list(answer["files"]) == ["model.safetensors"]
    assert answer["environment"]["world_size"] == 1


def test_damage(damaged: Run, holdfast_cli: Command) -> None:
    """It says what is damaged."""
    answer = holdfast_cli("show", Path(damaged.path, "step-000000000030"))
    assert (answer.code, answer.out) == (2, "")
    assert "model.safetensors" in answer.err


def test_nothing(tmp_path: Path, holdfast_cli: Command) -> None:
    """A path without a checkpoint is used wrongly."""
    for path in (tmp_path / "nothing", tmp_path):
        answer = holdfast_cli("show", path)
        assert (answer.code, answer.out) == (2, "")
        assert str(path) in answer.err


def test_tensors_in_parts(sharded_checkpoint: Any, holdfast_cli: Command) -> None:
    """In how many parts and files each lies; what each rank has of its own is not shown."""
    answer = holdfast_cli("show", sharded_checkpoint.path)
    for text in (
        "rows: float32 [1100, 4] in 4 parts, 4 files",
        "anyhow: float32 [4, 6] in 3 parts, 3 files",
        "tied: float32 [1100, 4] in 4 parts, 4 files = model/rows",
        "whole: float32 [300]\n",
    ):
        assert text in answer.out, text
    assert "00002" not in answer.out.partition("state\n")[2]
    tensors = holdfast_cli("show", sharded_checkpoint.path, "--json").json["tensors"]
    assert [(tensors[name]["parts"], tensors[name]["files"]) for name in ("model/rows", "model/whole")] == [
        (4, 4),
        (1, 1),
    ]


def test_many_files(sharded_checkpoint: Any, holdfast_cli: Command) -> None:
    """Those of an entry are added up where there are many."""
    shown = " ".join(holdfast_cli("show", sharded_checkpoint.path).out.partition("\nstate\n")[0].split())
    assert "files model-*-of-00005.safetensors (5 files, " in shown
    assert "_ranks-*-of-00004.safetensors (4 files, 16.6 KB)" in shown
