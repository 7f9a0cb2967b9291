"""``holdfast verify``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast import Run

Command = Callable[..., Any]


def flip(file: Path) -> None:
    """Change the last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flipped": (lambda path: flip(path / "model.safetensors"), ["model.safetensors, chunk 0", "model/first.weight"]),
    "truncated": (
        lambda path: (path / "model.safetensors").write_bytes(b"x"),
        ["model.safetensors", "model/first.weight"],
    ),
    "missing": (lambda path: (path / "model.safetensors").unlink(), ["model.safetensors"]),
    "added": (lambda path: (path / "other.safetensors").write_bytes(b""), ["other.safetensors"]),
    "manifest": (lambda path: flip(path / "manifest.json"), ["manifest.json"]),
}


def test_an_intact_run(run: Run, holdfast_cli: Command) -> None:
    """Each of its checkpoints, with the bytes read and their speed."""
    answer = holdfast_cli("verify", run.path)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert [line.split() for line in lines[:-1]] == [["intact", checkpoint.path] for checkpoint in run]
    assert lines[-1].startswith("4 checked, ")
    assert lines[-1].endswith("/s")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_damage(run: Run, holdfast_cli: Command, kind: str, what: str) -> None:
    """File, chunk and tensor are named, the exit code is 1, and the others are still verified."""
    path = Path(run[10].path)
    damage, expected = DAMAGE[kind]
    damage(path)
    answer = holdfast_cli("verify", run.path if what == "run" else path)
    assert answer.code == 1
    for text in expected:
        assert text in answer.out
    assert answer.out.count("intact ") == (3 if what == "run" else 0)
    assert answer.out.count("damaged ") == 1


def test_json(run: Run, holdfast_cli: Command) -> None:
    """What is damaged, in parts."""
    flip(Path(run[10].path, "model.safetensors"))
    answer = holdfast_cli("verify", run[10].path, "--json")
    assert answer.code == 1
    assert list(answer.json) == ["path", "bytes", "seconds", "checkpoints"]
    (checkpoint,) = answer.json["checkpoints"]
    (damage,) = checkpoint["damage"]
    assert checkpoint["path"] == run[10].path
    assert (damage["file"], damage["chunk"], damage["tensors"]) == (
        "model.safetensors",
        0,
        ["model/first.weight"],
    )
    assert holdfast_cli("verify", run[2].path, "--json").json["checkpoints"] == [{"path": run[2].path, "damage": []}]


def test_nothing_to_verify(tmp_path: Path, holdfast_cli: Command) -> None:
    """No checkpoint is no success."""
    for path, message in ((tmp_path, "holds no checkpoints"), (tmp_path / "nothing", "nothing")):
        answer = holdfast_cli("verify", path)
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err
