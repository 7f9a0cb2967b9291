"""Any damage to any file of a checkpoint is found and named, and a run continues from the checkpoint before."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, Damage
from holdfast.format import manifest as manifests
from holdfast.run import Run

CHUNK = 4096
Count = Callable[[int, int], int]
LayoutOf = Callable[[Path], Any]
RecordProperty = Callable[[str, object], None]


class Tied(torch.nn.Module):
    """A small model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 30)
        self.hidden = torch.nn.Linear(30, 30)
        self.out = torch.nn.Linear(30, 40, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return torch.as_tensor(self.out(torch.relu(self.hidden(self.embed(tokens)))))


def make_state() -> dict[str, Any]:
    """Model and optimizer after one step, an array, a file with nothing but its header, and a file with one byte."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "array": np.arange(10, dtype=np.int16),
        "empty": torch.empty(0),
        "flag": torch.tensor(True),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, rechunk: Callable[[Path, int], None]) -> Path:
    """A checkpoint of several files, the larger ones in several chunks."""
    path = tmp_path_factory.mktemp("pristine") / "checkpoint"
    holdfast.save(path, make_state(), step=1)
    rechunk(path, CHUNK)
    return path


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(pristine, tmp_path / "copy")


@pytest.fixture(scope="module")
def live() -> dict[str, Any]:
    """Objects to restore into."""
    return make_state()


FILES = ["manifest.json", *(f"{entry}.safetensors" for entry in ("model", "optimizer", "array", "empty", "flag"))]


def test_what_is_there(pristine: Path) -> None:
    """The files that the tests below damage are all there are, and some have several chunks."""
    assert sorted(path.name for path in pristine.iterdir()) == sorted(FILES)
    records = holdfast.open(pristine).manifest.files
    assert {name: len(record.xxh3_128) for name, record in records.items()} == {
        "model.safetensors": 4,
        "optimizer.safetensors": 6,
        "array.safetensors": 2,
        "empty.safetensors": 1,
        "flag.safetensors": 2,
    }


def refusals(path: Path, live: dict[str, Any]) -> Iterator[CorruptCheckpointError]:
    """The errors of verify, load and restore."""
    for use in (
        lambda: holdfast.open(path).verify(),
        lambda: holdfast.load(path),
        lambda: holdfast.restore(path, live),
    ):
        with pytest.raises(CorruptCheckpointError) as caught:
            use()
        yield caught.value


def places(size: int, wanted: int) -> list[int]:
    """Up to ``wanted`` places in a file, both ends included, not in step with anything."""
    return sorted(
        {0, size - 1, *(int(index * size / wanted) for index in range(wanted))} if size > wanted else range(size)
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_any_changed_byte_is_found_and_named(
    copy: Path, live: dict[str, Any], file: str, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """verify, load and restore each name the file, and of a data file the chunk and the tensors.

    Every bit of a checkpoint is in `torture/test_damage.py`.
    """
    layout = layout_of(copy)
    target = copy / file
    data = target.read_bytes()
    chosen = places(len(data), count(15, 500))
    for place in chosen:
        with target.open("r+b") as opened:
            opened.seek(place)
            opened.write(bytes([data[place] ^ (1 << place % 8)]))
        for error in refusals(copy, live):
            assert [item.file for item in error.damage] == [file], place
            assert error.path == str(copy)
            if file != "manifest.json":
                assert error.damage == (layout.damage_at(file, place),)
                assert all(tensor in str(error) for tensor in error.damage[0].tensors[:5])
        with target.open("r+b") as opened:
            opened.seek(place)
            opened.write(data[place : place + 1])
    holdfast.open(copy).verify()
    record_property("count: bits flipped", len(chosen))


def test_any_value_of_any_byte_of_the_manifest_is_refused(pristine: Path, count: Count) -> None:
    """Blanks, digits, quotes, the other case: nothing passes unnoticed; and nothing at all in the envelope."""
    data = (pristine / "manifest.json").read_bytes()
    envelope = {*range(data.index(b'"manifest":{') + 12), len(data) - 2, len(data) - 1}
    for place in sorted({*places(len(data), count(1500, len(data))), *envelope}):
        values = {*range(256)} if place in envelope else {*b" \t\n09afAF\"'{}[]:,\0\xff", data[place] ^ 0x20}
        for value in values - {data[place]}:
            with pytest.raises(ValueError, match=r"checksum mismatch|not a sealed manifest"):
                manifests.decode(data[:place] + bytes([value]) + data[place + 1 :], "m")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_any_length_of_any_file_is_refused(
    copy: Path, live: dict[str, Any], file: str, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """Truncated anywhere, down to nothing, or with something appended."""
    layout = layout_of(copy)
    target = copy / file
    data = target.read_bytes()
    lengths = places(len(data), count(8, 250))
    for changed in [*(data[:length] for length in lengths), data + b"\0", data + data]:
        target.write_bytes(changed)
        for error in refusals(copy, live):
            assert [item.file for item in error.damage] == [file], len(changed)
            if file != "manifest.json":
                assert f"has {len(changed)} bytes, expected {len(data)}" in str(error)
                assert error.damage[0].tensors == layout.tensors(file)
    record_property("count: truncations", len(lengths))


@pytest.mark.parametrize("file", FILES[1:])
def test_a_missing_file_is_named(copy: Path, live: dict[str, Any], file: str, layout_of: LayoutOf) -> None:
    """With the tensors that were in it."""
    layout = layout_of(copy)
    (copy / file).unlink()
    for error in refusals(copy, live):
        assert error.damage == (Damage(file, "is missing", tensors=layout.tensors(file)),)


def test_a_missing_manifest(copy: Path, live: dict[str, Any]) -> None:
    """Without its manifest it is not a checkpoint, and the error names the file."""
    (copy / "manifest.json").unlink()
    for use in (holdfast.open, holdfast.load, lambda path: holdfast.restore(path, live)):
        with pytest.raises(CheckpointNotFoundError, match=r"manifest\.json"):
            use(copy)


@pytest.mark.parametrize(
    "name",
    [
        "other.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "MODEL.safetensors",
        "Manifest.json",
        "notes.txt",
        ".hidden",
        "manifest.json.bak",
        ".annotations.json.x",
    ],
)
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_an_added_file_is_named(copy: Path, live: dict[str, Any], name: str, kind: str) -> None:
    """Whatever is not listed does not belong there, a name that differs in case alone included."""
    if (copy / name).exists():
        pytest.skip("the file system ignores case")
    if kind == "file":
        (copy / name).write_bytes(b"x")
    elif kind == "directory":
        (copy / name).mkdir()
    else:
        (copy / name).symlink_to("model.safetensors")
    for error in refusals(copy, live):
        assert error.damage == (Damage(name, "is not part of the checkpoint"),)


def test_verify_lists_all_damage(pristine: Path, copy: Path, layout_of: LayoutOf) -> None:
    """Every damaged chunk of every file, and what is missing."""
    layout = layout_of(pristine)
    (copy / "flag.safetensors").unlink()
    for file, place in (("model.safetensors", 0), ("model.safetensors", 2 * CHUNK), ("array.safetensors", CHUNK)):
        with (copy / file).open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)
            opened.seek(place)
            opened.write(bytes([byte[0] ^ 1]))
    checkpoint = holdfast.open(pristine)
    (copy / "flag.safetensors").write_bytes((pristine / "flag.safetensors").read_bytes())
    opened_copy = holdfast.open(copy)
    (copy / "flag.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError) as caught:
        opened_copy.verify()
    assert caught.value.damage == (
        Damage("flag.safetensors", "is missing", tensors=("flag/flag",)),
        layout.damage_at("array.safetensors", CHUNK),
        layout.damage_at("model.safetensors", 0),
        layout.damage_at("model.safetensors", 2 * CHUNK),
    )
    assert checkpoint.step == caught.value.step == 1


def test_damage_elsewhere_does_not_matter_to_a_part(copy: Path) -> None:
    """``only`` reads, and so checks, what it needs."""
    with (copy / "optimizer.safetensors").open("r+b") as opened:
        opened.seek(CHUNK)
        opened.write(b"\xff" * 8)
    assert holdfast.load(copy, only="array")["array"].tolist() == list(range(10))
    with pytest.raises(CorruptCheckpointError, match=r"optimizer\.safetensors, chunk 1"):
        holdfast.load(copy, only="optimizer")


def flip(path: Path) -> None:
    """Change the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "changed": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.unlink(), path.symlink_to("array.safetensors")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_run_continues_from_the_checkpoint_before(
    tmp_path: Path, live: dict[str, Any], file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The broken one is passed over with a warning that names the file, and is left as it is."""
    run = Run(tmp_path / "run")
    run.save(live, step=1)
    newest = Path(run.save(live, step=2).path)
    DAMAGES[damage](newest / file)
    before = {path.name: path.lstat() for path in newest.iterdir()}
    with caplog.at_level(logging.WARNING), holdfast.Checkpointer(tmp_path / "run", live) as checkpointer:
        assert checkpointer.global_step == 1
    warning = next(record for record in caplog.messages if newest.name in record)
    assert file in warning
    assert "left as it is" in warning
    unchanged = [(name, stat.st_ino, stat.st_mtime_ns) for name, stat in before.items()]
    assert [(path.name, path.lstat().st_ino, path.lstat().st_mtime_ns) for path in newest.iterdir()] == unchanged


def test_a_run_without_an_intact_checkpoint_does_not_start_anew(tmp_path: Path, live: dict[str, Any]) -> None:
    """Starting from step 0 would bury what may be repaired."""
    run = Run(tmp_path / "run")
    flip(Path(run.save(live, step=1).path) / "model.safetensors")
    with pytest.raises(
        CorruptCheckpointError, match=r"none that can be resumed from is intact(.|\n)*model\.safetensors"
    ):
        holdfast.Checkpointer(tmp_path / "run", live).__enter__()
