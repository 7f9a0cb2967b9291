"""Bad input to saving and loading: each has a clear error, never hangs, and nothing that was there is lost."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DiskFullError,
    FormatVersionError,
    StorageError,
    storage_errors,
)
from holdfast.format import envelope
from holdfast.format import manifest as manifests
from holdfast.run import Run


def small() -> dict[str, Any]:
    """A small state."""
    return {"w": torch.arange(6.0), "n": np.arange(4), "c": {"lr": 0.1}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint."""
    return Path(holdfast.save(tmp_path / "saved", small(), step=3).path)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again, as a hostile writer would."""
    file = path / "manifest.json"
    inner = msgspec.json.decode(envelope.unseal("manifest", file.read_bytes()))
    edit(inner)
    file.write_bytes(envelope.seal("manifest", msgspec.json.encode(inner)))


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("kind", ["directory", "full directory", "file", "dangling link", "fifo"])
def test_saving_where_something_is(tmp_path: Path, kind: str) -> None:
    """Whatever is at the path stays as it is."""
    path = tmp_path / "x"
    if "directory" in kind:
        path.mkdir()
    if kind == "full directory":
        (path / "mine").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(CheckpointExistsError, match="was left as it is") as caught:
        holdfast.save(path, small())
    assert (caught.value.path, path.lstat()) == (str(path), before)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_below_a_file(tmp_path: Path) -> None:
    """A parent that is a file is named, and stays."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=rf"cannot save in {tmp_path}/file.*(exists|[Nn]ot a directory)"):
        holdfast.save(tmp_path / "file" / "x", small())
    with pytest.raises(StorageError, match=r"[Nn]ot a directory"):
        holdfast.save(tmp_path / "file" / "deeper" / "x", small())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_the_file_system_refuses(tmp_path: Path) -> None:
    """The error is the file system's, and nothing is left behind."""
    with pytest.raises(StorageError, match="too long"):
        holdfast.save(tmp_path / ("x" * 300), small())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", [holdfast.open, holdfast.load, lambda path: holdfast.restore(path, small())])
def test_opening_what_is_no_checkpoint(tmp_path: Path, saved: Path, use: Callable[[Path], object]) -> None:
    """Nothing there, a file, an empty directory, a run: each is said."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    run = Run(tmp_path / "run")
    run.save(small(), step=9)
    run.save(small(), step=10)
    for path, message in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "file": "is a file; a checkpoint is a directory",
        tmp_path / "file" / "below": "does not exist",
        tmp_path / "empty": r"has no manifest\.json",
        tmp_path / "run": "is a run of 2 checkpoints, not one; open one of them, such as step-000000000010",
    }.items():
        with pytest.raises(CheckpointNotFoundError, match=message) as caught:
            use(path)
        assert caught.value.path == str(path)
        assert isinstance(caught.value, FileNotFoundError)


def test_a_link_to_a_checkpoint_is_followed(tmp_path: Path, saved: Path) -> None:
    """A path is the user's: where it leads is where he wants to go."""
    (tmp_path / "latest").symlink_to("saved")
    assert holdfast.load(tmp_path / "latest")["c"] == {"lr": 0.1}
    assert holdfast.open(tmp_path / "latest").path == str(saved)


def test_a_link_within_a_run_is_not(tmp_path: Path, saved: Path) -> None:
    """A run's checkpoints are directories: a link could lead anywhere, and be removed with what it leads to."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-000000000001").symlink_to(saved)
    (broken,) = Run(tmp_path / "run").broken()
    assert "is a symbolic link" in str(broken.error)


# ------------------------------------------------------------------------------------------------------ strange files


def make_strange(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


@pytest.mark.parametrize("file", ["manifest.json", "w.safetensors", "annotations.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "device"])
def test_something_else_in_the_place_of_a_file(saved: Path, file: str, kind: str) -> None:
    """Never a hang, never an endless read: the file is named."""
    (saved / "annotations.json").write_bytes(manifests.encode_annotations(manifests.Annotations(pinned=True)))
    try:
        make_strange(saved / file, kind)
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    if file == "annotations.json":
        with pytest.warns(UserWarning, match=r"annotations\.json is not a plain file"):
            checkpoint = holdfast.open(saved)
        assert not checkpoint.pinned
        assert checkpoint.read("n/n").tolist() == [0, 1, 2, 3]
    else:
        checkpoint = None
        for use in (holdfast.open, holdfast.load, lambda path: holdfast.restore(path, small())):
            with pytest.raises(CorruptCheckpointError, match=f"{file} is not a plain file"):
                use(saved)
    if checkpoint is not None:
        with pytest.raises(CorruptCheckpointError, match=f"{file} is not a plain file"):
            checkpoint.verify()


def test_a_manifest_past_its_limit_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is looked at before anything is read or parsed."""
    os.truncate(saved / "manifest.json", 2**40)  # sparse: reading it would take a terabyte
    with pytest.raises(CorruptCheckpointError, match=r"has 1099511627776 bytes, more than the 134217728"):
        holdfast.open(saved)


