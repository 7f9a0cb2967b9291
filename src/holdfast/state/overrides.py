"""A change of mind on resuming: values that are set after the restore, wherever they stand in the live objects.

A learning rate stands in several places. Changing the optimizer's alone does nothing under a scheduler, which computes
the next one from rates of its own. So a change of the learning rate is a factor, and everything that follows from the
old rate is multiplied by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from holdfast.errors import UsageError
from holdfast.state.kinds import Kind, kind_of, live_objects, with_parts
from holdfast.state.optimizers import install_options

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([0-9]+)\]")
_GROUP = re.compile(r"(?:param_groups\[([0-9]+)\]\.)?([A-Za-z_][A-Za-z0-9_]*)")
_RATES = ("lr", "initial_lr")
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last two are OneCycleLR's
_SCHEDULER_RATES = ("base_lrs", "_last_lr", "max_lrs")  # the last is CyclicLR's
_NOT_OPTIONS = ("params", "param_names")


def plan_overrides(state: Mapping[str, Any], override: Mapping[str, Any]) -> list[Callable[[], str]]:
    """Find where each override belongs, before anything is touched.

    Args:
        state: the live objects.
        override: new values by path: ``"optimizer.lr"`` for all groups of an optimizer,
            ``"optimizer.param_groups[1].weight_decay"`` for one, ``"scheduler.T_max"`` for an attribute of a scheduler,
            ``"settings.temperature"`` for a plain value.

    Returns:
        For each, in order, what sets it after the restore and says in words what it did.

    Raises:
        UsageError: a path leads nowhere, or the value is of another type than what is there.
    """
    return [_plan(state, path, value) for path, value in override.items()]


def _plan(state: Mapping[str, Any], path: str, value: Any) -> Callable[[], str]:
    if not isinstance(path, str):
        raise UsageError(f"override: expected paths as text, such as 'optimizer.lr', found {path!r}.")
    entry = max(
        (name for name in state if path == name or path.startswith((f"{name}.", f"{name}["))), key=len, default=""
    )
    if not entry:
        raise UsageError(
            f"override[{path!r}]: no entry of the state begins it; they are: {', '.join(state)}.", key=path
        )
    owner, key, rest = _descend(state, entry, path[len(entry) :], path)
    target = owner[key]
    kind = kind_of(target)
    if kind is Kind.OPTIMIZER:
        return _plan_option(state, target, rest.removeprefix("."), path, value)
    if kind is Kind.SCHEDULER:
        return _plan_attribute(target, rest.removeprefix("."), path, value)
    if kind is not None or isinstance(target, torch.Tensor) or rest:
        raise UsageError(
            f"override[{path!r}]: expected an option of an optimizer, an attribute of a scheduler or a plain value, "
            f"found {type(target).__qualname__}.",
            key=path,
        )
    _check_type(path, target, value)
    if not isinstance(owner, (MutableMapping, list)):
        raise UsageError(f"override[{path!r}]: {type(owner).__qualname__} is read-only.", key=path)

    def put() -> str:
        was, owner[key] = owner[key], value
        return f"{path}: {was!r} -> {value!r}"

    return put


def _descend(owner: Any, key: Any, rest: str, path: str) -> tuple[Any, Any, str]:
    """Follow ``rest`` through plain containers: the last one, the key in it, and what of the path is left."""
    while rest and isinstance(owner[key], (Mapping, list, tuple)):
        match = _STEP.match(rest)
        inner: Any = None if match is None else match[1] if match[1] is not None else int(match[2])
        container = owner[key]
        known = inner in container if isinstance(container, Mapping) else inner in range(len(container))
        if match is None or not known:
            there = ", ".join(map(str, container)) if isinstance(container, Mapping) else f"{len(container)} items"
            raise UsageError(f"override[{path!r}]: {rest!r} leads nowhere; there are: {there}.", key=path)
        owner, key, rest = container, inner, rest[match.end() :]
    return owner, key, rest


# --------------------------------------------------------------------------------------------------------- optimizers


def _plan_option(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, rest: str, path: str, value: Any
) -> Callable[[], str]:
    match = _GROUP.fullmatch(rest)
    number, option = (None, rest) if match is None else (match[1], match[2])
    groups = optimizer.param_groups if number is None else optimizer.param_groups[int(number) : int(number) + 1]
    if not groups or option in _NOT_OPTIONS or any(option not in group for group in groups):
        options = ", ".join(name for name in optimizer.param_groups[0] if name not in _NOT_OPTIONS)
        raise UsageError(
            f"override[{path!r}]: expected an option of the {len(optimizer.param_groups)} group(s) of "
            f"{type(optimizer).__qualname__}: {options}.",
            key=path,
        )
    for group in groups:
        _check_type(path, group[option], value)
    schedulers = list(_schedulers_of(state, optimizer)) if option in _RATES else []

    def set_option() -> str:
        was = [_plain(group[option]) for group in groups]
        for index, group in enumerate(optimizer.param_groups):
            if any(group is chosen for chosen in groups):
                if schedulers:
                    _scale_rates(group, index, option, float(value), schedulers, path)
                install_options(group, {option: value})
        driven = f", and with it {', '.join(type(item).__qualname__ for item in schedulers)}" if schedulers else ""
        return f"{path}: {was[0] if len(set(map(str, was))) == 1 else was} -> {value!r}{driven}"

    return set_option


def _schedulers_of(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """The schedulers of a state that drive ``optimizer``, those inside of others too."""
    for _, scheduler, kind in live_objects(state):
        if kind is Kind.SCHEDULER:
            yield from (part for part in with_parts(scheduler) if getattr(part, "optimizer", None) is optimizer)


def _scale_rates(
    group: dict[str, Any], index: int, option: str, value: float, schedulers: Sequence[Any], path: str
) -> None:
    """Multiply every learning rate that belongs to a group, in the group and in its schedulers.

    Floors that a user gave as such (``eta_min``, ``min_lrs``) stay.
    """
    was = float(group[option])
    if was == 0:
        raise UsageError(
            f"override[{path!r}]: the rate is 0 at this point of its schedule, so nothing says what the schedule "
            f"becomes. Override {path.removesuffix(option)}initial_lr, from which it is computed.",
            key=path,
        )
    factor = value / was
    for name in _GROUP_RATES:
        if name in group:
            install_options(group, {name: float(group[name]) * factor})
    for scheduler in schedulers:
        for name in _SCHEDULER_RATES:
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list) and index < len(rates):
                rates[index] = rates[index] * factor


# --------------------------------------------------------------------------------------------------------- schedulers


def _plan_attribute(scheduler: Any, name: str, path: str, value: Any) -> Callable[[], str]:
    known = {key: item for key, item in scheduler.state_dict().items() if not key.startswith("_")}
    if name not in known:
        raise UsageError(
            f"override[{path!r}]: {type(scheduler).__qualname__} has no {name!r}; it has: {', '.join(known)}.", key=path
        )
    _check_type(path, known[name], value)

    def set_attribute() -> str:
        was = getattr(scheduler, name)
        setattr(scheduler, name, value)
        return f"{path}: {was!r} -> {value!r}"

    return set_attribute


# --------------------------------------------------------------------------------------------------------------- types


def _check_type(path: str, live: Any, value: Any) -> None:
    """Numbers replace numbers, also those that are held as tensors of one element; else the types are the same."""
    if live is None or type(live) is type(value):
        return
    number = type(live) in (int, float) or (isinstance(live, torch.Tensor) and live.numel() == 1)
    if number and type(value) in (int, float):
        return
    raise UsageError(
        f"override[{path!r}]: expected a {type(live).__qualname__} as it is there, found {value!r}.", key=path
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
