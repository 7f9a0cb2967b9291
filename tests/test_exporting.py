"""An entry as one standard file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from lab.sharded import Cells, Pieces, grid, write_sharded
from safetensors import safe_open
from safetensors.numpy import load_file

import holdfast
from holdfast import exporting
from holdfast.errors import CheckpointExistsError, CorruptCheckpointError, DiskFullError, StorageError, UsageError
from holdfast.storage import durable
from holdfast.storage.local_reading import LocalFile


def names(directory: Path) -> list[str]:
    """What there is in a directory, hidden or not."""
    return sorted(path.name for path in directory.iterdir())


def test_an_entry_in_parts(sharded_checkpoint: Any, tmp_path: Path) -> None:
    """Every tensor whole, by its own name, as the safetensors library reads it; tied ones in the metadata."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    checkpoint.export("model", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    expected = {
        name.removeprefix("model/"): array
        for name, array in sharded_checkpoint.arrays.items()
        if name.startswith("model/")
    }
    expected.pop("tied")
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in found.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in expected.items()
    }
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == {
            "holdfast_checkpoint_id": checkpoint.checkpoint_id,
            "format": "pt",
            "tied": "rows",
        }


def test_an_entry_in_one_file(tmp_path: Path) -> None:
    """What one process saved comes out as it was saved, byte for byte: types that numpy does not know too."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    state = {
        "model": model,
        "values": {"a": torch.arange(4).to(torch.bfloat16), "b": torch.ones(2, dtype=torch.complex128)},
    }
    checkpoint = holdfast.save(tmp_path / "x", state)
    for entry in state:
        checkpoint.export(entry, tmp_path / "out.safetensors")
        original = (tmp_path / "x" / f"{entry}.safetensors").read_bytes()
        assert (tmp_path / "out.safetensors").read_bytes() == original
        (tmp_path / "out.safetensors").unlink()


@given(st.data())
def test_any_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of any shape, in any cells or pieces, read in chunks that are cut anywhere."""
    path = tmp_path_factory.mktemp("cut")
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    array = np.random.default_rng(0).integers(0, 99, shape).astype(data.draw(st.sampled_from(["i1", "f4", "c16"])))
    cell = tuple(data.draw(st.integers(1, size)) for size in shape)
    boxes = tuple(grid(shape, cell))
    cut = data.draw(st.sampled_from([Cells(cell), Pieces(boxes), Pieces(boxes[::-1])]))
    assume(len(boxes) < 200)
    checkpoint = holdfast.open(write_sharded(path / "x", {"e": {"a": array}}, {"e/a": cut}))
    checkpoint.export("e", path / "out")
    found = load_file(path / "out")["a"]
    assert (found if array.dtype != np.complex128 else found.view(np.complex128)[..., 0]).tolist() == array.tolist()


