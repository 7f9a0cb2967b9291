"""Checkpoints that were written once and must be read for ever."""

from __future__ import annotations

import enum
import importlib.util
import json
import math
import shutil
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import holdfast
from holdfast.format import codecs
from holdfast.format.dtypes import DTYPES
from holdfast.run import Run

GOLDEN = Path(__file__).parent / "golden"

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Color(enum.Enum):
    """The type that the checkpoint calls ``golden.Color``."""

    RED = 1


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the run, so that nothing can touch the original."""
    monkeypatch.setattr(codecs, "_by_type", {})
    monkeypatch.setattr(codecs, "_by_name", {})
    holdfast.register_codec(Color, name="golden.Color")
    return Run(shutil.copytree(GOLDEN / "format-1", tmp_path / "format-1"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The script that made it; its values are the expected ones, restated below where an accident could hide."""
    spec = importlib.util.spec_from_file_location("make_format_1", GOLDEN / "make_format_1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_small() -> None:
    """A golden checkpoint lies in the repository for ever."""
    sizes = [path.stat().st_size for path in (GOLDEN / "format-1").rglob("*") if path.is_file()]
    assert sum(sizes) < 100_000


def test_it_is_intact(golden: Run) -> None:
    """Every byte is as it was written, and it says what it was given."""
    checkpoint = golden[1200]
    checkpoint.verify()
    metrics = checkpoint.metrics
    assert math.isnan(metrics.pop("later"))
    assert metrics == {"val_loss": 0.5, "best": math.inf}
    assert (checkpoint.step, checkpoint.epoch, checkpoint.reason, checkpoint.pinned) == (1200, 3, "golden", True)
    assert checkpoint.manifest.format == "holdfast/1"


def test_values(golden: Run, maker: ModuleType) -> None:
    """Every type of the typed tree, exact."""
    loaded = holdfast.load(golden[1200].path, only="values")["values"]
    expected = {**maker.values(), "codec": Color.RED}
    payloads = [struct.pack(">d", value["floats"].pop()).hex() for value in (loaded, expected)]
    assert payloads == ["7ff8000000000123"] * 2
    assert loaded == expected
    assert list(loaded) == list(expected)
    assert repr(loaded["plain"]) == repr(expected["plain"])
    for name, value in expected.items():
        assert type(loaded[name]) is type(value), name
        if isinstance(value, list):
            assert list(map(type, loaded[name])) == list(map(type, value)), name
    assert (loaded["default"].default_factory, loaded["deque"].maxlen, loaded["times"][0].fold) == (list, 5, 1)
    assert loaded["times"][0].tzinfo.key == "Europe/Berlin"
    assert str(loaded["complex"]) == "(-0+2j)"


def test_tensors(golden: Run) -> None:
    """Every element type, bit for bit."""
    loaded = holdfast.load(golden[1200].path, only="tensors")["tensors"]
    assert set(loaded) == {*DTYPES, "scalar", "empty"}
    for name in set(DTYPES) - {"bool"}:
        assert loaded[name].dtype == getattr(torch, name)
        assert loaded[name].view(torch.uint8).tolist() == list(range(16)), name
    assert loaded["bool"].tolist() == [True, False]
    assert (loaded["scalar"].shape, loaded["scalar"].item()) == ((), 3)
    assert loaded["empty"].shape == (0, 3)


def test_arrays(golden: Run) -> None:
    """Numpy's, with their byte order."""
    loaded = holdfast.load(golden[1200].path, only="arrays")["arrays"]
    described = {name: (array.dtype.str, array.tolist()) for name, array in loaded.items()}
    assert described == {"plain": ("<i2", [0, 1, 2]), "text": ("<U2", ["a", "bc"]), "big": (">i4", [0, 1])}


WEIGHT = [[-1.0625, -0.9375], [-0.8125, -0.6875], [-0.5625, -0.4375], [-0.3125, -0.1875]]
BIAS = [-2.125, -1.125, -0.125, 0.875]


def test_model_and_optimizer(golden: Run) -> None:
    """Names, tied weights, moments by name, and a scheduler's milestones."""
    loaded = holdfast.load(golden[1200].path, only=["model", "optimizer", "scheduler"])
    model: dict[str, Any] = loaded["model"]
    assert {name: tensor.tolist() for name, tensor in model.items()} == {
        "embed.weight": WEIGHT,
        "out.weight": WEIGHT,
        "out.bias": BIAS,
        "steps": 7,
    }
    assert model["out.weight"] is model["embed.weight"]
    momenta = {key: state["momentum_buffer"].flatten().tolist() for key, state in loaded["optimizer"]["state"].items()}
    assert momenta == {"model.embed.weight": [1.75] * 8, "model.out.bias": [3.5] * 4}
    (group,) = loaded["optimizer"]["param_groups"]
    assert (group["lr"], group["momentum"], group["params"]) == (
        0.125,
        0.5,
        ["model.embed.weight", "model.out.bias"],
    )
    assert dict(loaded["scheduler"]["milestones"]) == {2: 1, 4: 1}
    assert loaded["scheduler"]["last_epoch"] == 2


def test_it_restores(golden: Run, maker: ModuleType) -> None:
    """Into live objects, generators included."""
    torch.manual_seed(123)
    live = {**maker.state(), "values": maker.values()}
    with torch.no_grad():
        for parameter in live["model"].parameters():
            parameter.zero_()
    report = holdfast.restore(golden[1200], live)
    assert not report.missing
    assert live["model"].embed.weight.tolist() == maker.state()["model"].embed.weight.tolist()
    assert live["model"].out.weight is live["model"].embed.weight
    assert live["optimizer"].param_groups[0]["lr"] == 0.125
    assert live["values"]["codec"] is Color.RED
    assert np.array_equal(live["arrays"]["plain"], [0, 1, 2])


# ------------------------------------------------------------------------------------------------------- shared files


@pytest.fixture
def shared(tmp_path: Path) -> Run:
    """A copy of the run whose checkpoints share a file."""
    return Run(shutil.copytree(GOLDEN / "format-1-shared", tmp_path / "format-1-shared"))


def test_checkpoints_that_share_a_file(shared: Run) -> None:
    """Both are intact, complete, and have the shared bytes under the shared name."""
    first, second = shared
    for checkpoint in (first, second):
        checkpoint.verify()
        assert sorted(checkpoint.files) == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "x.safetensors",
        ]
    name = "model-00001-of-00002.safetensors"
    assert first.files[name] == second.files[name]
    for step, checkpoint in ((1.0, first), (2.0, second)):
        loaded = holdfast.load(checkpoint.path)
        assert {key: value.tolist() for key, value in loaded["model"].items()} == {
            "backbone.weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
            "backbone.bias": [0.5, -0.5],
            "adapter.weight": [[step, step], [step, step]],
            "adapter.bias": [-step, -step],
            "tied.weight": [[step, step], [step, step]],
        }
        assert loaded["model"]["tied.weight"] is loaded["model"]["adapter.weight"]
        assert loaded["x"].tolist() == [step]


