"""Boxes of tensors to their places in a file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.storage import memory
from holdfast.storage.boxes import box_of
from holdfast.storage.scattering import BoxWriter, ScatteredFile


@given(st.data())
def test_a_box_in_any_pieces(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Its bytes, in any order and torn anywhere, come to where they belong, and nothing else is touched."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(data.draw(st.integers(1, whole - at)) for whole, at in zip(shape, offset, strict=True))
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "f4", "c16"])))
    values = np.random.default_rng(1).integers(1, 99, size).astype(dtype)
    whole = np.zeros(shape, dtype)
    box_of(whole, offset, size)[...] = values
    path = tmp_path_factory.mktemp("box") / "file"
    with ScatteredFile(str(path), 10 + whole.nbytes) as file:
        writer = BoxWriter(file, 10, dtype.itemsize, shape, offset if any(offset) else (), size)
        deliver(writer, values.tobytes(), data.draw(st.lists(st.integers(0, 10_000), max_size=8)))
        file.publish()
    assert path.read_bytes() == bytes(10) + whole.tobytes()


def deliver(writer: BoxWriter, data: bytes, cuts: Sequence[int]) -> None:
    """Give it the pieces between the cuts, in some order."""
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = list(itertools.pairwise(borders))
    random.Random(0).shuffle(pieces)
    for begin, end in pieces:
        buffer = memoryview(bytearray(data[begin:end]))
        writer(begin, memory.address_of(buffer), len(buffer))


def test_what_lies_together_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a tensor are one write, however many they are; columns one for each row."""
    writes: list[tuple[int, int]] = []
    monkeypatch.setattr(ScatteredFile, "write", lambda self, at, data: writes.append((at, len(data))))
    with ScatteredFile(str(tmp_path / "file"), 1000) as file:
        deliver(BoxWriter(file, 100, 4, (6, 5), (2, 0), (3, 5)), bytes(60), [])
        deliver(BoxWriter(file, 100, 4, (6, 5), (0, 3), (2, 2)), bytes(16), [])
    assert writes == [(140, 60), (112, 8), (132, 8)]


def test_until_it_is_whole_it_is_not_there(tmp_path: Path) -> None:
    """It has a hidden name, and no name at all when it is given up."""
    with ScatteredFile(str(tmp_path / "file"), 3) as file:
        file.write(0, memoryview(b"abc"))
        (hidden,) = tmp_path.iterdir()
        assert hidden.name.startswith(".holdfast-export-")
        assert hidden.stat().st_size == 3
    assert list(tmp_path.iterdir()) == []
