"""A committed checkpoint, as its readers see it."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast import checkpoint as checkpoints
from holdfast.checkpoint import TensorInfo
from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedValueError
from holdfast.format import manifest as manifests
from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Manifest
from holdfast.format.records import FileRecord, Piece, TensorRecord
from holdfast.format.tree import Opaque
from holdfast.storage.local import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
Sharded = Callable[[Path, np.ndarray[Any, Any], Boxes], Path]


def tied() -> torch.nn.Module:
    """Two layers with one weight."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint."""
    state = {"model": tied(), "a": np.arange(6).reshape(2, 3), "c": {"t": (1, torch.Size([2])), "d": torch.float16}}
    metrics = {"val_loss": 0.5, "best": float("inf")}
    return Path(holdfast.save(tmp_path / "x", state, step=12, epoch=3, metrics=metrics).path)


def test_what_it_says(saved: Path) -> None:
    """Step, epoch, metrics, times and ids are those of the save."""
    checkpoint = holdfast.open(saved)
    assert (checkpoint.step, checkpoint.epoch, checkpoint.generation) == (12, 3, 1)
    assert checkpoint.metrics == {"val_loss": 0.5, "best": float("inf")}
    assert (checkpoint.path, checkpoint.name, checkpoint.reason) == (str(saved), "x", "save")
    assert (checkpoint.parent, checkpoint.pinned, checkpoint.tags) == (None, False, ())
    assert checkpoint.created_at.tzinfo == datetime.UTC
    assert (len(checkpoint.checkpoint_id), len(checkpoint.run_id)) == (32, 32)
    assert checkpoint.nbytes == sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert repr(checkpoint) == f"Checkpoint('{saved}', step=12, epoch=3)"


def test_its_tensors(saved: Path) -> None:
    """Every tensor by entry and name; a tied one says to which."""
    assert holdfast.open(saved).tensors == {
        "model/0.weight": TensorInfo("float32", (3, 3), 36),
        "model/1.weight": TensorInfo("float32", (3, 3), 36, "model/0.weight"),
        "a/a": TensorInfo("int64", (2, 3), 48),
    }