# ------------------------------------------------------------------------------------------------- several processes


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A copy of the checkpoint that four processes saved."""
    return shutil.copytree(GOLDEN / "format-1-sharded", tmp_path / "format-1-sharded") / "step-000000000007"


SHARDED: dict[str, Any] = {
    "rows": [[number / 4, number / 4 + 0.125] for number in range(7)],
    "grid": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]],
    "few": [0.5, -0.5],
    "anyhow": [[6.0 * row + column for column in range(6)] for row in range(4)],
    "whole": [1, 2, 3],
    "scalar": 7.0,
    "empty": [],
}
ROWS_EXP_AVG = [[-7.0, -6.0], [-5.0, -4.0], [-3.0, -2.0], [-1.0, 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_of_four_processes(sharded: Path, mmap: bool) -> None:
    """Cells, pieces, whole tensors and a tied one: whole again, in one process."""
    holdfast.open(sharded).verify()
    loaded = holdfast.load(sharded, mmap=mmap)
    assert set(loaded) == {"model", "optimizer"}
    model = loaded["model"]
    assert {name: model[name].tolist() for name in SHARDED} == SHARDED
    assert set(model) == {*SHARDED, "bits", "tied"}
    assert (model["bits"].dtype, model["bits"].view(torch.uint16).flatten().tolist()) == (
        torch.bfloat16,
        list(range(8)),
    )
    assert model["tied"] is model["rows"]
    assert loaded["optimizer"]["state.model.rows.exp_avg"].tolist() == ROWS_EXP_AVG


def test_what_four_processes_had_of_their_own(sharded: Path) -> None:
    """Each its generators and its loader, in the reserved entry."""
    checkpoint = holdfast.open(sharded)
    assert checkpoint.manifest.state["_ranks"] == {"world_size": 4, "entries": ["_rng", "loader"]}
    own = [json.loads(checkpoint.read(f"_ranks/{rank:05d}").tobytes()) for rank in range(4)]
    assert own == [{"_rng": {"python": rank}, "loader": {"position": 10 * rank}} for rank in range(4)]


def test_four_processes_are_exported_as_one(sharded: Path, tmp_path: Path) -> None:
    """Any tool reads the one file."""
    holdfast.open(sharded).export("optimizer", tmp_path / "optimizer.safetensors")
    assert load_file(tmp_path / "optimizer.safetensors")["state.model.rows.exp_avg"].tolist() == ROWS_EXP_AVG


def test_the_sharded_one_is_small() -> None:
    """It lies in the repository for ever."""
    sizes = [path.stat().st_size for path in (GOLDEN / "format-1-sharded").rglob("*") if path.is_file()]
    assert sum(sizes) < 100_000