# ----------------------------------------------------------------------------------------------------- hostile values


def test_a_newer_format_says_what_to_do(saved: Path) -> None:
    """Not damage: the way out is another version of Holdfast; and the checkpoint stays as it is."""
    rewrite(saved, lambda inner: inner.update(format="holdfast/2", more={"x": 1}))
    before = (saved / "manifest.json").read_bytes()
    for use in (holdfast.open, holdfast.load, lambda path: holdfast.restore(path, small())):
        with pytest.raises(FormatVersionError, match="upgrade to read it") as caught:
            use(saved)
        assert caught.value.path == str(saved / "manifest.json")
    assert (saved / "manifest.json").read_bytes() == before


def test_a_run_with_a_newer_checkpoint_is_not_continued_from_an_older_one(tmp_path: Path) -> None:
    """Resuming below it would fork the run in silence."""
    run = Run(tmp_path / "run")
    run.save(small(), step=1)
    rewrite(Path(run.save(small(), step=2).path), lambda inner: inner.update(format="holdfast/2"))
    with pytest.raises(FormatVersionError, match="upgrade to read it"):
        holdfast.Checkpointer(tmp_path / "run", small()).__enter__()


def test_a_tensor_that_the_file_cannot_hold_is_never_allocated(saved: Path) -> None:
    """A manifest that is consistent in itself and claims a terabyte is refused by the size of the file."""
    huge = 2**40

    def edit(inner: dict[str, Any]) -> None:
        inner["files"]["w.safetensors"] = {"bytes": huge + 4096, "chunk_bytes": 2**26, "xxh3_128": ["0" * 32] * 16385}
        inner["tensors"]["w"]["w"]["shape"] = [huge // 4]
        inner["tensors"]["w"]["w"]["pieces"][0]["shape"] = [huge // 4]

    size = (saved / "w.safetensors").stat().st_size
    rewrite(saved, edit)
    for use in (holdfast.open, holdfast.load, lambda path: holdfast.restore(path, small())):
        with pytest.raises(CorruptCheckpointError, match=f"has {size} bytes, expected {huge + 4096}"):
            use(saved)


HOSTILE: list[Any] = [
    {"$tensor": "nowhere"},
    {"$tensor": 1},
    {"$tensor": ["w"]},
    {"$tensor": {"a": "w"}},
    {"$ndarray": "nowhere"},
    {"$ndarray": []},
    {"$ndarray": ["w", "<U1"]},
    {"$ndarray": ["w", "O", [3]]},
    {"$ndarray": ["w", "i4,i4", [3]]},
    {"$ndarray": ["w", "<f4", [2**62, 4]]},
    {"$ndarray": ["w", "<f4", [-1, -6]]},
    {"$ndarray": ["w", "<f4", [6.0]]},
    {"$ndarray": ["w", "<f4", "6"]},
    {"$ndarray": ["w", "<f4", 6]},
    {"$ndarray": ["w", "<f4", [7]]},
    {"$ndarray": ["w", "<U0", [2**62, 2**62]]},
    {"$ndarray": ["w", 1, [6]]},
    {"$dtype": "float33"},
    {"$dtype": "nn"},
    {"$dtype": ""},
    {"$dtype": 1},
    {"$dtype": ["float32"]},
    {"$size": [2**70]},
    {"$size": "abc"},
    {"$size": [1.5]},
    {"$size": 3},
    {"$size": None},
    {"$device": "nonsense"},
    {"$device": "cuda:-1"},
    {"$device": "cuda:99999999999"},
    {"$device": 10**30},
    {"$device": [1]},
    {"$device": ""},
    {"$set": [[1]]},
    {"$set": [{"$tensor": "w"}]},
    {"$dict": [[{"$ndarray": "w"}, 1]]},
    {"$float": "x"},
    {"$unknown": 1},
    {"$tuple": [{"$tensor": "nowhere"}]},
]


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node)[:50])
def test_hostile_state_is_corruption_and_nothing_else(saved: Path, node: Any) -> None:
    """Whatever stands in a state whose checksum is right: one error, that names manifest and entry."""

    def edit(inner: dict[str, Any]) -> None:
        inner["state"]["w"] = {"deep": [node]}

    rewrite(saved, edit)
    for use in (holdfast.load, lambda path: holdfast.restore(path, small())):
        with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: state of w: ") as caught:
            use(saved)
        assert caught.value.step == 3


