"""From live objects to a typed tree and a list of tensors. Nothing is copied here: tensors are referred to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from holdfast.collector import collector_paused
from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.format.names import GRADIENTS_ENTRY, RNG_ENTRY, check_entry_names
from holdfast.state import rng
from holdfast.state.gradients import gradients_of
from holdfast.state.kinds import Kind, PerRank, kind_of, name_parameters
from holdfast.state.modules import module_state
from holdfast.state.optimizers import ParameterNames, optimizer_state
from holdfast.state.sharding import Sharding, is_sharded, local_of, sharding_of
from holdfast.state.tensors import (
    array_address,
    array_identity,
    check_tensor,
    is_flat,
    memory_format,
    numpy_dtype_name,
    tensor_address,
    tensor_identity,
)


class CapturedTensor(msgspec.Struct, frozen=True, gc=False):
    """A tensor or array to be written: what it is, and where its values are. It refers to the live one.

    Attributes:
        shape: of the whole tensor, also where this process holds a part of it.
        value: what this process holds.
        frozen: whether it is a parameter that takes no gradients, and so is expected to stay what it is.
        address: where its values begin; 0 when there are none.
        flat: whether they lie there, in the CPU's memory, just as they do in the file.
        sharding: which rank holds which part of it; None where this process holds all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    memory_format: str
    device: str
    value: torch.Tensor | np.ndarray[Any, Any]
    frozen: bool = False
    address: int = 0
    flat: bool = False
    sharding: Sharding | None = None


@dataclass(slots=True)
class CapturedEntry:
    """One entry of a state: its typed tree, its tensors, and which names are tied to which."""

    tree: Any
    tensors: dict[str, CapturedTensor]
    aliases: dict[str, str]


def capture(
    state: Mapping[str, Any], *, generators: bool | Mapping[str, Any] = True, gradients: bool = False
) -> dict[str, CapturedEntry]:
    """Capture every entry of ``state``, and the global random-number generators.

    Args:
        state: names to modules, optimizers, schedulers, tensors, arrays, generators, plain containers of such, or
            anything with ``state_dict`` and ``load_state_dict``.
        generators: whether the global generators are captured too; or what they were at an earlier moment, as
            :func:`holdfast.state.rng.capture_global` returned it.
        gradients: whether the gradients of its parameters are captured too: in the middle of an accumulation they are
            state.

    Raises:
        UsageError: a name cannot be the name of a file.
        UnsupportedValueError: a value cannot be written exactly; it names the path and the way out.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"state: expected a mapping of names to objects, found {type(state).__qualname__}.")
    check_entry_names(state)
    with collector_paused():
        names = name_parameters(state)
        # Generators first: a state_dict() may draw from them, and saving must not change training.
        live = rng.capture_global() if generators else None
        captured = {entry: _capture_entry(entry, value, names) for entry, value in state.items()}
        if gradients:
            captured[GRADIENTS_ENTRY] = _capture_entry(GRADIENTS_ENTRY, gradients_of(state, names), names)
        if live is not None:
            saved = generators if isinstance(generators, Mapping) else live
            captured[RNG_ENTRY] = _capture_entry(RNG_ENTRY, saved, names)
            if rng.capture_global() != live:
                rng.restore_global(live)
    return captured


def portable(value: Any, kind: Kind, names: ParameterNames, path: str) -> Any:
    """A live object as plain containers, numbers and tensors; the tensors are references."""
    if kind is Kind.MODULE:
        return module_state(value, names.cleaners.get(id(value)))
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
    _at: dict[int, list[_Known]] = field(default_factory=dict)
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
        if type(value) is PerRank:
            if value.value is None:
                raise tree.unsupported(value, path, "It holds None; leave it out.")
            return tree.encode(value.value, path, self)  # type: ignore[no-any-return]
        kind = kind_of(value)
        if kind is None and isinstance(value, torch.utils.data.DataLoader):
            raise tree.unsupported(
                value,
                path,
                "It does not know its position in the data. Leave it out (the generators that shuffle it are saved) or "
                "use one that does: holdfast.data.ResumableDataLoader, or torchdata's StatefulDataLoader.",
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
        if is_sharded(tensor):
            return self._part(tensor, path)
        dtype = check_tensor(tensor, path)
        flat = is_flat(tensor)
        address = tensor_address(tensor)
        return self._add(
            tensor,
            address,
            CapturedTensor(
                name=self._free_name(path),
                dtype=dtype,
                shape=tuple(tensor.shape),
                memory_format="contiguous" if flat else memory_format(tensor),
                device="cpu" if flat else str(tensor.device),
                value=tensor.detach() if tensor.requires_grad else tensor,
                frozen=path in self.names.frozen,
                address=address,
                flat=flat,
            ),
        )

    def _part(self, tensor: torch.Tensor, path: str) -> str:
        """A DTensor: what this process holds of it."""
        sharding = sharding_of(tensor, path)
        local = local_of(tensor).detach()
        if sharding is None:
            return self._tensor(local, path)
        dtype = check_tensor(local, path)
        address = tensor_address(local)
        return self._add(
            local,
            # Ranks agree on which tensors are tied also where some hold nothing of them.
            address or -local.untyped_storage()._cdata,
            CapturedTensor(
                name=self._free_name(path),
                dtype=dtype,
                shape=sharding.shape,
                memory_format=memory_format(tensor),
                device=str(local.device),
                value=local,
                frozen=path in self.names.frozen,
                address=address,
                flat=is_flat(local),
                sharding=sharding,
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
            array_address(array),
            CapturedTensor(
                name=self._free_name(path),
                dtype=dtype,
                shape=shape,
                memory_format="contiguous",
                device="cpu",
                value=source,
                address=array_address(source),
                flat=source.flags.c_contiguous,
            ),
        )
        return name if source is array else [name, array.dtype.str, list(array.shape)]

    def _add(self, value: torch.Tensor | np.ndarray[Any, Any], address: int, captured: CapturedTensor) -> str:
        """Take a tensor, or note that it is one that was taken already under another name.

        Only tensors at one address can be one, which spares nearly all of them the closer look. What is kept here is
        alive, so that no other tensor can take its address before the capture ends.
        """
        if address:
            here = self._at.get(address)
            if here is None:
                self._at[address] = [(value, captured.name)]
            else:
                identity = _identity(value)
                for other, name in here:
                    if _identity(other) == identity and self.tensors[name].sharding == captured.sharding:
                        self.aliases[captured.name] = name
                        return captured.name
                here.append((value, captured.name))
        self.tensors[captured.name] = captured
        return captured.name

    def _free_name(self, path: str) -> str:
        start = len(self.entry)
        base = path[start + 1 :] if path[start : start + 1] == "." else path[start:] or self.entry
        name = base
        number = 1
        while name in self.tensors or name in self.aliases or name == "__metadata__":
            number += 1
            name = f"{base}#{number}"  # {"a.b": x, "a": {"b": y}} gives two tensors one path
        return name


_Known = tuple[torch.Tensor | np.ndarray[Any, Any], str]
"""What was captured, and the name it got."""


def _identity(value: torch.Tensor | np.ndarray[Any, Any]) -> tuple[object, ...]:
    return tensor_identity(value) if isinstance(value, torch.Tensor) else array_identity(value)


_TORCH_VALUES: dict[type, Callable[[Any], dict[str, Any]]] = {
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.Size: lambda value: {"$size": list(value)},
    torch.device: lambda value: {"$device": str(value)},
}
