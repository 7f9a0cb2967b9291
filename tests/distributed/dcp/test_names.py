"""Where the values of a state dict stand in a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from holdfast.distributed.dcp.names import flattened, is_tensor_node, nest, node_at, place_of
from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.state.capture import capture

PLACES = {
    "a tensor in a module": (("model", "fc.weight"), True, ("model", ("fc.weight",), "fc.weight")),
    "a tensor in a list": (("layers", 0, "w"), True, ("layers", (0, "w"), "0.w")),
    "a value in an optimizer": (
        ("optimizer", "param_groups", 0, "lr"),
        False,
        ("optimizer", ("param_groups", 0, "lr"), "param_groups.0.lr"),
    ),
    "a value at the top": (("epoch",), False, ("epoch", (), "epoch")),
    "a tensor at the top": (("weight",), True, ("state_dict", ("weight",), "weight")),
    "an extra state at the top": (("fc._extra_state",), False, ("state_dict", ("fc._extra_state",), "fc._extra_state")),
    "no name of an entry": (("a/b", "w"), True, ("state_dict", ("a/b", "w"), "a/b.w")),
    "an entry of ours": (("_rng", "w"), True, ("state_dict", ("_rng", "w"), "_rng.w")),
    "the name of a file of several": (
        ("m-00001-of-00002", "w"),
        True,
        ("state_dict", ("m-00001-of-00002", "w"), "m-00001-of-00002.w"),
    ),
    "the entry of the rest": (("state_dict", "w"), True, ("state_dict", ("state_dict", "w"), "state_dict.w")),
    "safetensors' own": (("model", "__metadata__"), True, ("model", ("__metadata__",), "__metadata__#2")),
}


@pytest.mark.parametrize(("path", "is_tensor", "expected"), PLACES.values(), ids=PLACES.keys())
def test_a_path_has_a_place(path: tuple[str | int, ...], is_tensor: bool, expected: object) -> None:
    """It depends on the path alone: ranks do not know each other's values."""
    assert place_of(path, is_tensor) == expected


STATES: dict[str, Any] = {
    "dictionaries": {"a": {"b": 1, "c": {"d": torch.ones(1)}}},
    "a list of dictionaries": {"groups": [{"lr": 0.1, "params": ["x", "y"]}, {"lr": 0.2, "params": []}]},
    "a list of tensors": {"a": [torch.ones(1), 2]},
    "a list of lists": {"a": [[1, 2], [torch.ones(1)]], "b": [[1], [2]]},
    "tuples": {"a": (torch.ones(1), {"x": 1}), "b": [(1, 2)]},
    "keys that are no text": {"a": {0: 1, 1: {2: 3}}},
    "keys with a tag": {"a": {"$x": 1, "y": 2}, "b": {"$tensor": 1}},
    "nothing": {"a": {}, "b": [], "c": None, "d": [{}]},
    "dots": {"a": {"b.c": 1}, "d.e": 2},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_trees_are_flattened_as_dcp_flattens_values(state: dict[str, Any]) -> None:
    """The same names, the same paths; and a tensor is one."""
    flat, paths = flatten_state_dict(state)
    node = capture({"x": state}, generators=False)["x"].tree
    found = list(flattened(node, ()))

    assert {".".join(map(str, path)): path for path, _ in found} == paths
    assert [is_tensor_node(item) for _, item in found] == [isinstance(value, torch.Tensor) for value in flat.values()]


def test_what_was_flattened_is_nested_again() -> None:
    """Dictionaries and lists, by the kinds of their keys; what a list lacks is None, as DCP has it."""
    items = [(("a", "b"), 1), (("a", "c", 1, "d"), 2), (("e",), None)]

    assert nest(items, "x") == {"a": {"b": 1, "c": [None, {"d": 2}]}, "e": None}


def test_a_value_is_an_entry() -> None:
    """With no path, the value is all there is."""
    assert nest([((), 5)], "x") == 5


@pytest.mark.parametrize(
    "paths",
    [[("a",), ("a", "b")], [("a", "b"), ("a",)], [("a", 0), ("a", "b")], [("a",), ("a",)]],
    ids=["value, then more", "more, then value", "list and dictionary", "twice"],
)
def test_a_path_within_a_value_is_refused(paths: list[tuple[str | int, ...]]) -> None:
    """Two ranks that do not agree on what is where."""
    with pytest.raises(UsageError, match="entry"):
        nest([(path, 1) for path in paths], "entry")


def test_a_node_is_found_by_its_path() -> None:
    """Whatever the dictionaries are made of."""
    node = tree.encode({"a": [{1: "x"}]}, "", tree.OpaqueLeaves())

    assert node_at(node, ("a", 0, "1")) == "x"
    with pytest.raises(ValueError, match=r"nothing at a\.1"):
        node_at(node, ("a", 1))