def test_loading_imports_nothing(saved: Path) -> None:
    """A codec's name is looked up among those that were registered, and is never taken for a module."""

    def edit(inner: dict[str, Any]) -> None:
        inner["state"]["c"] = {"$codec": ["antigravity:x", {}]}

    rewrite(saved, edit)
    with pytest.raises(holdfast.errors.UsageError, match="register_codec"):
        holdfast.load(saved)
    with pytest.raises(holdfast.errors.UsageError, match="register_codec"):
        holdfast.restore(saved, small())
    assert "antigravity" not in __import__("sys").modules


# ------------------------------------------------------------------------------------------------------- real disks


def state_of(nbytes: int) -> dict[str, Any]:
    """A state of one tensor."""
    return {"w": torch.zeros(nbytes, dtype=torch.uint8)}


def test_a_full_disk(mount: Callable[[str], Path]) -> None:
    """An error that says so; what was saved before is intact, and nothing half is left to take up space."""
    disk = mount("size=256k")
    run = Run(disk / "run")
    first = run.save(state_of(50_000), step=1)
    for step in (2, 3):
        with pytest.raises(DiskFullError, match="Free some space") as caught:
            run.save(state_of(400_000), step=step)
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in (disk / "run").iterdir()] == [first.name]
    first.verify()
    run.save(state_of(50_000), step=4).verify()


def test_a_dropped_error_lets_go_of_what_its_frames_hold() -> None:
    """Open files, locks and buffers go with the error, not with the next garbage collection."""
    watching = []

    def refuse() -> None:
        held = np.empty(1)
        watching.append(weakref.ref(held))
        with storage_errors("cannot read", "x"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    gc.disable()
    try:
        with contextlib.suppress(StorageError):
            refuse()
        assert watching[0]() is None
    finally:
        gc.enable()


def test_no_room_for_another_file(mount: Callable[[str], Path]) -> None:
    """The disk has space, and no inodes: wherever they run out, the same."""
    for inodes in range(4, 9):
        disk = mount(f"size=1m,nr_inodes={inodes}")
        run = Run(disk / "run")
        intact = []
        for step in range(4):
            try:
                intact.append(run.save(state_of(10), step=step))
            except DiskFullError:
                break
        else:
            pytest.fail("the inodes did not run out")
        left = [path.name for path in (disk / "run").iterdir()] if (disk / "run").exists() else []
        assert sorted(left) == [checkpoint.name for checkpoint in intact]
        for checkpoint in intact:
            checkpoint.verify()


def test_a_disk_that_may_not_be_written(mount: Callable[[str], Path]) -> None:
    """Saving is refused with the reason; reading works."""
    disk = mount("size=1m")
    run = Run(disk / "run")
    run.save(state_of(10), step=1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match=r"Read-only file system") as caught:
        run.save(state_of(10), step=2)
    assert caught.value.errno == errno.EROFS
    with pytest.raises(StorageError, match="Read-only"):
        holdfast.save(disk / "other" / "x", state_of(10))
    newest = run.latest()
    assert newest is not None
    newest.verify()
    assert holdfast.load(newest.path)["w"].tolist() == [0] * 10


# ------------------------------------------------------------------------------------------------------- two at once


def test_writers_of_one_step_at_once(tmp_path: Path) -> None:
    """Each gets a generation of its own, whole; none is lost."""
    run = Run(tmp_path / "run")

    def save(value: int) -> str:
        return Run(tmp_path / "run").save({"w": torch.full((1000,), value)}, step=5).name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(save, range(16)))
    assert len(set(names)) == 16
    assert sorted(checkpoint.generation for checkpoint in run) == list(range(1, 17))
    for value, name in enumerate(names):
        loaded = holdfast.load(tmp_path / "run" / name)["w"]
        assert torch.equal(loaded, torch.full((1000,), value))
