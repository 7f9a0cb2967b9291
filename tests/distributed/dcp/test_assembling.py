"""What the ranks wrote, put together: what does not fit is refused before it is committed."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from holdfast.distributed.dcp.assembling import assemble
from holdfast.distributed.dcp.writing import Written, shares
from holdfast.errors import UsageError
from holdfast.format.records import FileRecord, Piece, TensorRecord


def metadata(*names: str) -> Metadata:
    """Of tensors of four elements, each in halves."""
    halves = [ChunkStorageMetadata(torch.Size([at]), torch.Size([2])) for at in (0, 2)]
    return Metadata(
        {name: TensorStorageMetadata(TensorProperties(), torch.Size([4]), halves) for name in names},
        planner_data={name: tuple(name.split(".", 1)) for name in names},
    )


def written(rank: int, name: str, dtype: str = "float32", begin: int = 4096) -> Written:
    """The half of a tensor that a rank wrote."""
    file = f"x-{rank + 1:05d}-of-00002.safetensors"
    record = TensorRecord(dtype, (2,), (Piece(file, name, begin, (2,), (2 * rank,)),))
    return Written(files={file: FileRecord(5000, 2**21, ("0" * 32,))}, boxes=[(f"x.{name}", record)])


def test_pieces_of_all_ranks_are_one_tensor() -> None:
    """In the place that its name gives it."""
    made = assemble(metadata("x.a"), [written(0, "a"), written(1, "a")])

    assert made.state == {"x": {"a": {"$tensor": "a"}}, "_dcp": {"flattened": True}}
    assert made.tensors["x"]["a"].shape == (4,)
    assert [piece.offset for piece in made.tensors["x"]["a"].pieces] == [(0,), (2,)]


def test_what_is_cut_has_no_index() -> None:
    """Other tools would take a part of a tensor for all of it."""
    [(_, half)] = written(1, "b", begin=4104).boxes
    whole = Written(boxes=[("x.b", msgspec.structs.replace(half, shape=(4,), pieces=(_all_of(half.pieces[0]),)))])

    assert assemble(metadata("x.a", "x.b"), [written(0, "a"), written(1, "a"), whole]).indexes == {}


def _all_of(piece: Piece) -> Piece:
    return msgspec.structs.replace(piece, shape=(4,), offset=())


def item(size: int) -> WriteItem:
    """One to write so many of four elements."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([size]))
    data = TensorWriteData(chunk, TensorProperties(), torch.Size([4]))
    return WriteItem(MetadataIndex("x.a", [0]), WriteItemType.SHARD, tensor_data=data)


@pytest.mark.parametrize(("size", "alone"), [(4, {"x"}), (2, set())], ids=["whole", "cut"])
def test_a_plain_file_is_for_whole_tensors(size: int, alone: set[str]) -> None:
    """Of one rank alone."""
    found = shares([SavePlan([item(size)], planner_data={"x.a": ("x", "a")}), SavePlan([])])

    assert [share.alone for share in found] == [alone, frozenset()]


PARTS = {
    "nothing": ([], r"x\.a: .*none"),
    "a half": ([written(0, "a")], "cover 2 elements"),
    "a half twice": ([written(0, "a"), written(0, "a", begin=4104)], "overlap"),
    "two dtypes": ([written(0, "a"), written(1, "a", "int32")], r"x\.a: .*float32, int32"),
}


@pytest.mark.parametrize(("parts", "message"), PARTS.values(), ids=PARTS.keys())
def test_what_is_not_all_of_it_is_refused(parts: list[Written], message: str) -> None:
    """A reader would find out; then it would be too late."""
    with pytest.raises(UsageError, match=message):
        assemble(metadata("x.a"), parts)


def test_two_tensors_of_one_name_are_refused() -> None:
    """One that is within a value may have the name of another."""
    inner = written(0, "a[0]").boxes[0][1]
    parts = [written(0, "a[0]"), written(1, "a[0]"), Written(tensors={"x": {"a[0]": inner}})]

    with pytest.raises(UsageError, match=r"two tensors would be 'a\[0\]' of 'x'"):
        assemble(metadata("x.a[0]"), parts)
