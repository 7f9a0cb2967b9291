"""The image of a data file over live tensors."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.records import FileRecord
from holdfast.state.capture import capture
from holdfast.state.image import StateImage

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def image_of(
    values: Mapping[str, Any], left_out: Container[str] = (), *, header: bool = True
) -> tuple[StateImage, safetensors.Layout]:
    """The image of a file of these tensors and arrays, perhaps without some, and where they lie in it."""
    tensors = capture({"e": dict(values)})["e"].tensors
    forms = [(name, DTYPES[item.dtype]) for name, item in tensors.items()]
    layout = safetensors.plan(
        [(name, dtype.code, dtype.stored_shape(tensors[name].shape)) for name, dtype in forms], {}
    )
    present = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    return StateImage(layout, present, header=header), layout


def read(image: StateImage, cuts: Sequence[int] = ()) -> bytes:
    """All bytes of an image, read in the parts between ``cuts``, the last one first."""
    data = memoryview(bytearray(image.nbytes))
    borders = sorted({0, image.nbytes, *(cut for cut in cuts if cut < image.nbytes)})
    for begin, end in reversed(list(itertools.pairwise(borders))):
        room = memoryview(bytearray(end - begin))
        data[begin:end] = image.read(begin, room)
    return bytes(data)


def raw(value: torch.Tensor | np.ndarray[Any, Any]) -> bytes:
    """The bytes of the values in logical order."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    plain = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def expected_of(values: Mapping[str, torch.Tensor | np.ndarray[Any, Any]], layout: safetensors.Layout) -> bytes:
    """The bytes of the file, by the layout's own order."""
    return layout.prefix + b"".join(raw(values[stored.name]) for stored in layout.tensors)


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits, but for the type that has only two values."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    data = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