def test_each_chunk_is_read_once(sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors have bytes in it; but for those of headers, which are read for themselves first."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    reads: list[tuple[int, int]] = []
    original = LocalFile.read_into

    def read_into(self: LocalFile, offset: int, buffer: memoryview) -> int:
        reads.append((self.nbytes, offset))
        return original(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", read_into)
    checkpoint.export("moments", tmp_path / "out")
    records = [record for name, record in checkpoint.files.items() if name.startswith("moments")]
    sizes = {record.bytes for record in records}
    assert (sharded_checkpoint.path / "manifest.json").stat().st_size not in sizes
    behind = sorted((nbytes, at) for nbytes, at in reads if at and nbytes in sizes)
    chunks = sorted((record.bytes, at) for record in records for at in range(4096, record.bytes, 4096))
    assert behind == chunks


def test_few_files_and_few_parts_at_a_time(
    sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, the places of no more than these are in memory."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    groups: list[int] = []
    original = exporting._groups

    def watched(reads: Any) -> Any:
        for group in original(reads):
            groups.append(len(group))
            yield group

    monkeypatch.setattr(exporting, "_groups", watched)
    for files, parts, expected in ((16, 50_000, [5]), (2, 50_000, [2, 2, 1]), (16, 5, [2, 1, 2])):
        groups.clear()
        monkeypatch.setattr(exporting, "_FILES_AT_ONCE", files)
        monkeypatch.setattr(exporting, "_PARTS_AT_ONCE", parts)
        checkpoint.export("model", tmp_path / "out")
        assert groups == expected
        (tmp_path / "out").unlink()


def test_nothing_is_overwritten(sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there stays: a file, a directory, a link to nothing. It is said before anything is written."""
    monkeypatch.setattr(durable, "create_file", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("mine")
    (out / "directory").mkdir()
    (out / "link").symlink_to("nowhere")
    for name in ("file", "directory", "link"):
        with pytest.raises(CheckpointExistsError, match=f"{name} exists already; it was left as it is"):
            holdfast.open(sharded_checkpoint.path).export("model", out / name)
    assert (out / "file").read_text() == "mine"
    assert names(out) == ["directory", "file", "link"]


def test_nothing_is_overwritten_that_comes_meanwhile(
    sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what somebody else puts there while it is written."""
    original = durable.publish
    monkeypatch.setattr(durable, "publish", lambda *given: ((tmp_path / "out").write_text("mine"), original(*given)))
    with pytest.raises(CheckpointExistsError, match="exists already"):
        holdfast.open(sharded_checkpoint.path).export("model", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == ["out", "run"]


def test_damage_leaves_nothing(sharded_checkpoint: Any, tmp_path: Path) -> None:
    """The bytes are verified: those of another entry do not matter."""
    file = sharded_checkpoint.path / holdfast.open(sharded_checkpoint.path).manifest.layouts["model"][2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    checkpoint = holdfast.open(sharded_checkpoint.path)
    with pytest.raises(CorruptCheckpointError, match=file.name):
        checkpoint.export("model", tmp_path / "out")
    assert names(tmp_path) == ["run"]
    checkpoint.export("moments", tmp_path / "out")


def test_a_full_disk(sharded_checkpoint: Any, mount: Callable[[str], Path]) -> None:
    """It is said that it is full, and nothing is left there."""
    full = mount("size=16k")
    with pytest.raises(DiskFullError, match=f"cannot write {full}/out") as caught:
        holdfast.open(sharded_checkpoint.path).export("model", full / "out")
    assert caught.value.path == str(full / "out")
    assert names(full) == []


def test_a_disk_that_fails_in_the_middle(
    sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error of writing, not of reading the checkpoint."""
    original = durable.write_at

    def fail(file: Any, offset: int, views: Any) -> None:
        if offset:
            raise OSError(5, "Input/output error")
        original(file, offset, views)

    monkeypatch.setattr(durable, "write_at", fail)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/out: Input/output error"):
        holdfast.open(sharded_checkpoint.path).export("model", tmp_path / "out")
    assert names(tmp_path) == ["run"]


def noting(done: list[str], name: str) -> Callable[..., Any]:
    """A function of ``durable`` that notes when it is called."""
    original = getattr(durable, name)

    def call(*given: Any) -> Any:
        done.append(name)
        return original(*given)

    return call


def test_it_is_durable(sharded_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents first, then the name, then the directory."""
    done: list[str] = []
    for name in ("write_at", "sync_file", "publish", "sync_directory"):
        monkeypatch.setattr(durable, name, noting(done, name))
    holdfast.open(sharded_checkpoint.path).export("moments", tmp_path / "out")
    assert set(done[:-3]) == {"write_at"}
    assert done[-3:] == ["sync_file", "publish", "sync_directory"]


@pytest.mark.parametrize("entry", ["modl", "plain", "../model", ""])
def test_entries_without_tensors(tmp_path: Path, entry: str) -> None:
    """The message names those with some."""
    checkpoint = holdfast.save(tmp_path / "x", {"model": {"w": torch.ones(2)}, "plain": 1})
    with pytest.raises(UsageError, match=f"'{entry}' is no entry with tensors; those are: model"):
        checkpoint.export(entry, tmp_path / "out")


def test_not_into_the_checkpoint(sharded_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be damaged by it."""
    monkeypatch.chdir(sharded_checkpoint.path)
    checkpoint = holdfast.open(".")
    with pytest.raises(UsageError, match="would lie in the checkpoint"):
        checkpoint.export("model", "out.safetensors")
    checkpoint.verify()


def test_no_directory(sharded_checkpoint: Any, tmp_path: Path) -> None:
    """A directory that is not there is not made."""
    with pytest.raises(StorageError, match=r"cannot write .*/none/out: No such file or directory"):
        holdfast.open(sharded_checkpoint.path).export("model", tmp_path / "none" / "out")
