"""Where the parts of tensors lie that several processes saved: read, loaded, mapped, verified, and damaged."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from lab.sharded import Cells, Pieces, grid, write_sharded

import holdfast
from holdfast import inspection, locating
from holdfast.checkpoint import Checkpoint, TensorInfo
from holdfast.errors import CorruptCheckpointError, Damage
from holdfast.format import manifest as manifests
from holdfast.format.records import FileRecord
from holdfast.locating import Locator, Wanted
from holdfast.storage.boxes import overlap
from holdfast.storage.reading import Read


def wanted(checkpoint: Checkpoint, entry: str = "model") -> list[Wanted]:
    """Every tensor of an entry."""
    return [Wanted(f"{entry}/{name}", record) for name, record in checkpoint.manifest.tensors[entry].items()]


class Spy:
    """Reads headers for a locator, and remembers which files it was asked for at once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.asked: list[list[str]] = []
        self._checkpoint = checkpoint

    def __call__(self, parts: Mapping[str, Sequence[Read]]) -> None:
        """Read."""
        self.asked.append(sorted(parts))
        self._checkpoint.read_files(parts)


# ------------------------------------------------------------------------------------------------------------- reading


def test_every_way_of_reading(sharded_checkpoint: Any) -> None:
    """One by one, all together, mapped, and into live tensors: always what was saved."""
    path, arrays = sharded_checkpoint.path, sharded_checkpoint.arrays
    checkpoint = holdfast.open(path)
    checkpoint.verify()
    assert set(checkpoint.tensors) == {*arrays, *(f"_ranks/{rank:05d}" for rank in range(4))}
    for name, array in arrays.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.tobytes(), found.shape) == (array.dtype, array.tobytes(), array.shape), name
    live = {entry: {} for entry in ("model", "moments")}  # type: dict[str, dict[str, torch.Tensor]]
    for name, array in arrays.items():
        entry, _, tensor = name.partition("/")
        live[entry][tensor] = torch.zeros(array.shape, dtype=torch.from_numpy(array).dtype)
    live["model"]["tied"] = live["model"]["rows"]
    holdfast.restore(path, live, generators=False)
    for loaded in (holdfast.load(path), holdfast.load(path, mmap=True), live):
        assert set(loaded) == {"model", "moments"}
        for name, array in arrays.items():
            entry, _, tensor = name.partition("/")
            assert loaded[entry][tensor].numpy().tobytes() == array.tobytes(), name
        assert loaded["model"]["tied"] is loaded["model"]["rows"]


def test_in_how_many_parts(sharded_checkpoint: Any) -> None:
    """A tensor says in how many parts it lies, and in how many files."""
    tensors = holdfast.open(sharded_checkpoint.path).tensors
    assert tensors["model/rows"] == TensorInfo("float32", (1100, 4), 17600, None, parts=4, files=4)
    assert tensors["model/tied"] == TensorInfo("float32", (1100, 4), 17600, "model/rows", parts=4, files=4)
    assert tensors["model/anyhow"] == TensorInfo("float32", (4, 6), 96, None, parts=3, files=3)
    assert tensors["model/whole"] == TensorInfo("float32", (300,), 1200)


