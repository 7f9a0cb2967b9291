"""How each kind of live object is restored: what has to match, what is filled, what is installed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from holdfast.checkpoint import Checkpoint
from holdfast.format.names import GRADIENTS_ENTRY
from holdfast.format.records import TensorRecord
from holdfast.state import loaders, modules, optimizers, rng
from holdfast.state.gradients import parameters_of
from holdfast.state.kinds import Kind
from holdfast.state.leaves import SavedTensor
from holdfast.state.optimizers import OptimizerMatch
from holdfast.state.report import Misshapen
from holdfast.state.restore_plan import Beside, Plan, saved_device, tensor_form
from holdfast.state.sharding import is_sharded, local_of


def _plan_module(plan: Plan, saved: Any, module: torch.nn.Module, path: str) -> None:
    live = modules.module_state(module)
    if not isinstance(saved, Mapping):
        plan.findings.misshapen.append(Misshapen(path, "a module", f"a {type(saved).__name__}"))
        return
    for name in live:
        if name not in saved:
            _note(plan, plan.findings.missing, f"{path}/{name}", live[name])
    for name in saved:
        if name not in live:
            _note(plan, plan.findings.unexpected, f"{path}/{name}", saved[name])
    if live and saved and not set(live) & set(saved):
        plan.findings.unmatched.append(path)
    owned = modules.owned_storages(module)
    rest = modules.needs_load_state_dict(module)
    values: dict[str, Any] = {}
    for name, item in saved.items():
        if name not in live:
            continue
        current = live[name]
        values[name] = current
        lazy = is_lazy(current)
        if isinstance(item, SavedTensor) and isinstance(current, torch.Tensor) and not lazy:
            plan.into_tensor(item, current, f"{path}/{name}")
            rest = rest or local_of(current).untyped_storage()._cdata not in owned
        else:  # extra state, and parameters that get their shape only now
            values[name] = plan.graft(item, None if lazy else current, f"{path}.{name}", saved_device)
            rest = True
    if rest:
        plan.install(Kind.MODULE.value, lambda: modules.load_module(module, values))


def _note(plan: Plan, where: list[str], name: str, value: Any) -> None:
    where.append(name)
    if isinstance(value, SavedTensor):
        plan.forms[name] = value.form
    elif isinstance(value, torch.Tensor) and not is_lazy(value):
        plan.forms[name] = tensor_form(value)


def _plan_optimizer(plan: Plan, saved: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
    if not optimizers.is_optimizer_state(saved):
        plan.findings.misshapen.append(Misshapen(path, "an optimizer", f"a {type(saved).__name__}"))
        return
    match = optimizers.match_optimizer(optimizer, plan.names, path, saved)
    plan.findings.fresh += [f"{path}: {name}" for name in match.fresh]
    plan.findings.dropped += [f"{path}: {name}" for name in match.dropped]
    if match.fresh and match.dropped and not any(match.saved_keys):
        plan.findings.unmatched.append(path)
    slots = _plan_slots(plan, saved, optimizer, match, path)
    options = []
    for index, (group, partial) in enumerate(zip(match.groups, match.partial, strict=True)):
        live = optimizer.param_groups[index]
        if group is None and live["params"]:
            kept = "learning rate restored, other options" if partial is not None else "options"
            plan.findings.notes.append(f"{path}.param_groups[{index}] has no counterpart: {kept} as constructed")
        chosen = optimizers.group_options(group, partial)
        options.append((live, plan.graft(chosen, live, f"{path}.param_groups[{index}]", saved_device)))
    named = {
        **saved,
        "state": {key: values for (_, values), key in zip(slots, match.saved_keys, strict=True) if values},
    }

    def install() -> None:
        if optimizers.has_own_loading(optimizer):
            optimizer.load_state_dict(optimizers.packed_state(optimizer, named, match))
        optimizers.install_state(optimizer, slots)
        for live, values in options:
            optimizers.install_options(live, values)

    plan.install(Kind.OPTIMIZER.value, install)


def _plan_slots(
    plan: Plan, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, match: OptimizerMatch, path: str
) -> list[tuple[torch.Tensor, dict[str, Any] | None]]:
    """The saved state of each parameter that has a counterpart; None for one that had none yet."""
    planned: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
    for (parameter, group), key in zip(optimizers.parameters_with_groups(optimizer), match.saved_keys, strict=True):
        values = saved["state"].get(key) if key is not None else None
        if values is None:
            planned.append((parameter, None))
            continue
        saved_parameter = _saved_parameter_device(plan.checkpoint, str(key))

        def place(
            slot: SavedTensor, where: str, parameter: Any = parameter, group: Any = group, device: str = saved_parameter
        ) -> str | Beside:
            name = where.rpartition(".")[2]
            chosen = optimizers.slot_device(name, parameter, group, slot.record.device, device)
            # Of a DTensor, optimizers make DTensors; what has no dimensions, such as step, is a plain tensor.
            return Beside(parameter, chosen) if slot.record.shape and is_sharded(parameter) else chosen

        live = optimizer.state.get(parameter, {})
        planned.append((parameter, plan.graft(values, live, f"{path}.state.{key}", place)))
    return planned


def _saved_parameter_device(checkpoint: Checkpoint, key: str) -> str:
    entry, _, name = key.partition(".")
    record: TensorRecord | None = checkpoint.manifest.tensors.get(entry, {}).get(name)
    return "cpu" if record is None else record.device


def _plan_stateful(plan: Plan, saved: Any, live: Any, path: str) -> None:
    value = plan.graft(saved, loaders.state_to_restore_into(live), path, saved_device)
    plan.install(Kind.STATEFUL.value, lambda: loaders.load_state(live, value))


def _plan_scheduler(plan: Plan, saved: Any, scheduler: Any, path: str) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("_last_lr", []), list):
        plan.findings.misshapen.append(Misshapen(path, "a scheduler", f"a {type(saved).__name__}"))
        return
    value = plan.graft(saved, scheduler.state_dict(), path, saved_device)

    def install() -> None:
        scheduler.load_state_dict(value)
        # A scheduler sets the learning rate when it is constructed. Where its optimizer is not restored with it, the
        # saved rate must be put back, or the next one would be computed from the first epoch's.
        if id(scheduler.optimizer) not in plan.optimizers:
            for group, rate in zip(scheduler.optimizer.param_groups, value.get("_last_lr", ()), strict=False):
                optimizers.install_options(group, {"lr": rate})

    plan.install(Kind.SCHEDULER.value, install)


def plan_gradients(plan: Plan, state: Mapping[str, Any]) -> None:
    """Gradients that waited for an optimizer step; those of parameters that are not restored stay what they are."""
    saved: dict[str, Any] = {}
    for part in plan.gradients():
        if not isinstance(part, Mapping):
            plan.findings.misshapen.append(Misshapen(GRADIENTS_ENTRY, "gradients", f"a {type(part).__name__}"))
            return
        saved |= part
    for names, parameter in parameters_of(state, plan.names):
        gradient = next((saved[name] for name in names if name in saved), None)
        if gradient is not None:
            _plan_gradient(plan, gradient, parameter, f"{GRADIENTS_ENTRY}.{names[0]}")


def _plan_gradient(plan: Plan, saved: Any, parameter: torch.Tensor, path: str) -> None:
    def place(gradient: SavedTensor, where: str) -> torch.device | Beside:
        return Beside(parameter, parameter.device) if is_sharded(parameter) else parameter.device

    if not isinstance(saved, SavedTensor) or saved.record.shape != parameter.shape:
        form = saved.form if isinstance(saved, SavedTensor) else f"a {type(saved).__name__}"
        plan.findings.misshapen.append(Misshapen(path, tensor_form(parameter), form))
        return
    value = plan.graft(saved, parameter.grad, path, place)

    def install() -> None:
        parameter.grad = value

    plan.install(Kind.MODULE.value, install)


def _plan_generator(plan: Plan, saved: Any, generator: Any, path: str) -> None:
    why = rng.generator_mismatch(generator, saved)
    if why is not None:
        plan.findings.misshapen.append(Misshapen(path, why, "another state"))
        return
    plan.install(Kind.GENERATOR.value, lambda: rng.restore_generator(generator, saved))


PLANNERS: dict[Kind, Callable[[Plan, Any, Any, str], None]] = {
    Kind.MODULE: _plan_module,
    Kind.OPTIMIZER: _plan_optimizer,
    Kind.STATEFUL: _plan_stateful,
    Kind.SCHEDULER: _plan_scheduler,
    Kind.GENERATOR: _plan_generator,
}