def test_its_state_without_torchs_values(saved: Path) -> None:
    """The tree, with tensors and what only torch knows left as they are on disk; nothing of Holdfast's own."""
    assert holdfast.open(saved).state_tree() == {
        "model": {"0.weight": Opaque("$tensor", "0.weight"), "1.weight": Opaque("$tensor", "1.weight")},
        "a": Opaque("$ndarray", "a"),
        "c": {"t": (1, Opaque("$size", [2])), "d": Opaque("$dtype", "float16")},
    }


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_reading_every_type_that_numpy_has(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The array has the tensor's type, shape and bits; of the others the error says how to load them."""
    count = int(np.prod(shape))
    random = np.random.default_rng(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        tensors[name] = torch.empty(shape, dtype=getattr(torch, name))
        raw = torch.from_numpy(random.integers(0, 2, (count * dtype.itemsize,), np.uint8))
        if count:
            tensors[name] = raw.view(getattr(torch, name)).reshape(shape)
    checkpoint = holdfast.save(tmp_path / "x", {"t": tensors})
    for name, dtype in DTYPES.items():
        if dtype.numpy is None:
            with pytest.raises(UnsupportedValueError, match=r"holdfast\.load\("):
                checkpoint.read(f"t/{name}")
        else:
            array = checkpoint.read(f"t/{name}")
            expected = tensors[name].numpy()
            assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, shape, expected.tobytes())


def test_reading_a_tied_tensor(saved: Path) -> None:
    """By either name."""
    checkpoint = holdfast.open(saved)
    assert np.array_equal(checkpoint.read("model/0.weight"), checkpoint.read("model/1.weight"))


@pytest.mark.parametrize("name", ["model/x", "x/0.weight", "model", "", "/", "_rng/x"])
def test_reading_what_is_not_there(saved: Path, name: str) -> None:
    """A KeyError, as of any mapping."""
    with pytest.raises(KeyError):
        holdfast.open(saved).read(name)


@pytest.fixture
def sharded(image: Any, record_of: Callable[[bytes, int], FileRecord]) -> Sharded:
    """Makes a checkpoint of one tensor in several boxes (offset, shape), two files in turn; chunks of 4096 bytes."""

    def make(root: Path, array: np.ndarray[Any, Any], boxes: Boxes) -> Path:
        pending = LocalStore(root).create(0)
        contents: dict[str, list[tuple[int, np.ndarray[Any, Any]]]] = {"a.safetensors": [], "b.safetensors": []}
        for index, (offset, shape) in enumerate(boxes):
            box = array[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
            contents[("a.safetensors", "b.safetensors")[index % 2]].append((index, box))
        data, pieces = {}, {}
        for name, parts in contents.items():
            layout = safetensors.plan([(f"w{index}", "F32", box.shape) for index, box in parts], {})
            data[name] = layout.prefix + b"".join(box.tobytes() for _, box in parts)
            for (index, box), stored in zip(parts, layout.tensors, strict=True):
                pieces[index] = Piece(name, stored.name, stored.begin, box.shape, boxes[index][0])
        pending.write_files({name: image(content) for name, content in data.items()})
        record = TensorRecord("float32", array.shape, tuple(pieces[index] for index in range(len(boxes))))
        manifest = Manifest(
            format=manifests.FORMAT,
            checkpoint_id="0" * 32,
            run_id="0" * 32,
            parent=None,
            step=0,
            epoch=0,
            created_at="2026-01-01T00:00:00+00:00",
            reason="test",
            metrics={},
            state={"e": {"w": {"$tensor": "w"}}},
            tensors={"e": {"w": record}},
            aliases={},
            files={name: record_of(content, 4096) for name, content in data.items()},
            environment={},
        )
        pending.commit("x", manifests.encode(manifest))
        return root / "x"

    return make


GRIDS: dict[str, Boxes] = {
    "whole": [((0, 0), (60, 70))],
    "rows": [((0, 0), (20, 70)), ((20, 0), (40, 70))],
    "columns": [((0, 0), (60, 1)), ((0, 1), (60, 69))],
    "grid": [((0, 0), (7, 7)), ((0, 7), (7, 63)), ((7, 0), (53, 7)), ((7, 7), (53, 63))],
    "with an empty one": [((0, 0), (0, 70)), ((0, 0), (60, 70))],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_tensor_in_pieces(tmp_path: Path, sharded: Sharded, grid: str) -> None:
    """Boxes in several files and chunks come together, in numpy and in torch."""
    array = np.random.default_rng(0).random((60, 70), np.float32)
    path = sharded(tmp_path, array, GRIDS[grid])
    checkpoint = holdfast.open(path)
    checkpoint.verify()
    assert np.array_equal(checkpoint.read("e/w"), array)
    assert np.array_equal(holdfast.load(path)["e"]["w"].numpy(), array)
    live = torch.zeros(60, 70)
    holdfast.restore(path, {"e": {"w": live}}, generators=False)
    assert np.array_equal(live.numpy(), array)


def test_verifying_reports_progress(saved: Path) -> None:
    """The bytes of all files, once."""
    checkpoint = holdfast.open(saved)
    done: list[int] = []
    checkpoint.verify(done.append)
    assert sum(done) == checkpoint.nbytes


def test_a_header_that_tells_another_story(tmp_path: Path, sharded: Sharded) -> None:
    """Other tools go by the header: verify compares it with the manifest."""
    array = np.zeros((60, 70), np.float32)
    path = sharded(tmp_path, array, GRIDS["rows"])
    name = path / "manifest.json"
    other = holdfast.open(sharded(tmp_path / "other", array, GRIDS["columns"])).manifest
    mine = holdfast.open(path).manifest
    shutil.copy(tmp_path / "other/x/a.safetensors", path)
    shutil.copy(tmp_path / "other/x/b.safetensors", path)
    pieces = tuple(
        Piece(piece.file, piece.name, begin, piece.shape, piece.offset)
        for piece, begin in zip(mine.tensors["e"]["w"].pieces, (4096, 4096), strict=True)
    )
    small = [Piece(piece.file, piece.name, piece.begin, (1, 70), (row, 0)) for row, piece in enumerate(pieces)]
    small[0] = Piece(small[0].file, small[0].name, 4096, (1, 60), (0, 0))
    record = TensorRecord("float32", (1, 60), (small[0],))
    name.write_bytes(
        manifests.encode(
            Manifest(
                **{
                    **{f: getattr(mine, f) for f in mine.__struct_fields__},
                    "files": other.files,
                    "tensors": {"e": {"w": record}},
                }
            )
        )
    )
    with pytest.raises(CorruptCheckpointError, match=r"a\.safetensors: its header and the manifest disagree .*e/w"):
        holdfast.open(path).verify()


def test_removed_since_it_was_opened(saved: Path) -> None:
    """Reading says that it is gone."""
    checkpoint = holdfast.open(saved)
    shutil.rmtree(saved)
    for use in (
        checkpoint.verify,
        lambda: checkpoint.read("a/a"),
        lambda: holdfast.restore(checkpoint, {"a": np.arange(6).reshape(2, 3)}),
    ):
        with pytest.raises(CheckpointNotFoundError, match="does not exist"):
            use()


def test_removed_while_it_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its manifest and its files: it is gone, not damaged, for a removal takes the name away first."""
    store = LocalStore(saved.parent)
    look = checkpoints.structure_damage

    def removed_first(*args: Any) -> Any:
        store.remove(saved.name)
        return look(*args)

    monkeypatch.setattr(checkpoints, "structure_damage", removed_first)
    with pytest.raises(CheckpointNotFoundError, match="was removed while it was looked at"):
        holdfast.open(saved)


def test_another_checkpoint_since_it_was_opened(saved: Path, tmp_path: Path) -> None:
    """Bytes of one are never read by the manifest of another."""
    checkpoint = holdfast.open(saved)
    shutil.rmtree(saved)
    holdfast.save(saved, {"a": np.arange(6).reshape(2, 3)})
    with pytest.raises(CheckpointNotFoundError, match="is another checkpoint now"):
        checkpoint.read("a/a")


@pytest.mark.parametrize("how", ["missing", "fifo", "longer", "shorter"])
def test_a_file_damaged_since_it_was_opened(saved: Path, how: str) -> None:
    """The checkpoint is there, and one of its files is not what it was: named, and no hang."""
    checkpoint = holdfast.open(saved)
    file = saved / "a.safetensors"
    if how in ("missing", "fifo"):
        file.unlink()
    if how == "fifo":
        os.mkfifo(file)
    if how == "longer":
        file.write_bytes(file.read_bytes() + b"x")
    if how == "shorter":
        os.truncate(file, 4100)
    for use in (checkpoint.verify, lambda: checkpoint.read("a/a")):
        with pytest.raises(CorruptCheckpointError, match=r"a\.safetensors: .*a/a"):
            use()


def test_a_reader_is_not_robbed_of_its_files(saved: Path) -> None:
    """While bytes are read, the checkpoint cannot be removed."""
    store = LocalStore(saved.parent)
    answers: list[bool] = []
    holdfast.open(saved).verify(lambda nbytes: answers.append(store.remove(saved.name)))
    assert set(answers) == {False}
    assert store.remove(saved.name)


TORCH_FREE = """
import sys
import holdfast
from holdfast import Run

path = sys.argv[1]
checkpoint = holdfast.open(path + "/run/step-000000000001")
checkpoint.verify()
print(checkpoint.read("a/a").tolist(), checkpoint.metrics, sorted(checkpoint.tensors), checkpoint.state_tree()["a"])
run = Run(path + "/run")
print([c.step for c in run], run.latest().step, run.best("loss", "min").step, run[1].step)
print("torch" in sys.modules)
"""


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    """Opening, reading, verifying and listing leave torch unimported."""
    run = holdfast.Run(tmp_path / "run")
    for step in (1, 2):
        run.save({"a": np.arange(3), "t": torch.zeros(2, dtype=torch.bfloat16)}, step=step, metrics={"loss": step})
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[0, 1, 2] {'loss': 1} ['a/a', 't/t'] ndarray(a)",
        "[1, 2] 2 1 1",
        "False",
    ]


def test_a_manifest_damaged_since_it_was_opened(saved: Path) -> None:
    """It is damage, not another checkpoint."""
    checkpoint = holdfast.open(saved)
    manifest = saved / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"step":12', b'"step":13'))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: checksum mismatch"):
        checkpoint.verify()
