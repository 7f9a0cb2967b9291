"""The layout of data files, against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from holdfast.errors import UsageError
from holdfast.format import safetensors
from holdfast.format.dtypes import CODE_ITEMSIZE, DTYPES

CODES = sorted(CODE_ITEMSIZE)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(CODES), SHAPES),
    max_size=8,
)


def image(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parse(data: bytes, file_bytes: int | None = None) -> safetensors.Layout:
    """Parse a whole file as a reader does: eight bytes, then the header."""
    total = len(data) if file_bytes is None else file_bytes
    return safetensors.parse(data[: safetensors.header_length(data[:8], total)], total)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(
    TENSORS,
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
)
def test_plan_parses_back(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    """What was planned is what the strict parser reads, from an aligned start and without holes."""
    layout = safetensors.plan([(name, code, shape) for name, (code, shape) in tensors.items()], metadata)
    assert len(layout.prefix) % safetensors.ALIGNMENT == 0
    parsed = safetensors.parse(layout.prefix, layout.nbytes)
    # Tensors without elements share a place, and may come in any order.
    assert sorted(parsed.tensors, key=lambda t: t.name) == sorted(layout.tensors, key=lambda t: t.name)
    assert parsed.metadata == metadata
    for tensor in layout.tensors:
        assert tensor.begin % CODE_ITEMSIZE[tensor.code] == 0


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_the_library_reads_every_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The safetensors library gives back names, shapes and bits of every element type, 0-dim and 0-element too."""
    layout = safetensors.plan(
        [(name, dtype.code, dtype.stored_shape(shape)) for name, dtype in DTYPES.items()], {"format": "pt", "a": "b"}
    )
    data = np.random.default_rng(0).integers(0, 2, layout.nbytes - len(layout.prefix), np.uint8).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(layout.prefix + data)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
        assert set(file.keys()) == set(DTYPES)
    loaded = load_file(path)
    for tensor in layout.tensors:
        begin = tensor.begin - len(layout.prefix)
        found = loaded[tensor.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert found == data[begin : begin + tensor.nbytes], tensor.name
        assert tuple(loaded[tensor.name].shape) == tensor.shape


def test_wider_elements_come_first() -> None:
    """Sorted by width, in the given order among equals."""
    layout = safetensors.plan([("a", "U8", (3,)), ("b", "F64", (1,)), ("c", "F16", (1,)), ("d", "I8", (1,))], {})
    assert [tensor.name for tensor in layout.tensors] == ["b", "c", "a", "d"]
    assert layout.nbytes == 4096 + 8 + 2 + 3 + 1


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_names_are_used_once(name: str) -> None:
    """A name twice, or the name of the metadata, cannot be planned."""
    with pytest.raises(UsageError, match="reserved or used twice"):
        safetensors.plan([("a", "F32", (1,)), (name, "F32", (1,))], {})


def test_a_header_past_the_librarys_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no reader would take is refused when it is planned."""
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 5000)
    with pytest.raises(UsageError, match="do not fit one safetensors header"):
        safetensors.plan([(f"{index:040d}", "F32", (1,)) for index in range(100)], {})


DATA = bytes(8)
BAD: dict[str, tuple[bytes, str]] = {
    "overlap": (image({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "a hole or an overlap"),
    "same place": (image({"a": entry(), "b": entry()}, DATA), "a hole or an overlap"),
    "hole": (image({"a": entry(offsets=(4, 12))}, bytes(12)), "a hole or an overlap"),
    "hole at the end": (image({"a": entry()}, bytes(9)), "the tensors end at"),
    "too short": (image({"a": entry()}, bytes(7)), "the tensors end at"),
    "backwards": (image({"a": entry(offsets=(8, 0))}, DATA), "do not hold"),
    "before the data": (image({"a": entry(offsets=(-8, 0))}, DATA), "do not hold"),
    "negative size": (image({"a": entry(shape=(-2,))}, DATA), "negative size"),
    "two negatives": (image({"a": entry(shape=(-1, -2))}, DATA), "negative size"),
    "wrong size": (image({"a": entry(shape=(3,))}, DATA), "do not hold"),
    "overflow": (image({"a": entry(shape=(2**62, 4), offsets=(0, 0))}), "do not hold"),
    "bad dtype": (image({"a": entry("F33")}, DATA), "unknown dtype"),
    "unknown field": (image({"a": {**entry(), "x": 1}}, DATA), "not the JSON expected"),
    "missing field": (image({"a": {"dtype": "F32", "shape": [2]}}, DATA), "not the JSON expected"),
    "three offsets": (image({"a": entry(offsets=(0, 4, 8))}, DATA), "not the JSON expected"),
    "float offsets": (image({"a": entry(offsets=(0, 8.5))}, DATA), "not the JSON expected"),
    "duplicate name": (image(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), DATA), "duplicate key"),
    "duplicate field": (
        image(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', DATA),
        "duplicate key",
    ),
    "metadata not text": (image({"__metadata__": {"a": 1}}), "not the JSON expected"),
    "a list": (image([]), "does not start with"),
    "leading space": (image(b" {}"), "does not start with"),
    "not JSON": (image(b"{nonsense}"), "not the JSON expected"),
    "not UTF-8": (image(b'{"\xff":1}'), "not the JSON expected"),
    "depth": (image(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not the JSON expected"),
    "length past the end": (image({}, length=3), "claims 3 bytes"),
    "huge length": (image({}, length=2**64 - 1), "claims"),
    "empty file": (b"", "at least 8 bytes"),
    "seven bytes": (bytes(7), "at least 8 bytes"),
    "no header": (bytes(8), "does not start with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str) -> None:
    """Whatever does not describe the file exactly is a ValueError that says what is wrong."""
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        parse(data)


def test_the_header_must_be_given_whole() -> None:
    """A prefix of another length than it claims is not parsed."""
    data = image({"a": entry()}, DATA)
    with pytest.raises(ValueError, match="does not match"):
        safetensors.parse(data, len(data))


@given(st.binary(max_size=200))
def test_noise_is_a_value_error(noise: bytes) -> None:
    """Random bytes never raise anything else, and hold no tensor where they happen to be a header, such as ``{}``."""
    try:
        layout = parse(image(noise))
    except ValueError:
        return
    assert layout.tensors == ()
