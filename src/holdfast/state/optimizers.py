"""Optimizers: their state by the names of their parameters, not by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.errors import UnsupportedValueError

_GROUP_NAMES = ("params", "param_names")
_FOLLOWS_PARAMETERS = ("lr", "initial_lr")


@dataclass(slots=True)
class ParameterNames:
    """The names that the tensors of a state have, by identity: ``model.fc.weight`` for ``fc.weight`` in ``model``.

    Attributes:
        by_identity: by the ``id`` of a tensor, all its names, the one used for saving first.
        frozen: names of parameters that take no gradients.
        cleaners: by the ``id`` of a module, what strips from names in it the parts that wrappers put there.
        bare: by the ``id`` of a parameter, its names within the modules that hold it.
    """

    by_identity: dict[int, list[str]]
    frozen: set[str] = field(default_factory=set)
    cleaners: dict[int, Callable[[str], str]] = field(default_factory=dict)
    bare: dict[int, list[str]] = field(default_factory=dict)

    def of(self, parameter: torch.Tensor) -> list[str]:
        """All names of ``parameter``, the one used for saving first."""
        return self.by_identity.get(id(parameter), [])


def _unique_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, int, int]]:
    """Each parameter once, with its group and its place there, in the order in which torch numbers them."""
    seen: set[int] = set()
    unique = []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                unique.append((parameter, group_index, index))
    return unique


def parameters_with_groups(optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter once, with its group, in torch's order."""
    return [(parameter, optimizer.param_groups[group]) for parameter, group, _ in _unique_parameters(optimizer)]


def parameter_keys(optimizer: torch.optim.Optimizer, names: ParameterNames, path: str) -> list[str]:
    """The key of each parameter, in torch's order.

    An optimizer saved without any of its parameters falls back to positions, ``#group.index``. Some with and some
    without a name is a mistake: the nameless ones would not be saved at all.
    """
    unique = _unique_parameters(optimizer)
    found = [names.of(parameter) for parameter, _, _ in unique]
    if not any(found):
        return [f"#{group}.{index}" for _, group, index in unique]
    for (parameter, group, index), known in zip(unique, found, strict=True):
        if not known:
            key = f"{path}.param_groups[{group}].params[{index}]"
            raise UnsupportedValueError(
                f"{key}: a parameter of shape {tuple(parameter.shape)} belongs to no module or tensor of the state, so "
                "its value would be lost. Add what holds it to the state.",
                key=key,
            )
    return [known[0] for known in found]


def optimizer_state(optimizer: torch.optim.Optimizer, names: ParameterNames, path: str) -> dict[str, Any]:
    """The optimizer's ``state_dict()`` with names in place of numbers; the tensors are references."""
    packed = optimizer.state_dict()
    keys = dict(enumerate(parameter_keys(optimizer, names, path)))
    return {
        **packed,
        "state": {keys.get(number, number): slots for number, slots in packed["state"].items()},
        "param_groups": [
            {**group, "params": [keys.get(number, number) for number in group["params"]]}
            for group in packed["param_groups"]
        ],
    }


@dataclass(slots=True)
class OptimizerMatch:
    """How the parameters and groups of a live optimizer correspond to those of a saved one.

    Attributes:
        saved_keys: for each live parameter, in torch's order, its key in the checkpoint; None for a new one.
        groups: for each live group: the saved group whose options it takes, None when it has none.
        partial: for each live group without a counterpart, the saved group that held most of its parameters.
        fresh: names of parameters that start without saved state.
        dropped: saved parameters that this optimizer does not have.
    """

    saved_keys: list[str | None]
    groups: list[Mapping[str, Any] | None]
    partial: list[Mapping[str, Any] | None]
    fresh: list[str]
    dropped: list[str]


def is_optimizer_state(saved: Any) -> bool:
    """Whether ``saved`` has the form of what :func:`optimizer_state` gives."""
    if not isinstance(saved, Mapping):
        return False
    state, groups = saved.get("state"), saved.get("param_groups")
    return (
        isinstance(state, Mapping)
        and all(isinstance(slots, Mapping) for slots in state.values())
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
        and all(isinstance(name, (str, int)) for group in groups for name in group["params"])
    )


