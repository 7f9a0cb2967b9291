"""One checkpoint read into new values."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import CorruptCheckpointError, UsageError
from holdfast.format import codecs
from holdfast.format.dtypes import DTYPES
from holdfast.storage.local_reading import LocalFile

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def round_trip(path: Path, value: Any, **options: Any) -> Any:
    """Save and load one entry."""
    holdfast.save(path / "x", {"e": value})
    return holdfast.load(path / "x", **options)["e"]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.numel() == 0:
        return True
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)], ids=str)
def test_every_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Every bit of every element type, also without dimensions and without elements."""
    random = np.random.default_rng(0)
    state = {}
    for name, dtype in DTYPES.items():
        state[name] = torch.empty(shape, dtype=getattr(torch, name))
        if state[name].numel():
            high = 2 if name == "bool" else 256
            raw = random.integers(0, high, (state[name].numel() * dtype.itemsize,), np.uint8)
            state[name] = torch.from_numpy(raw).view(getattr(torch, name)).reshape(shape)
    loaded = round_trip(tmp_path, state)
    assert list(loaded) == list(state)
    assert [name for name in state if not same(loaded[name], state[name])] == []


def test_layouts(tmp_path: Path) -> None:
    """Values are logical; channels last comes back as that, other strides as contiguous."""
    base = torch.arange(48.0).reshape(2, 3, 2, 4)
    state = {
        "plain": base,
        "last": base.contiguous(memory_format=torch.channels_last),
        "last3d": torch.rand(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d),
        "transposed": base.permute(3, 2, 1, 0),
    }
    loaded = round_trip(tmp_path, state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded["last"].stride() == state["last"].stride()
    assert loaded["last3d"].stride() == state["last3d"].stride()
    assert loaded["transposed"].is_contiguous()


ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.arange(6.0).reshape(2, 3).T,
    np.array(3.5),
    np.empty((0, 2), np.float16),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["a", "ä😀"]),
    np.array([b"a", b"bc"]),
    np.array(["2026-01-01", "NaT"], "datetime64[D]"),
    np.array([1, 2], "timedelta64[ns]"),
    np.arange(3, dtype=">i4"),
    np.arange(3, dtype=np.longdouble),
    np.array("text"),
    np.empty((0,), "<U3"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype} {array.shape}")
def test_arrays(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    """Type, byte order, shape and bits."""
    loaded = round_trip(tmp_path, [array])[0]
    assert (loaded.dtype, loaded.dtype.str, loaded.shape) == (array.dtype, array.dtype.str, array.shape)
    assert loaded.tobytes() == array.tobytes()


def test_containers_keep_their_types(tmp_path: Path) -> None:
    """Values nested as they were saved, with tensors in any container."""
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    value = {
        "tuple": (1, [one, (two,)]),
        1: collections.OrderedDict(b=three, a=torch.zeros(1)),
        "deque": collections.deque([one, [two]], 5),
        "default": collections.defaultdict(list, {"x": [one]}),
        "counter": collections.Counter({30: 1}),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "torch": (torch.float16, torch.Size([1, 2]), torch.device("cuda:1")),
        "keys": {torch.Size([1]): 1, torch.int8: 2},
        "set": {torch.float16, (1, torch.Size([]))},
    }
    loaded = round_trip(tmp_path, value)
    assert repr(loaded) == repr(value)
    assert [type(item) for item in loaded.values()] == [type(item) for item in value.values()]
    assert loaded["deque"].maxlen == 5
    assert type(loaded["torch"][1]) is torch.Size


def test_tied_tensors_come_back_tied(tmp_path: Path) -> None:
    """One tensor under two names is one tensor; two equal ones are two."""
    one = torch.ones(2)
    loaded = round_trip(tmp_path, {"a": one, "b": [one], "c": torch.ones(2), "d": one[:], "e": one[:1]})
    assert loaded["a"] is loaded["b"][0]
    assert loaded["a"] is loaded["d"]
    assert loaded["c"] is not loaded["a"]
    assert loaded["e"].shape == (1,)


def test_values_are_new(tmp_path: Path) -> None:
    """Two loads share nothing with each other or with what was saved."""
    live = torch.zeros(2)
    holdfast.save(tmp_path / "x", {"e": live})
    first = holdfast.load(tmp_path / "x")
    first["e"].add_(1)
    assert holdfast.load(tmp_path / "x")["e"].tolist() == live.tolist() == [0, 0]


def test_modules_and_optimizers_are_dictionaries(tmp_path: Path) -> None:
    """A module as the dictionary of its tensors, an optimizer by parameter name; nothing of Holdfast's own."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(2)).backward()
    optimizer.step()
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    loaded = holdfast.load(tmp_path / "x")
    assert set(loaded) == {"model", "optimizer"}
    assert {name: tensor.tolist() for name, tensor in loaded["model"].items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    assert set(loaded["optimizer"]["state"]) == {"model.weight", "model.bias"}
    assert loaded["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_device(tmp_path: Path) -> None:
    """Tensors go where they are wanted, arrays stay numpy's."""
    loaded = round_trip(tmp_path, {"t": torch.ones(2), "n": np.ones(2)}, device="meta")
    assert loaded["t"].device.type == "meta"
    assert loaded["n"].tolist() == [1, 1]


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint to take parts of."""
    state = {
        "model": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)),
        "lists": {"a": [torch.ones(1), torch.ones(2)], "n": 5},
        "epoch": 3,
    }
    return Path(holdfast.save(tmp_path / "x", state).path)


def names(value: Any, path: str = "") -> list[str]:
    """The paths of all leaves."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in names(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in names(item, f"{path}[{index}]")]
    return [] if value is None else [path]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("model", ["/model/0.weight", "/model/0.bias", "/model/1.weight", "/model/1.bias"]),
        ("model/*", ["/model/0.weight", "/model/0.bias", "/model/1.weight", "/model/1.bias"]),
        ("model/0.*", ["/model/0.weight", "/model/0.bias"]),
        ("*/1.weight", ["/model/1.weight"]),
        (["epoch", "model/1.bias"], ["/model/1.bias", "/epoch"]),
        ("lists/a[[]1[]]", ["/lists/a[1]"]),
        ("lists/n", ["/lists/n"]),
    ],
)
def test_parts(saved: Path, only: Any, expected: list[str]) -> None:
    """What matches, nested as it was; positions in lists stay."""
    assert names(holdfast.load(saved, only=only)) == expected


