"""Bad places for a run: each has a clear error on entry or at the save, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Checkpointer, Every, KeepLast, Run
from holdfast.errors import DiskFullError, FormatVersionError, RunBusyError, StorageError
from holdfast.format import envelope


def train(path: Path, steps: int, nbytes: int = 100) -> Checkpointer:
    """A run that saves at each step."""
    state = {"w": torch.zeros(nbytes, dtype=torch.uint8)}
    with Checkpointer(path, state, save=Every(steps=1), keep=KeepLast(2)) as ckpt:
        for _ in range(steps):
            ckpt.step()
    return ckpt


def files(path: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_file_in_its_place(tmp_path: Path) -> None:
    """The file stays."""
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StorageError, match="is not a directory; a run is a directory of checkpoints"):
        train(tmp_path / "run", 1)
    assert files(tmp_path) == {"run": b"mine"}


def test_a_file_above_it(tmp_path: Path) -> None:
    """A path through a file."""
    (tmp_path / "a").write_text("mine")
    with pytest.raises(StorageError) as caught:
        train(tmp_path / "a" / "run", 1)
    assert caught.value.errno == errno.ENOTDIR
    assert files(tmp_path) == {"a": b"mine"}


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """A dangling link is no run, and stays."""
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="is not a directory"):
        train(tmp_path / "run", 1)
    assert (tmp_path / "run").is_symlink()


def test_a_read_only_disk(mount: Callable[[str], Path]) -> None:
    """Said on entry, before hours of training; reading the run works."""
    disk = mount("size=1m")
    train(disk / "run", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        train(disk / "run", 1)
    with pytest.raises(StorageError, match="Read-only file system"):
        train(disk / "other", 1)
    assert [checkpoint.step for checkpoint in Run(disk / "run")] == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else(tmp_path: Path) -> None:
    """Said on entry."""
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        train(tmp_path / "run", 1)


def test_a_full_disk(mount: Callable[[str], Path]) -> None:
    """The save fails with the way out; earlier checkpoints stay, and training goes on when there is room again."""
    disk = mount("size=400k")
    ballast = disk / "ballast"
    state = {"w": torch.zeros(50_000, dtype=torch.uint8)}
    with Checkpointer(disk / "run", state, save=Every(steps=1), keep=KeepLast(1), background=False) as ckpt:
        ckpt.step()
        ballast.write_bytes(bytes(280_000))
        state["w"] += 1  # what has not changed takes no room
        with pytest.raises(DiskFullError, match="Free some space"):
            ckpt.step()
        (kept,) = Run(disk / "run")
        kept.verify()
        assert kept.step == 1
        assert sorted(path.name for path in (disk / "run").glob("step-*")) == [kept.name]
        ballast.unlink()
        ckpt.step()
    assert [checkpoint.step for checkpoint in Run(disk / "run")] == [3]


def test_a_newer_version(tmp_path: Path) -> None:
    """Names the version that reads it; nothing is saved beside it."""
    train(tmp_path, 2)
    manifest = Path(Run(tmp_path)[2].path, "manifest.json")
    inner = json.loads(manifest.read_bytes())["manifest"]
    inner["format"] = "holdfast/9"
    manifest.write_bytes(envelope.seal("manifest", json.dumps(inner).encode()))
    before = files(tmp_path)
    with pytest.raises(FormatVersionError, match="holdfast/9"):
        train(tmp_path, 1)
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", [{}, {"weights.bin": b"mine"}, {"manifest.json": b"{}"}, {"sub/file": b"mine"}])
def test_a_foreign_step_directory(tmp_path: Path, content: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    """Something else under a checkpoint's name is passed over with a warning, never counted and never removed."""
    train(tmp_path, 3)
    foreign = tmp_path / "step-000000000009"
    foreign.mkdir()
    for name, data in content.items():
        (foreign / name).parent.mkdir(exist_ok=True)
        (foreign / name).write_bytes(data)
    ckpt = train(tmp_path, 1)
    assert ckpt.global_step == 4
    assert "step-000000000009, which is left as it is" in caplog.text
    assert files(foreign) == content
    assert [checkpoint.step for checkpoint in Run(tmp_path)] == [3, 4]


def test_a_foreign_directory_where_the_next_is_saved(tmp_path: Path) -> None:
    """The checkpoint of that step becomes the next generation."""
    (tmp_path / "step-000000000001").mkdir()
    (tmp_path / "step-000000000001" / "mine").write_text("mine")
    train(tmp_path, 1)
    assert Run(tmp_path)[1].name == "step-000000000001.g2"
    assert files(tmp_path / "step-000000000001") == {"mine": b"mine"}


HOLDER = """
import sys
import holdfast
with holdfast.Checkpointer(sys.argv[1], {"n": 1}, save=holdfast.Every(steps=1)) as ckpt:
    ckpt.step()
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["normally", "killed"])
def test_two_processes(tmp_path: Path, end: str) -> None:
    """The second is refused by name of the run; when the first is gone, also killed, the run is free at once."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusyError, match=str(tmp_path)) as caught:
            train(tmp_path, 1)
        assert caught.value.path == str(tmp_path)
        assert [checkpoint.step for checkpoint in Run(tmp_path)] == [1]
        if end == "killed":
            holder.send_signal(signal.SIGKILL)
    finally:
        holder.communicate(timeout=60)
    state: dict[str, Any] = {"n": 0}
    with Checkpointer(tmp_path, state) as ckpt:
        assert (ckpt.global_step, state["n"]) == (1, 1)