def match_optimizer(
    optimizer: torch.optim.Optimizer, names: ParameterNames, path: str, saved: Mapping[str, Any]
) -> OptimizerMatch:
    """Find each live parameter and group in a saved optimizer, by name.

    Names may also be those within the module, as ``torch.distributed.checkpoint`` and its ``get_optimizer_state_dict``
    write them, where only one parameter of the optimizer has that name.
    """
    live_keys = parameter_keys(optimizer, names, path)
    saved_known = {key for group in saved["param_groups"] for key in group["params"]}
    parameters = [parameter for parameter, _, _ in _unique_parameters(optimizer)]
    owners = Counter(name for parameter in parameters for name in set(names.bare.get(id(parameter), ())))
    full_names = any(name in saved_known for parameter in parameters for name in names.of(parameter))
    saved_keys: list[str | None] = []
    for parameter, key in zip(parameters, live_keys, strict=True):
        candidates = [*names.of(parameter), key]  # a tied parameter may have been saved under another of its names
        if not full_names:
            candidates += [name for name in names.bare.get(id(parameter), ()) if owners[name] == 1]
        saved_keys.append(next((candidate for candidate in candidates if candidate in saved_known), None))
    by_parameter = {id(parameter): key for parameter, key in zip(parameters, saved_keys, strict=True)}
    live_groups = [{by_parameter[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    groups, partial = _match_groups(live_groups, saved["param_groups"])
    return OptimizerMatch(
        saved_keys=saved_keys,
        groups=groups,
        partial=partial,
        fresh=[live for live, found in zip(live_keys, saved_keys, strict=True) if found is None],
        dropped=sorted(map(str, saved_known - {key for key in saved_keys if key is not None})),
    )


def _match_groups(
    live_groups: Sequence[set[str | None]], saved_groups: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any] | None], list[Mapping[str, Any] | None]]:
    """Pair the groups that share most parameters, each saved group at most once; empty groups pair by position."""
    saved_names = [set(group["params"]) for group in saved_groups]
    overlaps = sorted(
        (-len(live & names), abs(position - index), position, index)
        for position, live in enumerate(live_groups)
        for index, names in enumerate(saved_names)
        if live & names or (position == index and not live and not names)
    )
    paired: dict[int, int] = {}
    for _, _, position, index in overlaps:
        if position not in paired and index not in paired.values():
            paired[position] = index
    largest: dict[int, int] = {}
    for _, _, position, index in overlaps:
        largest.setdefault(position, index)
    groups = [saved_groups[paired[p]] if p in paired else None for p in range(len(live_groups))]
    partial = [saved_groups[largest[p]] if p in largest and p not in paired else None for p in range(len(live_groups))]
    return groups, partial


def group_options(group: Mapping[str, Any] | None, partial: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a live group takes over: every option of its counterpart; of a group that was split, the learning rates.

    The learning rate follows the parameters, since it stands somewhere in a schedule. The other options of a new group
    were just chosen by whoever made the group.
    """
    if group is not None:
        return {name: value for name, value in group.items() if name not in _GROUP_NAMES}
    if partial is not None:
        return {name: partial[name] for name in _FOLLOWS_PARAMETERS if name in partial}
    return {}


def slot_device(slot: str, parameter: torch.Tensor, group: Mapping[str, Any], saved: str, saved_parameter: str) -> str:
    """Where a new state tensor belongs, by torch's own rule for ``step``, else beside its parameter.

    An optimizer that kept a slot on the CPU although its parameter was not there gets it back on the CPU.
    """
    if slot == "step":
        return str(parameter.device) if group.get("capturable") or group.get("fused") else "cpu"
    if saved == "cpu" and saved_parameter != "cpu":
        return "cpu"
    return str(parameter.device)


def install_state(
    optimizer: torch.optim.Optimizer, slots: Sequence[tuple[torch.Tensor, dict[str, Any] | None]]
) -> None:
    """Set the state of each parameter, exactly: torch's own loading would cast it to the parameter's dtype."""
    for parameter, values in slots:
        if values is None:
            optimizer.state.pop(parameter, None)
        else:
            current = optimizer.state[parameter]
            current.clear()
            current.update(values)


def install_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Set a group's options; a learning rate that is a tensor stays that tensor, one that is a number a number."""
    for name, value in options.items():
        live = group.get(name)
        if isinstance(live, torch.Tensor) and isinstance(value, (int, float)):
            live.fill_(value)
        elif type(live) in (int, float) and isinstance(value, torch.Tensor):
            group[name] = value.item()
        else:
            group[name] = value


def has_own_loading(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer does more at ``load_state_dict`` than setting its state."""
    return (
        type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict
        or bool(optimizer._optimizer_load_state_dict_pre_hooks)
        or bool(optimizer._optimizer_load_state_dict_post_hooks)
    )


def packed_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Any], match: OptimizerMatch) -> dict[str, Any]:
    """``named`` with numbers in place of names, for the optimizer's own ``load_state_dict``."""
    numbers = {key: number for number, key in enumerate(match.saved_keys) if key is not None}
    packed = optimizer.state_dict()
    for live, group, partial in zip(packed["param_groups"], match.groups, match.partial, strict=True):
        live.update(group_options(group, partial))
    state = {numbers[key]: slots for key, slots in named["state"].items() if key in numbers}
    extra = {key: value for key, value in named.items() if key not in ("state", "param_groups")}
    return {**packed, **extra, "state": state}
