"""Modules: every tensor that they have, tied as it was, in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import holdfast
from holdfast.errors import UnsupportedValueError


class Everything(nn.Module):
    """Parameters, buffers of both kinds, extra state, odd names, odd shapes."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.module = nn.ModuleDict({"a": nn.Linear(1, 2), "_orig_mod": nn.Linear(2, 1)})
        self.list = nn.ParameterList([nn.Parameter(torch.full((2,), value)), nn.Parameter(torch.tensor(value))])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("bf16", torch.full((3,), value, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([value > 0, False]))
        self.register_buffer("cache", torch.full((2,), value), persistent=False)
        self.convolution = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
        self.extra: Any = {"seen": {1, 2}, "value": value}

    def get_extra_state(self) -> Any:
        """Anything."""
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        """Back."""
        self.extra = state


def same(a: nn.Module, b: nn.Module) -> bool:
    """Equal in names, types and every bit."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        if isinstance(first[name], torch.Tensor)
        else first[name] == second[name]
        for name in first
    )


def test_everything_that_a_state_dict_has(tmp_path: Path) -> None:
    """Restored in place: each parameter and buffer is the very one that was there."""
    module, other = Everything(1.5), Everything(-2.0)
    module.norm(torch.rand(4, 2))
    holdfast.save(tmp_path / "x", {"m": module})
    before = dict([*other.named_parameters(), *other.named_buffers()])
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    holdfast.restore(tmp_path / "x", {"m": other})
    assert same(module, other)
    after = dict([*other.named_parameters(), *other.named_buffers()])
    assert all(after[name] is before[name] for name in before)
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses
    assert other.extra == {"seen": {1, 2}, "value": 1.5}
    assert other.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_buffers_that_are_not_persistent(tmp_path: Path) -> None:
    """They are no part of a state_dict, so they stay as they are: the module makes them itself."""
    holdfast.save(tmp_path / "x", {"m": Everything(1.5)})
    other = Everything(-2.0)
    holdfast.restore(tmp_path / "x", {"m": other})
    assert other.cache.tolist() == [-2.0, -2.0]


def test_other_tools_read_its_file(tmp_path: Path) -> None:
    """The file is the module's state_dict, names and bits."""
    from safetensors.torch import load_file

    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
    holdfast.save(tmp_path / "x", {"model": module.to(torch.bfloat16)})
    loaded, expected = load_file(tmp_path / "x" / "model.safetensors"), module.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert all(loaded[name].dtype == expected[name].dtype for name in expected)


# --------------------------------------------------------------------------------------------------------------- tied


class Tied(nn.Module):
    """An embedding that is the output layer too, or two that only look alike."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_tied_weights(tmp_path: Path, saved: bool, live: bool) -> None:
    """Stored once, and both names are restored, also into a module that is not tied; equal values are not tied."""
    module, other = Tied(saved), Tied(live)
    checkpoint = holdfast.save(tmp_path / "x", {"m": module})
    assert [info.alias_of for info in checkpoint.tensors.values()] == [None, "m/embedding.weight" if saved else None]
    holdfast.restore(tmp_path / "x", {"m": other})
    assert same(module, other)
    assert (other.head.weight is other.embedding.weight) is live


def test_views_of_one_storage(tmp_path: Path) -> None:
    """What a view shows is saved, not the storage behind it; different views are different tensors."""
    base = torch.arange(1000.0)
    checkpoint = holdfast.save(tmp_path / "x", {"v": {"a": base[:3], "b": base[1:4], "c": base[:3].clone()}})
    assert checkpoint.nbytes < 8192
    loaded = holdfast.load(tmp_path / "x")["v"]
    assert [tensor.tolist() for tensor in loaded.values()] == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]


# ----------------------------------------------------------------------------------------------- modules that do more


def test_hooks_and_own_loading(tmp_path: Path) -> None:
    """A module that does more at ``load_state_dict`` than copying gets to do it."""

    class Counting(nn.Linear):
        loads = 0

        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            type(self).loads += 1
            return super().load_state_dict(*arguments, **options)

    module = Counting(2, 2)
    holdfast.save(tmp_path / "x", {"m": module})
    holdfast.restore(tmp_path / "x", {"m": module})
    assert Counting.loads == 1
    hooked, seen = nn.Sequential(nn.Linear(2, 2)), []
    holdfast.save(tmp_path / "y", {"m": hooked})
    hooked[0].register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    holdfast.restore(tmp_path / "y", {"m": hooked})
    assert seen == ["post"]


def test_state_dict_hooks(tmp_path: Path) -> None:
    """What a module's ``state_dict`` makes of it is what is saved, and given back to it."""

    class Doubled(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "doubled"] = self.weight.detach() * 2

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            with torch.no_grad():
                self.weight.copy_(state_dict[prefix + "doubled"] / 2)

    module, other = Doubled(2, 2), Doubled(2, 2)
    assert list(holdfast.save(tmp_path / "x", {"m": module}).tensors) == ["m/doubled"]
    holdfast.restore(tmp_path / "x", {"m": other})
    assert torch.equal(module.weight, other.weight)


def test_parametrizations(tmp_path: Path) -> None:
    """Weight norm and the like: what is trained is what is saved."""
    module, other = (parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    holdfast.save(tmp_path / "x", {"m": module})
    holdfast.restore(tmp_path / "x", {"m": other})
    assert same(module, other)
    assert torch.equal(module.weight, other.weight)


# ------------------------------------------------------------------------------------------------------------ refused


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.LazyLinear(2), "Run one forward pass first"),
    "meta": (lambda: nn.Linear(1, 1, device="meta"), r"to_empty\(device=...\)"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"indices\(\) and values\(\)"),
    "sparse csr": (lambda: torch.eye(4).to_sparse_coo().to(torch.float64), r"to_dense\(\)"),
    "function": (lambda: print, "register_codec"),
    "generator": (lambda: (i for i in range(3)), "register_codec"),
    "loader": (lambda: torch.utils.data.DataLoader([1, 2]), "StatefulDataLoader"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved(tmp_path: Path, kind: str) -> None:
    """It fails at the save, names the path and the way out, and leaves nothing behind."""
    make, way_out = REFUSED[kind]
    with pytest.raises(UnsupportedValueError, match=way_out) as caught:
        holdfast.save(tmp_path / "x", {"part": {"inner": [make()]}})
    assert caught.value.key is not None
    assert caught.value.key.startswith("part.inner[0]")
    assert list(tmp_path.iterdir()) == []


def test_a_lazy_module_that_has_its_shapes_only_in_the_checkpoint(tmp_path: Path) -> None:
    """A fresh lazy module takes its shapes from what was saved."""
    module = nn.Linear(3, 2)
    holdfast.save(tmp_path / "x", {"m": module})
    lazy = nn.LazyLinear(2)
    holdfast.restore(tmp_path / "x", {"m": lazy})
    assert torch.equal(lazy.weight, module.weight)
