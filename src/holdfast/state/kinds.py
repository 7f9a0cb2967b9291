"""What an object in a state is, and so how it is captured and restored."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from holdfast.format.tree import child
from holdfast.state.modules import name_cleaner, parameter_names, register_shards
from holdfast.state.optimizers import ParameterNames
from holdfast.state.rng import GENERATOR_TYPES
from holdfast.state.sharding import local_of


class PerRank:
    """A value of a state that each rank keeps for itself: ``{"buffer": PerRank(buffer)}``.

    What else is in a state is expected to be the same on all ranks, or cut over them, and is stored once. With one
    process this is nothing but the value.

    Attributes:
        value: anything that a state may hold, but for modules and optimizers. A restore replaces a plain value here.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


class Kind(enum.Enum):
    """The kinds of live objects, in the order in which they are installed at a restore.

    Schedulers come after optimizers, since some of them write learning rates; generators last, since anything before
    may draw from them.
    """

    MODULE = 0
    OPTIMIZER = 1
    STATEFUL = 2
    SCHEDULER = 3
    GENERATOR = 4


def kind_of(value: object) -> Kind | None:
    """The kind of a live object; None for tensors, arrays, containers and plain values."""
    if isinstance(value, type):
        return None
    if isinstance(value, torch.nn.Module):
        return Kind.MODULE
    if isinstance(value, torch.optim.Optimizer):
        return Kind.OPTIMIZER
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return Kind.SCHEDULER
    if isinstance(value, GENERATOR_TYPES):
        return Kind.GENERATOR
    return Kind.STATEFUL if is_stateful(value) else None


def is_stateful(value: object) -> bool:
    """Whether an object gives its state and takes it back."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def with_parts(value: Any) -> Iterator[Any]:
    """An object and those whose state is part of its own: a sequence of schedulers saves each of them."""
    yield value
    for part in getattr(value, "_schedulers", ()):
        yield from with_parts(part)


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def live_objects(value: object, path: str = "") -> Iterator[tuple[str, Any, Kind | None]]:
    """Every live object and tensor in a nesting of plain containers, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value, None
        return
    if type(value) is PerRank:
        yield from live_objects(value.value, path)
        return
    kind = kind_of(value)
    if kind is not None:
        yield path, value, kind
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, torch.Tensor):  # there may be many, and each generator costs
                yield child(path, key), item, None
            elif type(item) not in _PLAIN:
                yield from live_objects(item, child(path, key))
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]  # narrowed by its exact type
            yield from live_objects(item, f"{path}[{index}]")


def has_per_rank_value(value: object) -> bool:
    """Whether there is a :class:`PerRank` in a nesting of plain containers."""
    if type(value) is PerRank:
        return True
    if isinstance(value, Mapping):
        return any(type(item) not in _PLAIN and has_per_rank_value(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(has_per_rank_value(item) for item in value)


_HEADER_BYTES = 200  # what a tensor takes in a header, at most, unless its name is very long
_ENTRY_BYTES = 3 * 4096  # what a file takes more, because of its beginning and end


def estimated_nbytes(state: Mapping[str, Any]) -> int:
    """About how many bytes the files of a state will have: what modules, optimizers and containers hold now."""
    seen: dict[int, int] = {}
    for _, value, kind in live_objects(state):
        found: Iterable[object] = ()
        if kind is None:
            found = (value,)
        elif kind is Kind.MODULE:
            found = (*value.parameters(), *value.buffers())
        elif kind is Kind.OPTIMIZER:
            found = (slot for slots in value.state.values() for slot in slots.values())
        for tensor in found:
            if isinstance(tensor, torch.Tensor) and not is_lazy(tensor):
                seen[id(tensor)] = local_of(tensor).nbytes
    return sum(seen.values()) + _HEADER_BYTES * len(seen) + _ENTRY_BYTES * len(state)


def name_parameters(state: Mapping[str, Any]) -> ParameterNames:
    """The names of all parameters of a state, by identity."""
    by_identity: dict[int, list[str]] = {}
    frozen: set[str] = set()
    cleaners: dict[int, Callable[[str], str]] = {}
    bare: dict[int, list[str]] = {}
    for path, value, kind in live_objects(state):
        if kind is Kind.MODULE:
            register_shards(value)
            clean = cleaners[id(value)] = name_cleaner(value)
            for name, parameter in parameter_names(value, clean):
                by_identity.setdefault(id(parameter), []).append(f"{path}.{name}")
                bare.setdefault(id(parameter), []).append(name)
                if not parameter.requires_grad:
                    frozen.add(f"{path}.{name}")
        elif kind is None:
            by_identity.setdefault(id(value), []).append(path)
    return ParameterNames(by_identity, frozen, cleaners, bare)
