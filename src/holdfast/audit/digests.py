"""Every value of a state by a name and a digest: what two runs are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from holdfast.audit.records import Leaf, Leaves, Point
from holdfast.format import tree
from holdfast.format.names import RNG_ENTRY
from holdfast.state.capture import CapturedEntry, CapturedTensor, capture

_LONGEST_SHOWN = 96
_MOST_ELEMENTS_SHOWN = 4
_MANY = 8  # a longer list of plain values is one leaf: a history is looked at as a whole

GENERATOR_NAMES = {
    "python": "Python's generator",
    "numpy": "numpy's generator",
    "torch_cpu": "torch's CPU generator",
    "torch_cuda": "torch's CUDA generator",
    "torch_mps": "torch's MPS generator",
}


def record(at: Any, step: int, state: Mapping[str, Any], loss: Any = None) -> Point:
    """Everything that is to be compared, now. Nothing is changed and nothing is kept: neither tensors nor graphs."""
    captured = capture(state)
    generators = captured.pop(RNG_ENTRY)
    losses = {} if at != "step" else leaves_of(capture({"loss": loss}, generators=False))
    return Point(at, step, losses, leaves_of(captured), dict(_generators(generators)))


def leaves_of(captured: Mapping[str, CapturedEntry]) -> Leaves:
    """The leaves of captured entries by their paths, such as ``optimizer.state.model.fc.weight.exp_avg``."""
    return {path: leaf for name, entry in captured.items() for path, leaf in _Walk(entry).leaves(entry.tree, name)}


def combined(leaves: Leaves, form: str) -> Leaf:
    """One leaf that stands for all of ``leaves``."""
    if len(leaves) == 1:
        return next(iter(leaves.values()))
    digest = _digest(msgspec.json.encode([[path, leaf.digest] for path, leaf in leaves.items()]))
    return Leaf(digest, form, "", sum(leaf.nbytes for leaf in leaves.values()))


def plain_leaf(value: object, form: str, shown: str = "") -> Leaf:
    """A leaf for something that JSON can say."""
    encoded = msgspec.json.encode(value)
    return Leaf(_digest(encoded), form, shown, len(encoded))


def tensor_leaf(value: torch.Tensor | np.ndarray[Any, Any]) -> Leaf:
    """A leaf for the exact bytes, dtype and shape of a tensor or array."""
    form = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    data = _bytes(value)
    hasher = xxhash.xxh3_128(f"{form};".encode())
    hasher.update(data)
    few = value.size if isinstance(value, np.ndarray) else value.numel()
    return Leaf(hasher.hexdigest(), form, _shown(value) if few <= _MOST_ELEMENTS_SHOWN else "", data.nbytes)


def _bytes(value: torch.Tensor | np.ndarray[Any, Any]) -> memoryview:
    if isinstance(value, torch.Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().data
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _shown(value: torch.Tensor | np.ndarray[Any, Any]) -> str:
    values = value.tolist()
    text = repr(values)
    if isinstance(values, float):  # a loss, nearly always: what differs in the last bit shows in hexadecimal
        text = f"{text} ({values.hex()})"
    return text if len(text) <= _LONGEST_SHOWN else ""


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _generators(entry: CapturedEntry) -> Iterator[tuple[str, Leaf]]:
    """A leaf for each global generator, each device's by itself."""
    for key, node in entry.tree.items():
        name = GENERATOR_NAMES.get(key, key)
        if isinstance(node, list):
            for index, item in enumerate(node):
                yield f"{name} {index}", plain_leaf(item, "a generator")
        else:
            yield name, plain_leaf(node, "a generator")


class _Walk:
    """Goes through the typed tree of one entry."""

    def __init__(self, entry: CapturedEntry) -> None:
        self._tensors: Mapping[str, CapturedTensor] = entry.tensors
        self._aliases = entry.aliases

    def leaves(self, node: Any, path: str) -> Iterator[tuple[str, Leaf]]:
        """Every leaf at and below ``node``."""
        children = None if _is_short_of_parts(node) else self._children(node, path)
        if children is None:
            yield path, self._leaf(node)
            return
        for where, item in children:
            yield from self.leaves(item, where)

    def _children(self, node: Any, path: str) -> list[tuple[str, Any]] | None:
        """The parts of a container with their paths; None for everything else."""
        if isinstance(node, list):
            return [(f"{path}[{index}]", item) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return None
        tag, body = next(iter(node.items()))
        if not tag.startswith("$"):
            return [(tree.child(path, key), item) for key, item in node.items()]
        if tag == "$tuple":
            return self._children(body, path) or None
        if tag == "$deque":
            return self._children(body[1], path) or None
        if tag in ("$dict", "$ordereddict", "$counter", "$defaultdict"):
            pairs = body[1] if tag == "$defaultdict" else body
            return [(tree.child(path, _value(key)), item) for key, item in pairs] or None
        return None

    def _leaf(self, node: Any) -> Leaf:
        if isinstance(node, dict) and "$tensor" in node:
            return tensor_leaf(self._tensor(node["$tensor"]))
        if isinstance(node, dict) and "$ndarray" in node:
            name = node["$ndarray"] if isinstance(node["$ndarray"], str) else node["$ndarray"][0]
            return tensor_leaf(self._tensor(name))
        value = _value(node)
        text = f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)
        return plain_leaf(node, type(value).__name__, text if len(text) <= _LONGEST_SHOWN else "")

    def _tensor(self, name: str) -> torch.Tensor | np.ndarray[Any, Any]:
        return self._tensors[self._aliases.get(name, name)].value


def _is_short_of_parts(node: Any) -> bool:
    """Whether a node is looked at as a whole: an empty container, or a long list of plain values."""
    if isinstance(node, list):
        return not node or (len(node) > _MANY and not any(isinstance(item, (list, dict)) for item in node))
    return bool(node == {})


def _value(node: Any) -> Any:
    return tree.decode(node, tree.OpaqueLeaves())
