"""Every value by its name and digest."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.audit.digests import leaves_of, record, tensor_leaf
from holdfast.state import rng
from holdfast.state.capture import capture


def leaves(value: Any) -> dict[str, str]:
    """The leaves of one entry: what is shown of each."""
    return {path: leaf.shown or leaf.form for path, leaf in leaves_of(capture({"x": value}, generators=False)).items()}


NESTED: dict[str, tuple[Any, dict[str, str]]] = {
    "number": (3, {"x": "3"}),
    "float, to the last bit": (0.1, {"x": "0.1 (0x1.999999999999ap-4)"}),
    "dict": ({"a": {"b": 1}, "c": None}, {"x.a.b": "1", "x.c": "None"}),
    "keys that are no text": ({1: "a", (2, 3): "b"}, {"x[1]": "'a'", "x[(2, 3)]": "'b'"}),
    "list": ([1, [2]], {"x[0]": "1", "x[1][0]": "2"}),
    "tuple": ((1, True), {"x[0]": "1", "x[1]": "True"}),
    "long list of plain values": (list(range(9)), {"x": "[0, 1, 2, 3, 4, 5, 6, 7, 8]"}),
    "deque": (deque([1], maxlen=3), {"x[0]": "1"}),
    "counter": (Counter("aa"), {"x.a": "2"}),
    "ordered": (OrderedDict(a=1), {"x.a": "1"}),
    "default": (defaultdict(int, {5: 1}), {"x[5]": "1"}),
    "set": ({1}, {"x": "{1}"}),
    "bytes": (b"a", {"x": "b'a'"}),
    "empty": ({"a": [], "b": {}, "c": ()}, {"x.a": "[]", "x.b": "{}", "x.c": "()"}),
    "few elements": (torch.tensor([1, 2]), {"x": "[1, 2]"}),
    "many elements": (torch.zeros(2, 3), {"x": "float32 [2, 3]"}),
    "array": (np.zeros((2, 3), np.int16), {"x": "int16 [2, 3]"}),
}


@pytest.mark.parametrize(("value", "expected"), NESTED.values(), ids=NESTED)
def test_each_value_has_its_path(value: Any, expected: dict[str, str]) -> None:
    """Through every container, down to what has no parts."""
    assert leaves(value) == expected


def test_an_optimizer_is_named_by_its_parameters() -> None:
    """A moment is found under the name of its parameter."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).backward()
    optimizer.step()

    found = leaves_of(capture({"model": model, "optimizer": optimizer}, generators=False))

    assert {"model.weight", "optimizer.state.model.weight.exp_avg", "optimizer.param_groups[0].lr"} <= set(found)


TENSORS = {
    "values": torch.zeros(4),
    "one bit": torch.tensor([0.0, 0.0, 0.0, 1e-45]),
    "sign of zero": torch.tensor([0.0, 0.0, 0.0, -0.0]),
    "shape": torch.zeros(2, 2),
    "dtype": torch.zeros(4, dtype=torch.int32),
    "half": torch.zeros(4, dtype=torch.bfloat16),
    "complex": torch.zeros(4, dtype=torch.complex64),
    "bool": torch.zeros(4, dtype=torch.bool),
    "empty": torch.zeros(0),
    "scalar": torch.zeros(()),
}


def test_digests_tell_values_shapes_and_dtypes_apart() -> None:
    """No two of these are the same."""
    assert len({tensor_leaf(tensor).digest for tensor in TENSORS.values()}) == len(TENSORS)


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    """What is compared are values: those of a transposed, conjugated or sliced tensor are those of its copy."""
    grid = torch.arange(6.0).reshape(2, 3)
    wave = torch.tensor([1 + 2j])

    assert tensor_leaf(grid.t()).digest == tensor_leaf(grid.t().contiguous()).digest
    assert tensor_leaf(grid[:, 1]).digest == tensor_leaf(grid[:, 1].clone()).digest
    assert tensor_leaf(wave.conj()).digest == tensor_leaf(wave.conj().resolve_conj()).digest


def test_recording_changes_no_generator() -> None:
    """Not even where an object draws while it tells its state."""

    class Draws:
        def state_dict(self) -> dict[str, Any]:
            return {"drawn": [random.random(), float(np.random.rand()), float(torch.rand(()))]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    before = rng.capture_global()
    record("step", 1, {"draws": Draws()}, 0.5)

    assert rng.capture_global() == before


def test_recording_keeps_nothing() -> None:
    """The graph behind a loss is freed when the training lets go of it."""
    freed: list[bool] = []

    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            context.held = Held()
            return value * 2

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    loss = Graph.apply(torch.ones((), requires_grad=True))
    point = record("step", 1, {}, loss)
    del loss

    assert freed == [True]
    assert point.loss["loss"].shown == "2.0 (0x1.0000000000000p+1)"


def test_each_global_generator_is_a_value_of_its_own() -> None:
    """So that the one that was drawn from is named."""
    before = record("built", 0, {}).generators
    np.random.rand()
    after = record("built", 0, {}).generators

    assert [name for name in before if before[name] != after[name]] == ["numpy's generator"]