def test_what_ranks_have_of_their_own(sharded_checkpoint: Any) -> None:
    """It is read like any tensor, and no entry of the state."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    assert json.loads(checkpoint.read("_ranks/00002").tobytes()) == {"_rng": {"python": 2}, "loader": {"position": 20}}
    assert set(checkpoint.state_tree()) == {"model", "moments"}


@given(st.data())
def test_any_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Of any shape, in cells of any shape that any processes hold: what is read is what was saved."""
    arrays, cuts = {}, {}
    for name in ("a", "b"):
        shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        arrays[name] = np.random.default_rng(0).integers(0, 99, shape).astype(np.int32)
        cell = tuple(data.draw(st.integers(1, size)) for size in shape)
        order = tuple(data.draw(st.permutations(range(len(grid(shape, cell))))))
        cuts[f"e/{name}"] = Cells(cell, order) if data.draw(st.booleans()) else Pieces(tuple(grid(shape, cell)))
    path = write_sharded(tmp_path_factory.mktemp("cut") / "x", {"e": arrays}, cuts)
    checkpoint = holdfast.open(path)
    checkpoint.verify()
    assert {name: checkpoint.read(f"e/{name}").tolist() for name in arrays} == {
        name: array.tolist() for name, array in arrays.items()
    }
    name = data.draw(st.sampled_from(["a", "b"]))
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in arrays[name].shape)
    size = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(arrays[name].shape, offset, strict=True))
    record = checkpoint.manifest.tensors["e"][name]
    if record.layout:
        met = [(piece.offset, piece.shape) for piece in checkpoint.pieces(f"e/{name}", record, (offset, size))]
        boxes = grid(record.shape, record.cell)
        assert met == [box for box in boxes if overlap(*box, offset, size)]


# ------------------------------------------------------------------------------------------------- how headers are read


def test_each_header_is_read_once(sharded_checkpoint: Any) -> None:
    """Of all files at once, for all tensors; and not again, for they are remembered."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    spy, locator = Spy(checkpoint), Locator(checkpoint.manifest, checkpoint.path)
    first = locator.locate(wanted(checkpoint), spy)
    assert spy.asked == [sorted(checkpoint.manifest.layouts["model"])]
    assert locator.locate(wanted(checkpoint), spy) == first
    assert len(spy.asked) == 1


def test_only_headers_that_are_needed_are_read(sharded_checkpoint: Any) -> None:
    """Of the files whose cells meet what is wanted; none where everything has pieces."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    spy, locator = Spy(checkpoint), Locator(checkpoint.manifest, checkpoint.path)
    records = checkpoint.manifest.tensors["model"]
    locator.locate([Wanted("model/anyhow", records["anyhow"]), Wanted("model/whole", records["whole"])], spy)
    assert spy.asked == []
    locator.locate([Wanted("model/rows", records["rows"], ((274, 0), (2, 4)))], spy)
    assert spy.asked == [list(checkpoint.manifest.layouts["model"][:2])]