@pytest.mark.parametrize("only", ["modell", "model/2.*", "_rng", ["model", "x"], ""])
def test_a_pattern_that_matches_nothing(saved: Path, only: Any) -> None:
    """A misspelt name is an error that lists the entries, not an empty dictionary."""
    with pytest.raises(UsageError, match=r"matches nothing.*its entries are: model, lists, epoch"):
        holdfast.load(saved, only=only)


def test_parts_read_only_what_they_need(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that nobody asked for, not a byte is read."""
    opened: list[str] = []
    read = LocalFile.read_into

    def spy(file: LocalFile, offset: int, buffer: memoryview) -> int:
        opened.append(Path(f"/proc/self/fd/{file._descriptor.fd}").readlink().name)
        return read(file, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", spy)
    holdfast.load(saved, only="epoch")
    assert set(opened) == {"manifest.json"}
    holdfast.load(saved, only="lists")
    assert set(opened) == {"manifest.json", "lists.safetensors"}


# ------------------------------------------------------------------------------------------------------------- codecs


@dataclasses.dataclass
class Average:
    """A type of the user's with tensors in it."""

    values: dict[str, torch.Tensor]
    array: np.ndarray[Any, Any]
    inner: Any = None


class Sum:
    """A type whose decoder computes with its tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.total = float(tensor.sum())


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both types, for one test."""
    monkeypatch.setattr(codecs, "_by_type", {})
    monkeypatch.setattr(codecs, "_by_name", {})
    holdfast.register_codec(Average, name="average")
    holdfast.register_codec(Sum, lambda value: value.tensor, Sum, name="sum")


@pytest.mark.usefixtures("registered")
def test_codecs_are_given_real_tensors(tmp_path: Path) -> None:
    """A decoder may compute with what it gets, nested codecs too, on the device that was asked for."""
    average = Average({"w": torch.arange(3.0)}, np.arange(4), Sum(torch.arange(5.0)))
    loaded = round_trip(tmp_path, {"a": [average]})["a"][0]
    assert type(loaded) is Average
    assert loaded.values["w"].tolist() == [0, 1, 2]
    assert loaded.array.tolist() == [0, 1, 2, 3]
    assert (loaded.inner.total, loaded.inner.tensor.tolist()) == (10.0, [0, 1, 2, 3, 4])


@pytest.mark.usefixtures("registered")
def test_codecs_are_restored_with_real_tensors(tmp_path: Path) -> None:
    """The same into a live state, whose value is replaced."""
    holdfast.save(tmp_path / "x", {"e": {"s": Sum(torch.arange(5.0)), "d": collections.deque([torch.ones(2)])}})
    live: dict[str, Any] = {"e": {"s": None, "d": None}}
    holdfast.restore(tmp_path / "x", live)
    assert live["e"]["s"].total == 10.0
    assert live["e"]["d"][0].tolist() == [1, 1]


@pytest.mark.usefixtures("registered")
def test_damage_under_a_codec_names_its_file(tmp_path: Path) -> None:
    """It is the data file that is damaged, not the manifest."""
    holdfast.save(tmp_path / "x", {"e": Sum(torch.arange(5.0))})
    file = tmp_path / "x/e.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(holdfast.errors.CorruptCheckpointError, match=r"e\.safetensors, chunk 0") as caught:
        holdfast.load(tmp_path / "x")
    assert [item.file for item in caught.value.damage] == ["e.safetensors"]


# ------------------------------------------------------------------------------------------------------- memory maps


def mapped_state() -> dict[str, Any]:
    """Tensors and arrays of several kinds, some of them without elements, two of them tied."""
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "weight": weight,
        "tied": weight,
        "half": torch.arange(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "last": torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        "array": np.arange(4, dtype=np.int16),
        "dates": np.array(["2026-01-02"], "datetime64[D]"),
        "plain": [1, "a"],
    }


def test_a_map_gives_the_same_values(tmp_path: Path) -> None:
    """Every tensor and array is what a verified load gives, and lies in the file."""
    holdfast.save(tmp_path / "x", {"e": mapped_state()})
    expected, found = (holdfast.load(tmp_path / "x", mmap=mmap)["e"] for mmap in (False, True))
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert same(found[name], value)
        elif isinstance(value, np.ndarray):
            assert (found[name].dtype, found[name].tolist()) == (value.dtype, value.tolist())
    assert found["plain"] == [1, "a"]
    assert found["tied"] is found["weight"]
    assert f"{tmp_path}/x/e.safetensors" in Path("/proc/self/maps").read_text()


def test_writing_to_a_map_changes_no_file(tmp_path: Path) -> None:
    """What is written is private, and the checkpoint stays intact."""
    holdfast.save(tmp_path / "x", {"w": torch.zeros(5), "a": np.zeros(3)})
    loaded = holdfast.load(tmp_path / "x", mmap=True)
    loaded["w"].fill_(1)
    loaded["a"][:] = 1
    assert (loaded["w"].tolist(), loaded["a"].tolist()) == ([1.0] * 5, [1.0] * 3)
    holdfast.open(tmp_path / "x").verify()
    assert holdfast.load(tmp_path / "x")["w"].tolist() == [0.0] * 5


def test_a_map_outlives_its_checkpoint(tmp_path: Path) -> None:
    """Retention may remove the checkpoint; the values stay."""
    holdfast.save(tmp_path / "x", {"w": torch.ones(5)})
    loaded = holdfast.load(tmp_path / "x", mmap=True)
    shutil.rmtree(tmp_path / "x")
    assert loaded["w"].tolist() == [1.0] * 5


def test_a_map_verifies_nothing_but_the_size(tmp_path: Path) -> None:
    """As it says: a changed byte goes unnoticed, a file that was cut does not."""
    holdfast.save(tmp_path / "x", {"w": torch.zeros(5, dtype=torch.uint8)})
    file = tmp_path / "x" / "w.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"\x01")
    assert holdfast.load(tmp_path / "x", mmap=True)["w"].tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(CorruptCheckpointError):
        holdfast.load(tmp_path / "x")
    file.write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpointError, match="has 4100 bytes, expected 4101"):
        holdfast.load(tmp_path / "x", mmap=True)


def test_parts_of_a_map(tmp_path: Path) -> None:
    """Patterns choose here too."""
    holdfast.save(tmp_path / "x", {"m": {"a": torch.ones(2), "b": torch.zeros(2)}})
    assert list(holdfast.load(tmp_path / "x", only="m/a", mmap=True)["m"]) == ["a"]


def test_a_map_lies_on_the_cpu(tmp_path: Path) -> None:
    """Another device is refused before anything is read."""
    with pytest.raises(UsageError, match="expected device='cpu', found 'cuda'"):
        holdfast.load(tmp_path / "x", device="cuda", mmap=True)