FLOAT, COMPLEX = torch.float32, torch.complex64
LAYOUTS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: random_tensor(FLOAT, 3, 4),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(3, 4)),
    "transposed": lambda: random_tensor(FLOAT, 3, 4).t(),
    "permuted": lambda: random_tensor(FLOAT, 2, 3, 4).permute(1, 2, 0),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 2).contiguous(memory_format=torch.channels_last_3d),
    "expanded": lambda: random_tensor(FLOAT, 1, 4).expand(3, 4),
    "every other": lambda: random_tensor(FLOAT, 20)[::2],
    "a column": lambda: random_tensor(FLOAT, 6, 5)[:, 2],
    "a row": lambda: random_tensor(FLOAT, 6, 5)[2],
    "overlapping": lambda: random_tensor(FLOAT, 10).unfold(0, 4, 1),
    "conj": lambda: random_tensor(COMPLEX, 3, 4).conj(),
    "conj and transposed": lambda: random_tensor(COMPLEX, 3, 4).mH,
    "neg": lambda: torch._neg_view(torch.randn(3, 4)),
    "the imaginary part of a conj": lambda: random_tensor(COMPLEX, 5).conj().imag,
    "the real part": lambda: random_tensor(COMPLEX, 5).real,
    "without dimensions": lambda: torch.tensor(1.5),
    "without dimensions, conj": lambda: torch.tensor(1 + 2j).conj(),
    "empty": lambda: torch.empty(0, 3),
    "empty and transposed": lambda: torch.empty(0, 3).t(),
    "one element of many": lambda: random_tensor(FLOAT, 4, 4)[1:2, 1:2],
    "array": lambda: np.arange(12.0).reshape(3, 4),
    "transposed array": lambda: np.arange(24.0).reshape(2, 3, 4).T,
    "array in Fortran's order": lambda: np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
    "array backwards": lambda: np.arange(12)[::-1],
    "every other of an array": lambda: np.arange(24, dtype=np.complex128).reshape(4, 6)[::2, ::3],
    "array without dimensions": lambda: np.array(3.5),
    "empty array": lambda: np.empty((0, 2)),
    "broadcast array": lambda: np.broadcast_to(np.arange(3), (4, 3)),
    "read-only array": lambda: np.frombuffer(b"abcdefgh", np.uint8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logical_values_in_any_layout(layout: str) -> None:
    """What the tensor shows, in row-major order, however it lies in memory."""
    values = {"t": LAYOUTS[layout]()}
    image, planned = image_of(values)
    assert read(image) == expected_of(values, planned)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_dtype_bit_for_bit(name: str, transposed: bool) -> None:
    """Random bits, among them all kinds of NaN."""
    tensor = random_tensor(getattr(torch, name), 7, 5)
    values = {"t": tensor.t() if transposed else tensor}
    image, planned = image_of(values)
    assert read(image) == expected_of(values, planned)


@given(cuts=st.lists(st.integers(0, 600), max_size=10))
def test_all_layouts_in_one_file_read_in_parts(cuts: list[int]) -> None:
    """In parts that begin at any multiple of 8 bytes; elements of 16 may be cut."""
    torch.manual_seed(0)
    values = {name: make() for name, make in LAYOUTS.items()}
    image, planned = image_of(values)
    head = len(planned.prefix)
    assert read(image, [head - 160 + 8 * cut for cut in cuts]) == expected_of(values, planned)


def wide(order: str) -> torch.Tensor | np.ndarray[Any, Any]:
    """More complex numbers of 16 bytes than are written at a time."""
    values = np.arange(300_002).astype(np.complex128).reshape(2, -1)
    return values.T if order == "array" else torch.from_numpy(values).t()


@pytest.mark.parametrize("order", ["array", "tensor"])
def test_elements_that_a_part_of_a_file_cuts(order: str, tmp_path: Path) -> None:
    """Complex128 is stored as pairs of eight bytes, and begins behind an odd number of others."""
    holdfast.save(tmp_path / "x", {"s": {"first": np.arange(3), "wide": wide(order)}})
    record = holdfast.open(tmp_path / "x").manifest.record("s", "wide")
    assert record.pieces[0].begin % 16 == 8
    live = {"s": {"first": np.zeros(3, np.int64), "wide": wide(order) * 0}}
    holdfast.restore(tmp_path / "x", live)
    assert (live["s"]["wide"] == wide(order)).all()


@given(cuts=st.lists(st.integers(0, 9000), max_size=10))
def test_what_lies_in_order_is_read_from_any_byte(cuts: list[int]) -> None:
    """Header and flat tensors may be cut anywhere."""
    values = {
        "a": torch.arange(500.0),
        "b": np.arange(300),
        "c": torch.arange(7, dtype=torch.uint8),
        "d": torch.ones(()),
    }
    image, planned = image_of(values)
    assert read(image, cuts) == expected_of(values, planned)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    steps=st.lists(st.integers(1, 2), min_size=4, max_size=4),
    name=st.sampled_from(sorted(DTYPES)),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_any_strides_in_any_parts(
    shape: list[int], order: list[int], steps: list[int], name: str, cuts: list[int]
) -> None:
    """Permuted and with gaps: the same bytes, whatever part is asked for first."""
    torch.manual_seed(0)
    axes = [axis for axis in order if axis < len(shape)]
    stored = random_tensor(getattr(torch, name), *shape)
    values = {"t": stored.permute(axes)[tuple(slice(None, None, step) for step in steps[: len(shape)])]}
    image, planned = image_of(values)
    assert read(image, [len(planned.prefix) + 16 * cut for cut in cuts]) == expected_of(values, planned)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    steps=st.lists(st.sampled_from([-2, -1, 1, 2]), min_size=4, max_size=4),
    name=st.sampled_from(["?", "i2", "f4", "f8", "c16"]),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_any_strides_of_an_array_in_any_parts(
    shape: list[int], order: list[int], steps: list[int], name: str, cuts: list[int]
) -> None:
    """The same for numpy, which also has negative strides."""
    axes = [axis for axis in order if axis < len(shape)]
    stored = np.arange(math.prod(shape)).reshape(shape).astype(name)
    values = {"t": stored.transpose(axes)[tuple(slice(None, None, step) for step in steps[: len(shape)])]}
    image, planned = image_of(values)
    assert read(image, [len(planned.prefix) + 16 * cut for cut in cuts]) == expected_of(values, planned)


def test_large_rows_are_cut_too() -> None:
    """Parts that are smaller than a row of the first dimension, or hold some rows and two ends of others."""
    value = torch.arange(3 * 5 * 70_000, dtype=torch.int32).reshape(3, 5, 70_000).transpose(1, 2)
    image, planned = image_of({"t": value})
    assert read(image, range(0, image.nbytes, 2**18)) == expected_of({"t": value}, planned)


def test_the_values_are_those_of_the_moment() -> None:
    """It holds the live tensor, not a copy."""
    values = {"t": torch.zeros(4), "u": torch.zeros(2, 3).t(), "n": np.zeros((2, 3)).T}
    image, planned = image_of(values)
    for value in values.values():
        value[...] = 7
    assert read(image) == expected_of(values, planned)


def test_parts_are_gathered_in_the_room_given() -> None:
    """Nothing is allocated for them."""
    image, _ = image_of({"t": torch.arange(10.0)})
    room = memoryview(bytearray(image.nbytes))
    assert image.read(0, room).obj is room.obj


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("left_out", ["a", "b", "c"])
def test_what_is_left_out_is_left_untouched(left_out: str, header: bool) -> None:
    """Another image may have put it there, or will."""
    values = {"a": torch.ones(5), "b": torch.ones(3, 4).t(), "c": np.ones(6, np.float32)}
    image, planned = image_of(values, left_out, header=header)
    room = memoryview(bytearray(b"\xaa" * image.nbytes))
    image.read(0, room)
    expected = bytearray(expected_of(values, planned))
    gaps = [(item.begin, item.begin + item.nbytes) for item in planned.tensors if item.name == left_out]
    for begin, end in gaps if header else [*gaps, (0, len(planned.prefix))]:
        expected[begin:end] = b"\xaa" * (end - begin)
    assert bytes(room) == bytes(expected)


@pytest.mark.parametrize("chunk_bytes", [4096, 5008, 2**20])
@pytest.mark.parametrize("small", [0, 3, 40])
def test_digests_are_those_of_the_bytes(
    record_of: Callable[[bytes, int], FileRecord], chunk_bytes: int, small: int
) -> None:
    """Of few tensors or many, flat or not, without writing them anywhere."""
    values = {f"s{index}": torch.full((small,), float(index)) for index in range(small)}
    values |= {"flat": torch.arange(3000.0), "other": torch.arange(3000.0).reshape(50, 60).t()}
    for present in (values, {name: value for name, value in values.items() if name != "other"}):
        image, planned = image_of(present)
        assert image.digests(chunk_bytes) == record_of(expected_of(present, planned), chunk_bytes).xxh3_128


def test_several_threads_read_one_image() -> None:
    """Different parts at the same time."""
    values = {"t": torch.arange(6 * 10_000.0).reshape(6, 10_000).t(), "n": np.arange(60_000).reshape(3, -1).T}
    image, planned = image_of(values)
    data = memoryview(bytearray(image.nbytes))
    begin_together = threading.Barrier(4, timeout=60)
    borders = [0, *(image.nbytes * quarter // 64 * 16 for quarter in (1, 2, 3)), image.nbytes]

    def work(begin: int, end: int) -> None:
        begin_together.wait()
        for at in range(begin, end, 4096):
            image.read(at, data[at : min(at + 4096, end)])

    threads = [threading.Thread(target=work, args=pair) for pair in itertools.pairwise(borders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(data) == expected_of(values, planned)


def test_a_file_without_tensors() -> None:
    """Its header is all there is."""
    image, planned = image_of({})
    assert read(image) == planned.prefix