def test_long_headers_take_a_second_look(sharded_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them at a time than there is room for; the answer is the same."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    plain = Locator(checkpoint.manifest, checkpoint.path).locate(wanted(checkpoint), Spy(checkpoint))
    monkeypatch.setattr(locating, "_FIRST_BYTES", 16)
    monkeypatch.setattr(locating, "_LONG_HEADERS_BYTES", 2 * 4096)
    spy = Spy(checkpoint)
    assert Locator(checkpoint.manifest, checkpoint.path).locate(wanted(checkpoint), spy) == plain
    assert list(map(len, spy.asked)) == [4, 2, 2]


def test_a_file_shorter_than_what_is_read_first(tmp_path: Path) -> None:
    """There is no more of it to be read."""
    path = write_sharded(tmp_path / "x", {"e": {"a": np.arange(4)}}, {"e/a": Cells((1,))})
    assert holdfast.open(path).read("e/a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("most", "files"), [(0, 0), (4500, 2)])
def test_what_is_remembered_is_bounded(
    sharded_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, most: int, files: int
) -> None:
    """Headers that were not asked for longest are forgotten, and read again when somebody asks."""
    checkpoint = holdfast.open(sharded_checkpoint.path)
    spy, locator = Spy(checkpoint), Locator(checkpoint.manifest, checkpoint.path)
    first = locator.locate(wanted(checkpoint), spy)
    monkeypatch.setattr(locating, "MAX_KEPT_BYTES", most)
    locator = Locator(checkpoint.manifest, checkpoint.path)
    for _ in range(2):
        assert locator.locate(wanted(checkpoint), spy) == first
        assert locator._kept_bytes == sum(map(locating._nbytes, locator._kept.values())) <= most
    assert len(locator._kept) == files


def test_several_threads_ask(sharded_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All get the right bytes, whatever is forgotten meanwhile."""
    monkeypatch.setattr(locating, "MAX_KEPT_BYTES", 2500)
    checkpoint = holdfast.open(sharded_checkpoint.path)
    wrong: list[str] = []
    ready = threading.Barrier(4)

    def read() -> None:
        ready.wait()
        for name, array in sharded_checkpoint.arrays.items():
            if checkpoint.read(name).tobytes() != array.tobytes():
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -------------------------------------------------------------------------------------------------------------- damage


def flip(file: Path, place: int) -> None:
    """Change one byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """By the definition of safetensors, where the tensors of a file begin and end."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {name: tuple(8 + length + at for at in item["data_offsets"]) for name, item in header.items()}


def test_verify_names_the_tensor_in_a_damaged_chunk(sharded_checkpoint: Any, tmp_path: Path) -> None:
    """Of each chunk of each file: the tensors with bytes in it, and all of the file's where its header is in it."""
    for name, record in holdfast.open(sharded_checkpoint.path).files.items():
        places = spans(sharded_checkpoint.path / name)
        entry = name.partition("-")[0]
        for chunk in range(len(record.xxh3_128)):
            copy = shutil.copytree(sharded_checkpoint.path, tmp_path / "copy")
            flip(copy / name, chunk * record.chunk_bytes)
            begin, end = chunk * record.chunk_bytes, min((chunk + 1) * record.chunk_bytes, record.bytes)
            inside = {f"{entry}/{tensor}" for tensor, (low, high) in places.items() if max(low, begin) < min(high, end)}
            if chunk == 0 and any(name in files for files in holdfast.open(copy).manifest.layouts.values()):
                inside = {f"{entry}/{tensor}" for tensor in places} - {"model/anyhow"}
            for use in (holdfast.open(copy).verify, lambda copy=copy: holdfast.load(copy)):
                with pytest.raises(CorruptCheckpointError) as caught:
                    use()
                (damage,) = caught.value.damage
                assert (damage.file, damage.chunk, set(damage.tensors)) == (name, chunk, inside)
            shutil.rmtree(copy)


def test_a_missing_file_names_its_tensors(sharded_checkpoint: Any) -> None:
    """Those with a cell in it too, in the order of the manifest."""
    name = holdfast.open(sharded_checkpoint.path).manifest.layouts["model"][1]
    (sharded_checkpoint.path / name).unlink()
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(sharded_checkpoint.path)
    names = ("model/rows", "model/columns", "model/grid", "model/few", "model/anyhow")
    assert caught.value.damage == (Damage(name, "is missing", tensors=names),)


def test_not_endless_names(sharded_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files that are missing have cells of the same tensors: these are named up to a number."""
    monkeypatch.setattr(inspection, "MAX_NAMED", 7)
    for name in holdfast.open(sharded_checkpoint.path).manifest.layouts["model"]:
        (sharded_checkpoint.path / name).unlink()
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(sharded_checkpoint.path)
    assert [len(damage.tensors) for damage in caught.value.damage] == [5, 2, 0, 0]


def reheaded(path: Path, file: str, change: Callable[[dict[str, Any]], None] | bytes) -> None:
    """Give a file another header of the same length, or other first bytes, and the checksums of that."""
    data = (path / file).read_bytes()
    if isinstance(change, bytes):
        data = change + data[len(change) :]
    else:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        assert len(text) <= length
        data = data[:8] + text.ljust(length) + data[8 + length :]
    (path / file).write_bytes(data)
    manifest = manifests.decode((path / "manifest.json").read_bytes(), str(path))
    size = manifest.files[file].chunk_bytes
    sums = tuple(xxhash.xxh3_128_hexdigest(data[at : at + size]) for at in range(0, len(data), size))
    files = {**manifest.files, file: FileRecord(len(data), size, sums)}
    (path / "manifest.json").write_bytes(manifests.encode(msgspec.structs.replace(manifest, files=files)))


def renamed(header: dict[str, Any]) -> None:
    """The tensor has another name."""
    header["other"] = header.pop("columns")


def of_another_type(header: dict[str, Any]) -> None:
    """Of as many bytes."""
    header["columns"]["dtype"] = "I64"


def of_another_shape(header: dict[str, Any]) -> None:
    """Of as many elements."""
    header["columns"]["shape"].reverse()


@pytest.mark.parametrize("change", [renamed, of_another_type, of_another_shape])
def test_headers_that_tell_another_story(sharded_checkpoint: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Reading the tensor, and verifying, name it and the file; other tensors of the file are read as ever."""
    path = sharded_checkpoint.path
    file = holdfast.open(path).manifest.layouts["model"][1]
    reheaded(path, file, change)
    checkpoint = holdfast.open(path)
    expected = (Damage(file, "its header and the manifest disagree", tensors=("model/columns",)),)
    for use in (lambda: checkpoint.read("model/columns"), checkpoint.verify, lambda: holdfast.load(path)):
        with pytest.raises(CorruptCheckpointError) as caught:
            use()
        assert (caught.value.damage, caught.value.step) == (expected, 1)
    assert checkpoint.read("model/rows").tobytes() == sharded_checkpoint.arrays["model/rows"].tobytes()
    assert holdfast.load(path, only="moments")["moments"]["rows"].shape == (1100, 4)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"\xff" * 8, "its safetensors header: the header claims 18446744073709551615 bytes in a file of"),
        ((2**24).to_bytes(8, "little"), "its safetensors header: the header claims 16777216 bytes"),
        ((4090).to_bytes(8, "little"), "its safetensors header: not the JSON expected here"),
        (b"\0" * 8, "its safetensors header: the header does not start with '{'"),
        ((4088).to_bytes(8, "little") + b"[", "its safetensors header: the header does not start with '{'"),
        ((4088).to_bytes(8, "little") + b"{x", "its safetensors header: not the JSON expected here"),
    ],
)
def test_headers_that_are_none(sharded_checkpoint: Any, first: bytes, words: str) -> None:
    """Reading and verifying name the file."""
    path = sharded_checkpoint.path
    file = holdfast.open(path).manifest.layouts["model"][1]
    reheaded(path, file, first)
    checkpoint = holdfast.open(path)
    for use in (lambda: checkpoint.read("model/columns"), checkpoint.verify, lambda: holdfast.load(path)):
        with pytest.raises(CorruptCheckpointError, match=words) as caught:
            use()
        assert [damage.file for damage in caught.value.damage] == [file]
    with pytest.raises(CorruptCheckpointError, match=r"tensors: model/rows.*model/columns"):
        checkpoint.read("model/columns")


def test_a_header_that_was_damaged(sharded_checkpoint: Any) -> None:
    """It is not believed: its chunk has another checksum."""
    path = sharded_checkpoint.path
    file = holdfast.open(path).manifest.layouts["model"][1]
    flip(path / file, 9)
    with pytest.raises(CorruptCheckpointError, match=f"{file}, chunk 0: bytes 0 to 4096 differ"):
        holdfast.open(path).read("model/columns")


def test_a_piece_and_a_cell_of_one_name(sharded_checkpoint: Any) -> None:
    """Verify finds that two tensors are to have the same bytes of a file."""
    path = sharded_checkpoint.path
    manifest = holdfast.open(path).manifest
    records = dict(manifest.tensors["model"])
    anyhow = records["anyhow"]
    file = anyhow.pieces[0].file
    begin, _ = spans(path / file)["columns"]
    stolen = msgspec.structs.replace(anyhow.pieces[0], name="columns", begin=begin, shape=(6, 2))
    records["anyhow"] = msgspec.structs.replace(anyhow, dtype="float64", shape=(6, 2), pieces=(stolen,))
    changed = msgspec.structs.replace(manifest, tensors={**manifest.tensors, "model": records})
    (path / "manifest.json").write_bytes(manifests.encode(changed))
    with pytest.raises(CorruptCheckpointError, match=r"header and the manifest disagree .*model/columns"):
        holdfast.open(path).verify()
