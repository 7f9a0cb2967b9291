"""Cells: where each lies, whose cells a file holds, and what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.sharded import grid

from holdfast.format.cells import Box, Cell, CellTable, cell_at, cells, check_cells, count
from holdfast.format.records import FileRecord, Piece, TensorRecord
from holdfast.storage.boxes import overlap


@st.composite
def cut(draw: st.DrawFn) -> TensorRecord:
    """A tensor that is cut into cells."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    return TensorRecord("float32", shape, cell=tuple(draw(st.integers(1, size)) for size in shape), layout="l")


@given(cut())
def test_all_cells(record: TensorRecord) -> None:
    """They are those of the definition, in row-major order."""
    expected = [Cell(number, *box) for number, box in enumerate(grid(record.shape, record.cell))]
    assert list(cells(record)) == expected
    assert [cell_at(record, number) for number in range(count(record))] == expected


@given(cut(), st.data())
def test_cells_that_meet_a_box(record: TensorRecord, data: st.DataObject) -> None:
    """Those that have elements in common with it; none for a box without elements."""
    offset = tuple(data.draw(st.integers(0, size)) for size in record.shape)
    box: Box = (
        offset,
        tuple(data.draw(st.integers(0, size - at)) for size, at in zip(record.shape, offset, strict=True)),
    )
    expected = [cell for cell in cells(record) if overlap(cell.offset, cell.shape, *box)]
    assert list(cells(record, box)) == expected


def test_cells_of_a_box_are_not_looked_for_among_all() -> None:
    """A process of a million finds its own at once."""
    record = TensorRecord("float32", (2**40, 8), cell=(1, 8), layout="l")
    assert list(cells(record, ((2**39, 0), (1, 8)))) == [Cell(2**39, (2**39, 0), (1, 8))]


# ---------------------------------------------------------------------------------------------------------- what may be

FILES = {name: FileRecord(1000, 4096, ("f" * 32,)) for name in ("m-1.safetensors", "m-2.safetensors", "n.safetensors")}
FILES["m.safetensors.index.json"] = FileRecord(10, 4096, ("f" * 32,))
LAYOUTS = {"m": ("m-1.safetensors", "m-2.safetensors"), "n": ("n.safetensors",)}
RECORD = TensorRecord("float32", (3, 2), cell=(2, 2), layout="m")


def tensors(**changes: Any) -> dict[str, dict[str, TensorRecord]]:
    """Two entries with cells, the first of which is changed."""
    return {
        "m": {"w": msgspec.structs.replace(RECORD, **changes)},
        "n": {"w": TensorRecord("uint8", (2,), (), cell=(2,), layout="n")},
    }


def test_what_may_be() -> None:
    """More files than cells, cells of the whole size, and one name in two entries."""
    check_cells(tensors(), LAYOUTS, FILES)
    check_cells(tensors(shape=(2, 2)), LAYOUTS, FILES)


