"""``holdfast export``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from holdfast import Run

Command = Callable[..., Any]


def test_an_entry(sharded_checkpoint: Any, tmp_path: Path, holdfast_cli: Command) -> None:
    """It becomes one file; the command says how many tensors that are, of which checkpoint."""
    out = tmp_path / "out.safetensors"
    answer = holdfast_cli("export", sharded_checkpoint.path, "moments", out)
    assert (answer.code, answer.out) == (0, f"{out}: 2 tensors of step-000000000001, 39.6 KB\n")
    assert load_file(out)["rows"].tobytes() == sharded_checkpoint.arrays["moments/rows"].tobytes()


def test_the_newest_of_a_run(run: Run, tmp_path: Path, holdfast_cli: Command) -> None:
    """A run stands for its newest checkpoint."""
    out = tmp_path / "out.safetensors"
    answer = holdfast_cli("export", run.path, "model", out, "--json")
    assert answer.json == {
        "checkpoint": run[30].path,
        "step": 30,
        "entry": "model",
        "path": str(out),
        "bytes": out.stat().st_size,
        "tensors": 1,
    }


def test_used_wrongly(run: Run, damaged: Run, tmp_path: Path, holdfast_cli: Command) -> None:
    """No such entry, no such checkpoint, something there already, damage: exit code 2, and why."""
    out = tmp_path / "out.safetensors"
    there = tmp_path / "there"
    there.write_text("mine")
    for arguments, words in (
        ((run[2].path, "modl", out), "'modl' is no entry with tensors; those are: model"),
        ((tmp_path / "none", "model", out), "does not exist"),
        ((run[2].path, "model", there), "there exists already; it was left as it is"),
        ((Path(damaged.path) / "step-000000000030", "model", out), "is damaged"),
    ):
        answer = holdfast_cli("export", *arguments)
        assert (answer.code, answer.out) == (2, "")
        assert words in answer.err
    assert (there.read_text(), out.exists()) == ("mine", False)
