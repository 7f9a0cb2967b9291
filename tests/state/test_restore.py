"""Restoring into live objects: in place, compared first, and told what differs."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import StateMismatchError, UsageError
from holdfast.format.records import CHUNK_BYTES


class Net(nn.Module):
    """Two layers; their names and widths can be chosen."""

    def __init__(self, first: str = "first", second: str = "second", width: int = 4) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(3, width))
        self.add_module(second, nn.Linear(width, 2))


def bits(module: nn.Module) -> dict[str, list[float]]:
    """All values of a module."""
    return {name: tensor.flatten().tolist() for name, tensor in module.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one Net and its optimizer after a step."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer}, step=7, epoch=2)
    return tmp_path / "x"


# ----------------------------------------------------------------------------------------------------------- in place


def test_tensors_keep_their_identity(saved: Path) -> None:
    """Parameters, views of them and whatever points to them take the saved values where they are."""
    model = Net()
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    view = model.first.weight.detach()[1]
    report = holdfast.restore(saved, {"model": model})
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert torch.equal(view, holdfast.load(saved)["model"]["first.weight"][1])
    assert (report.step, report.epoch, report.restored, report.skipped) == (7, 2, 4, ("optimizer",))
    assert not report.differs


def test_plain_dictionaries_of_tensors(tmp_path: Path) -> None:
    """Tensors and arrays in containers are filled in place; plain values beside them are replaced."""
    weights, array = torch.arange(3.0), np.arange(3.0)
    part, strided = torch.zeros(4, 4)[1:3, ::2], np.zeros((4, 4))[::2, 1:3]
    holdfast.save(
        tmp_path / "x",
        {"data": {"w": weights, "a": array, "n": 5, "deep": [{"p": part + 1, "s": strided + 2}, "text"]}},
    )
    live_tensor, live_array = torch.zeros(3), np.zeros(3)
    live: dict[str, Any] = {
        "data": {"w": live_tensor, "a": live_array, "n": 0, "deep": [{"p": part, "s": strided}, ""]}
    }
    data = live["data"]
    deep = data["deep"]
    holdfast.restore(tmp_path / "x", live)
    assert live["data"] is data
    assert data["deep"] is deep
    assert data["w"] is live_tensor
    assert data["a"] is live_array
    assert deep[0]["p"] is part
    assert (live_tensor.tolist(), live_array.tolist(), data["n"], deep[1]) == ([0, 1, 2], [0, 1, 2], 5, "text")
    assert (part.tolist(), strided.tolist()) == ([[1, 1], [1, 1]], [[2, 2], [2, 2]])


def test_plain_containers_stay_the_same_object(tmp_path: Path) -> None:
    """Others may hold a list, set or dictionary: it takes the saved contents."""
    history, seen, counts, recent = [1, 2], {3}, collections.Counter({4: 5}), collections.deque([6], maxlen=9)
    state = {"history": history, "seen": seen, "counts": counts, "recent": recent, "best": 0.5}
    holdfast.save(tmp_path / "x", state)
    history.append(0)
    seen.clear()
    counts[9] = 9
    recent.append(9)
    state["best"] = 9.0
    holdfast.restore(tmp_path / "x", state)
    assert (history, seen, counts, list(recent), state["best"]) == ([1, 2], {3}, {4: 5}, [6], 0.5)
    assert state["history"] is history
    assert state["seen"] is seen
    assert state["counts"] is counts
    assert state["recent"] is recent


@pytest.mark.parametrize("strict", [True, False])
def test_values_that_were_not_saved(tmp_path: Path, strict: bool) -> None:
    """A restored dictionary equals the saved one; without strict, what was not saved stays."""
    history = {1: 0.5}
    holdfast.save(tmp_path / "x", {"history": history})
    history[2] = 0.4
    report = holdfast.restore(tmp_path / "x", {"history": history}, strict=strict)
    assert history == ({1: 0.5} if strict else {1: 0.5, 2: 0.4})
    assert len(report.notes) == strict
    assert all("history[2] was not there when this was saved" in note for note in report.notes)


def test_tuples_of_objects(tmp_path: Path) -> None:
    """Objects and tensors inside tuples are restored in place; plain values beside them replace the tuple."""
    model, tensor = nn.Linear(1, 1), torch.ones(2)
    holdfast.save(tmp_path / "x", {"pair": (model, tensor, 3)})
    expected = bits(model)
    with torch.no_grad():
        model.weight.zero_()
        tensor.zero_()
    state = {"pair": (model, tensor, 0)}
    holdfast.restore(tmp_path / "x", state)
    assert (bits(model), tensor.tolist(), state["pair"][2]) == (expected, [1, 1], 3)
    assert state["pair"][0] is model
    assert state["pair"][1] is tensor


def test_a_read_only_state(tmp_path: Path) -> None:
    """Objects can be restored through a read-only mapping; a plain value in it cannot be replaced, and says so."""
    from types import MappingProxyType

    model = nn.Linear(1, 1)
    holdfast.save(tmp_path / "x", {"model": model})
    holdfast.restore(tmp_path / "x", MappingProxyType({"model": model}))
    holdfast.save(tmp_path / "y", {"n": 1})
    with pytest.raises(UsageError, match="is to be replaced, but mappingproxy is read-only"):
        holdfast.restore(tmp_path / "y", MappingProxyType({"n": 0}))


def test_inference_of_gradients_is_untouched(saved: Path) -> None:
    """Restoring is no operation that autograd sees: gradients, flags and graph stay as they were."""
    model = Net()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones_like(model.second.weight)
    holdfast.restore(saved, {"model": model})
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model.second.weight.grad.tolist() == [[1.0] * 4] * 2
    assert model.second.weight.is_leaf


# ---------------------------------------------------------------------------------------------------- compared first


def live_state(model: nn.Module) -> dict[str, Any]:
    """A model beside things that a failing restore must not touch."""
    return {"counter": {"n": 1}, "model": model, "generator": torch.Generator().manual_seed(3)}


def save_state(path: Path, model: nn.Module) -> Path:
    """The same, saved with other values."""
    holdfast.save(path, {"counter": {"n": 2}, "model": model, "generator": torch.Generator().manual_seed(4)})
    return path


MISMATCHES = [
    (Net("first", "third"), "missing", ("model/third.weight", "model/third.bias")),
    (Net("first", "third"), "unexpected", ("model/second.weight", "model/second.bias")),
    (Net(width=5), "misshapen", ("model/first.weight", "model/first.bias", "model/second.weight")),
]


@pytest.mark.parametrize(("model", "what", "expected"), MISMATCHES)
def test_a_mismatch_touches_nothing(tmp_path: Path, model: nn.Module, what: str, expected: Any) -> None:
    """Names are listed, and neither model nor counters nor generators have changed."""
    path = save_state(tmp_path / "x", Net())
    state = live_state(model)
    torch.manual_seed(0)
    before = (bits(model), state["generator"].get_state().tolist(), torch.get_rng_state().tolist())
    with pytest.raises(StateMismatchError, match="nothing was touched") as caught:
        holdfast.restore(path, state)
    report = caught.value.report
    assert tuple(getattr(item, "name", item) for item in getattr(report, what)) == expected
    assert (bits(model), state["generator"].get_state().tolist(), torch.get_rng_state().tolist()) == before
    assert state["counter"] == {"n": 1}


def test_renames_are_suggested(tmp_path: Path) -> None:
    """A missing and an unexpected name of one shape are likely one tensor; the message says so."""
    path = save_state(tmp_path / "x", Net("encoder_first", "head"))
    with pytest.raises(StateMismatchError) as caught:
        holdfast.restore(path, live_state(Net("first", "head")))
    assert caught.value.report.renames == (
        ("model/encoder_first.bias", "model/first.bias"),
        ("model/encoder_first.weight", "model/first.weight"),
    )
    assert "model/encoder_first.weight -> model/first.weight" in str(caught.value)


def test_shapes_are_told(tmp_path: Path) -> None:
    """The message names both shapes."""
    path = save_state(tmp_path / "x", Net(width=4))
    with pytest.raises(StateMismatchError, match=r"first.weight: live float32 \[5, 3\], saved float32 \[4, 3\]"):
        holdfast.restore(path, live_state(Net(width=5)))


def test_another_dtype(tmp_path: Path) -> None:
    """Strict refuses to convert; otherwise the values are converted and listed."""
    path = save_state(tmp_path / "x", Net())
    model = Net().to(torch.bfloat16)
    with pytest.raises(StateMismatchError, match=r"live bfloat16 \[4, 3\], saved float32 \[4, 3\]"):
        holdfast.restore(path, live_state(model))
    report = holdfast.restore(path, live_state(model), strict=False)
    assert len(report.converted) == 4
    expected = holdfast.load(path)["model"]["first.weight"].to(torch.bfloat16)
    assert torch.equal(model.first.weight, expected)


def test_restoring_what_matches(tmp_path: Path) -> None:
    """Without strict the rest stays as it was, and the report lists it."""
    path = save_state(tmp_path / "x", Net("first", "second"))
    model = Net("first", "third")
    kept = bits(model)
    report = holdfast.restore(path, live_state(model), strict=False)
    loaded = holdfast.load(path)["model"]
    assert torch.equal(model.first.weight, loaded["first.weight"])
    assert bits(model)["third.weight"] == kept["third.weight"]
    assert report.missing == ("model/third.weight", "model/third.bias")
    assert report.unexpected == ("model/second.weight", "model/second.bias")


@pytest.mark.parametrize("strict", [True, False])
def test_no_match_at_all(tmp_path: Path, strict: bool) -> None:
    """Not one name in common is an error whatever is asked for: nothing would have been restored."""
    path = save_state(tmp_path / "x", Net("a", "b"))
    model = Net("c", "d")
    kept = bits(model)
    with pytest.raises(StateMismatchError, match="not one name of model matches"):
        holdfast.restore(path, live_state(model), strict=strict)
    assert bits(model) == kept


def test_an_entry_that_was_not_saved(saved: Path) -> None:
    """An entry of the live state that the checkpoint has not is missing."""
    model = Net()
    with pytest.raises(StateMismatchError) as caught:
        holdfast.restore(saved, {"model": model, "ema": Net()})
    assert caught.value.report.missing == ("ema",)
    report = holdfast.restore(saved, {"model": model, "ema": Net()}, strict=False)
    assert report.missing == ("ema",)


@pytest.mark.parametrize(
    ("entry", "live", "message"),
    [
        ("optimizer", nn.Linear(1, 1), "optimizer"),
        ("model", torch.zeros(3), "model"),
        ("model", torch.optim.SGD([nn.Parameter(torch.ones(1))]), "live an optimizer"),
        ("model", torch.Generator(), "expected the state of a torch generator"),
    ],
)
def test_another_kind_of_object(saved: Path, entry: str, live: Any, message: str) -> None:
    """An object of another kind than the saved one is refused, by name."""
    with pytest.raises(StateMismatchError, match=message):
        holdfast.restore(saved, {entry: live})


def test_lists_of_another_length(tmp_path: Path) -> None:
    """A list of objects has to be as long as the saved one."""
    holdfast.save(tmp_path / "x", {"experts": [nn.Linear(1, 1), nn.Linear(1, 1)]})
    with pytest.raises(StateMismatchError, match="experts: live 1 items, saved 2 items"):
        holdfast.restore(tmp_path / "x", {"experts": [nn.Linear(1, 1)]})


def test_meta_tensors(saved: Path) -> None:
    """A module without memory cannot be restored in place; the way out is told."""
    with torch.device("meta"):
        model = Net()
    with pytest.raises(StateMismatchError, match=r"materialize the module first: to_empty\(device=...\)"):
        holdfast.restore(saved, {"model": model})
    holdfast.restore(saved, {"model": model.to_empty(device="cpu")})
    assert torch.equal(model.first.weight, holdfast.load(saved)["model"]["first.weight"])


# ----------------------------------------------------------------------------------------------------------- any order


class Draws:
    """An object whose loading draws random numbers, from the global generators and from one of the state."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, int]:
        """Nothing much."""
        torch.rand(1)
        np.random.rand()
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Draw."""
        torch.rand(1)
        torch.rand(1, generator=self.generator)
        np.random.rand()


def test_generators_come_last(tmp_path: Path) -> None:
    """Whatever drew while objects were restored, the generators go on from where they were saved."""
    generator = torch.Generator().manual_seed(1)
    state = {"generator": generator, "draws": Draws(generator)}
    holdfast.save(tmp_path / "x", state)
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), torch.rand(3, generator=generator).tolist())
    holdfast.restore(tmp_path / "x", state)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), torch.rand(3, generator=generator).tolist()) == expected


def test_restoring_twice_is_restoring_once(saved: Path) -> None:
    """The second restore of a checkpoint changes nothing."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    holdfast.restore(saved, {"model": model, "optimizer": optimizer})
    once = (bits(model), str(optimizer.state_dict()))
    holdfast.restore(saved, {"model": model, "optimizer": optimizer})
    assert (bits(model), str(optimizer.state_dict())) == once


@pytest.mark.parametrize("count", [1000, 3 * CHUNK_BYTES // 4], ids=["one chunk", "several chunks"])
def test_in_inference_mode(tmp_path: Path, count: int) -> None:
    """Inference tensors are filled by whichever thread; the mode is the thread's own."""
    saved = torch.arange(float(count)).reshape(2, -1).t()
    holdfast.save(tmp_path / "x", {"t": {"t": saved}})
    with torch.inference_mode():
        live = torch.zeros(2, count // 2).t()
        holdfast.restore(tmp_path / "x", {"t": {"t": live}}, generators=False)
        assert torch.equal(live, saved)