PIECE = Piece("m-1.safetensors", "w", 0, (3, 2))
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"pieces": (PIECE,)}, "m/w: has both pieces and cells"),
    "no cell": ({"cell": ()}, "m/w: cells of shape () in (3, 2), expected from 1 to its size in each dimension"),
    "fewer dimensions": ({"cell": (2,)}, "m/w: cells of shape (2,) in (3, 2)"),
    "more dimensions": ({"cell": (2, 2, 1)}, "m/w: cells of shape (2, 2, 1) in (3, 2)"),
    "a scalar": ({"shape": (), "cell": ()}, "m/w: cells of shape () in ()"),
    "of no size": ({"cell": (0, 2)}, "m/w: cells of shape (0, 2) in (3, 2)"),
    "negative": ({"cell": (-1, 2)}, "m/w: cells of shape (-1, 2) in (3, 2)"),
    "larger than the tensor": ({"cell": (4, 2)}, "m/w: cells of shape (4, 2) in (3, 2)"),
    "without elements": ({"shape": (0, 2), "cell": (1, 2)}, "m/w: cells of shape (1, 2) in (0, 2)"),
    "no layout": ({"layout": ""}, "m/w: its layout '' is not one of the manifest"),
    "unknown layout": ({"layout": "x"}, "m/w: its layout 'x' is not one of the manifest"),
    "another's layout": ({"layout": "n", "cell": (3, 2)}, "n/w: its layout 'n' is one of m"),
    "more cells than files": ({"cell": (1, 2)}, "m/w: has 3 cells, its layout 'm' only 2 files"),
    "larger than its files": (
        {"shape": (1001, 1), "cell": (501, 1)},
        "m/w: has 4004 bytes, the files of its cells only 2000",
    ),
    "larger than its file": (
        {"shape": (251, 1), "cell": (251, 1)},
        "m/w: has 1004 bytes, the files of its cells only 1000",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_cannot_be(name: str) -> None:
    """Each is said in words."""
    changes, words = WRONG[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        check_cells(tensors(**changes), LAYOUTS, FILES)
    assert words in str(caught.value)


def test_cells_that_weigh_more_than_the_files() -> None:
    """Each may fit, and all together not: no byte is that of two."""
    several = {"m": {f"w{number}": TensorRecord("uint8", (1900,), cell=(950,), layout="m") for number in range(2)}}
    with pytest.raises(ValueError, match="m/w1: the cells have more bytes than all files"):
        check_cells(several, {"m": LAYOUTS["m"]}, FILES)


def test_more_cells_than_headers_can_tell_of() -> None:
    """Each takes a few bytes of a header: not as many as one likes are those of short files."""
    several = {"m": {f"w{number}": TensorRecord("uint8", (2,), cell=(1,), layout="m") for number in range(60)}}
    check_cells(
        {"m": dict(list(several["m"].items())[:24])},
        {"m": LAYOUTS["m"]},
        {"m-1.safetensors": FILES["n.safetensors"], "m-2.safetensors": FILES["n.safetensors"]},
    )
    with pytest.raises(ValueError, match="the cells have more bytes than all files"):
        check_cells(several, {"m": LAYOUTS["m"]}, FILES)


WRONG_LAYOUTS: dict[str, tuple[dict[str, tuple[str, ...]], str]] = {
    "unknown file": (
        {"m": ("x.safetensors", "m-1.safetensors")},
        "the layout 'm' has 'x.safetensors', which the manifest",
    ),
    "an index": ({"m": ("m.safetensors.index.json",)}, "the layout 'm' has m.safetensors.index.json, which holds no"),
    "a file twice": ({"m": ("m-1.safetensors",) * 2}, "the layout 'm' has a file twice"),
    "nobody's": ({"x": ("m-1.safetensors",)}, "the layout 'x' is that of no tensor"),
    "nobody's and empty": ({"": ()}, "the layout '' is that of no tensor"),
    "of two entries": ({"n": ("m-1.safetensors",)}, "m-1.safetensors holds cells of both m and n"),
}


@pytest.mark.parametrize("name", WRONG_LAYOUTS)
def test_layouts_that_cannot_be(name: str) -> None:
    """Each is said in words."""
    changes, words = WRONG_LAYOUTS[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        check_cells(tensors(), LAYOUTS | changes, FILES)
    assert words in str(caught.value)


# -------------------------------------------------------------------------------------------- whose cells a file has


def test_whose_cells_a_file_has() -> None:
    """Those of each layout that lists it, of tensors with so many cells; by number in the manifest."""
    records = {
        "one": TensorRecord("uint8", (4,), cell=(4,), layout="a"),
        "whole": TensorRecord("uint8", (4,), (Piece("f0", "whole", 0, (4,)),)),
        "three": TensorRecord("uint8", (5,), cell=(2,), layout="a"),
        "two": TensorRecord("uint8", (4,), cell=(2,), layout="b"),
    }
    table = CellTable({"e": records}, {"a": ("f0", "f1", "f2"), "b": ("f2", "f1")})
    held = {
        file: [(member.number, member.key, cell, member.nbytes(cell)) for member, cell in table.held(file)]
        for file in ("f0", "f1", "f2", "f3")
    }
    assert held == {
        "f0": [(2, "e/three", 0, 2), (0, "e/one", 0, 4)],
        "f1": [(2, "e/three", 1, 2), (3, "e/two", 1, 2)],
        "f2": [(2, "e/three", 2, 1), (3, "e/two", 0, 2)],
        "f3": [],
    }
    assert [file in table for file in held] == [True, True, True, False]
