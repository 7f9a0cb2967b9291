"""From live objects to a typed tree and a list of tensors. Nothing is copied here: tensors are referred to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.format.names import check_entry_names
from holdfast.state import rng
from holdfast.state.kinds import Kind, kind_of, name_parameters
from holdfast.state.modules import module_state
from holdfast.state.optimizers import ParameterNames, optimizer_state
from holdfast.state.tensors import (
    array_blocks,
    array_identity,
    check_tensor,
    dtype_name,
    memory_format,
    numpy_dtype_name,
    tensor_blocks,
    tensor_identity,
)

RNG_ENTRY = "_rng"
LOOP_ENTRY = "_loop"


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """A tensor or array to be written: what it is, and its bytes in logical order.

    It refers to the live tensor; ``blocks`` gives the values at the time of the call.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    memory_format: str
    device: str
    blocks: Callable[[], Iterator[memoryview]]


@dataclass(slots=True)
class CapturedEntry:
    """One entry of a state: its typed tree, its tensors, and which names are tied to which."""

    tree: Any
    tensors: dict[str, CapturedTensor]
    aliases: dict[str, str]


def capture(state: Mapping[str, Any], *, generators: bool = True) -> dict[str, CapturedEntry]:
    """Capture every entry of ``state``, and the global random-number generators.

    Args:
        state: names to modules, optimizers, schedulers, tensors, arrays, generators, plain containers of such, or
            anything with ``state_dict`` and ``load_state_dict``.
        generators: whether the global generators are captured too.

    Raises:
        UsageError: a name cannot be the name of a file.
        UnsupportedValueError: a value cannot be written exactly; it names the path and the way out.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"state: expected a mapping of names to objects, found {type(state).__qualname__}.")
    check_entry_names(state)
    names = name_parameters(state)
    # Generators first: a state_dict() may draw from them, and saving must not change training.
    global_state = rng.capture_global() if generators else None
    captured = {entry: _capture_entry(entry, value, names) for entry, value in state.items()}
    if global_state is not None:
        captured[RNG_ENTRY] = _capture_entry(RNG_ENTRY, global_state, names)
        rng.restore_global(global_state)
    return captured


def portable(value: Any, kind: Kind, names: ParameterNames, path: str) -> Any:
    """A live object as plain containers, numbers and tensors; the tensors are references."""
    if kind is Kind.MODULE:
        return module_state(value)
    if kind is Kind.OPTIMIZER:
        return optimizer_state(value, names, path)
    if kind is Kind.GENERATOR:
        return rng.generator_state(value)
    return value.state_dict()


def _capture_entry(entry: str, value: Any, names: ParameterNames) -> CapturedEntry:
    leaves = _CaptureLeaves(entry, names)
    node = tree.encode(value, entry, leaves)
    return CapturedEntry(node, leaves.tensors, leaves.aliases)


@dataclass(slots=True)
class _CaptureLeaves:
    """Takes tensors and live objects out of the tree while it is encoded."""

    entry: str
    names: ParameterNames
    tensors: dict[str, CapturedTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    _known: dict[tuple[object, ...], str] = field(default_factory=dict)
    _alive: list[object] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)

    def encode(self, value: Any, path: str) -> dict[str, Any] | None:
        """A tensor, an array, one of torch's own values, or a live object."""
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(value, path)}
        if type(value) is np.ndarray:
            return {"$ndarray": self._array(value, path)}
        plain = _TORCH_VALUES.get(type(value))
        if plain is not None:
            return plain(value)
        kind = kind_of(value)
        if kind is None and isinstance(value, torch.utils.data.DataLoader):
            raise tree.unsupported(
                value,
                path,
                "It does not know its position in the data. Leave it out (the generators that shuffle it are saved) or "
                "use a loader with state_dict() and load_state_dict(), such as torchdata's StatefulDataLoader.",
            )
        return None if kind is None else self._object(value, kind, path)

    def decode(self, tag: str, body: Any) -> Any:
        """Never called: capturing only encodes."""
        raise KeyError(tag)

    def _object(self, value: Any, kind: Kind, path: str) -> Any:
        if id(value) in self._open:
            raise tree.unsupported(value, path, "Its state_dict() contains itself.")
        self._open.add(id(value))
        try:
            return tree.encode(portable(value, kind, self.names, path), path, self)
        finally:
            self._open.discard(id(value))

    def _tensor(self, tensor: torch.Tensor, path: str) -> str:
        check_tensor(tensor, path)
        return self._add(
            tensor,
            tensor_identity(tensor),
            CapturedTensor(
                name=self._free_name(path),
                dtype=dtype_name(tensor.dtype),
                shape=tuple(tensor.shape),
                memory_format=memory_format(tensor),
                device=str(tensor.device),
                blocks=lambda: tensor_blocks(tensor),
            ),
        )

    def _array(self, array: np.ndarray[Any, Any], path: str) -> Any:
        dtype = numpy_dtype_name(array.dtype)
        if dtype is not None:
            shape = tuple(array.shape)
            source = array
        elif array.dtype.hasobject or array.dtype.names is not None:
            raise tree.unsupported(array, path, "Arrays of objects or records cannot be saved; save their fields.")
        else:  # text, times, foreign byte order: as bytes, with the dtype beside
            dtype = "uint8"
            source = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
            shape = source.shape
        name = self._add(
            array,
            array_identity(array),
            CapturedTensor(
                name=self._free_name(path),
                dtype=dtype,
                shape=shape,
                memory_format="contiguous",
                device="cpu",
                blocks=lambda: array_blocks(source),
            ),
        )
        return name if source is array else [name, array.dtype.str, list(array.shape)]

    def _add(self, value: object, identity: tuple[object, ...] | None, captured: CapturedTensor) -> str:
        first = None if identity is None else self._known.get(identity)
        if first is not None:
            self.aliases[captured.name] = first
            return captured.name
        if identity is not None:
            self._known[identity] = captured.name
            self._alive.append(value)  # so that no other tensor can take its address before the capture ends
        self.tensors[captured.name] = captured
        return captured.name

    def _free_name(self, path: str) -> str:
        base = path[len(self.entry) :].removeprefix(".") or self.entry
        name = base
        number = 1
        while name in self.tensors or name in self.aliases or name == "__metadata__":
            number += 1
            name = f"{base}#{number}"  # {"a.b": x, "a": {"b": y}} gives two tensors one path
        return name


_TORCH_VALUES: dict[type, Callable[[Any], dict[str, Any]]] = {
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.Size: lambda value: {"$size": list(value)},
    torch.device: lambda value: {"$device": str(value)},
}
