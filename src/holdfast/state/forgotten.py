"""Objects of a training that are alive and not in its state: what nobody saves, nobody resumes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from holdfast.state.kinds import Kind, kind_of, live_objects, with_parts
from holdfast.state.modules import register_shards

_STATEFUL_LOADERS = ("StatefulDataLoader", "ResumableDataLoader")  # torchdata's, and holdfast.data's


def forgotten(state: Mapping[str, Any]) -> list[str]:
    """Optimizers, schedulers, gradient scalers and stateful loaders that belong to this training and are not in it.

    An optimizer belongs to it when it updates a parameter of one of its modules, a scheduler when it drives such an
    optimizer. Scalers and loaders cannot be told apart by what they hold; each that is in use is named.
    """
    found = _forgotten(state)
    if found:  # what only a circle of references keeps is not in use
        gc.collect()
        found = _forgotten(state)
    return found


def _forgotten(state: Mapping[str, Any]) -> list[str]:
    included = set(_included(state))
    for _, value, kind in live_objects(state):
        if kind is Kind.MODULE:
            register_shards(value)
    parameters = {
        id(parameter)
        for _, value, kind in live_objects(state)
        if kind is Kind.MODULE
        for parameter in value.parameters()
    }
    candidates = _alive(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
    optimizers = {
        id(thing): thing
        for thing in candidates
        if isinstance(thing, torch.optim.Optimizer) and _updates(thing, parameters)
    }
    found = [_describe(thing) for key, thing in optimizers.items() if key not in included]
    found += [
        _describe(thing)
        for thing in candidates
        if isinstance(thing, torch.optim.lr_scheduler.LRScheduler)
        and id(thing) not in included
        and id(getattr(thing, "optimizer", None)) in optimizers
    ]
    found += [_describe(thing) for thing in candidates if _is_loose_end(thing) and id(thing) not in included]
    return found


def _alive(*kinds: type) -> list[Any]:
    """Everything of these kinds, and every stateful loader. Classes are looked at first: there are fewer of them."""
    everything = gc.get_objects()
    wanted = {
        kind for kind in set(map(type, everything)) if issubclass(kind, kinds) or kind.__name__ in _STATEFUL_LOADERS
    }
    return [thing for thing in everything if type(thing) in wanted] if wanted else []


def _included(state: Mapping[str, Any]) -> Iterator[int]:
    for _, value, _ in live_objects(state):
        yield from map(id, with_parts(value))


def _updates(optimizer: Any, parameters: set[int]) -> bool:
    groups = getattr(optimizer, "param_groups", ())
    return any(id(parameter) in parameters for group in groups for parameter in group["params"])


def _is_loose_end(thing: Any) -> bool:
    kind = type(thing)
    if issubclass(kind, torch.amp.GradScaler):
        return bool(thing.is_enabled())
    if kind.__name__ not in _STATEFUL_LOADERS or kind_of(thing) is not Kind.STATEFUL:
        return False
    # One that gives the same batches each time, and is at their beginning, is for evaluations.
    return bool(getattr(thing, "position", 1) or getattr(thing, "shuffle", True))


def _describe(thing: Any) -> str:
    name = type(thing).__qualname__
    if isinstance(thing, torch.optim.Optimizer):
        count = sum(len(group["params"]) for group in thing.param_groups)
        return f"{name} of {count} parameters"
    if isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
        return f"{name} of {type(thing.optimizer).__qualname__}"
    return name
