"""From a checkpoint into live objects: first everything is matched, then tensors are filled, then objects installed.

Nothing is touched before the whole structure has been compared. Tensors are filled in place wherever there is one, so
that compiled functions, views and references from optimizers stay valid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from holdfast.checkpoint import Checkpoint
from holdfast.errors import CorruptCheckpointError, Damage, HoldfastError, StateMismatchError, UsageError
from holdfast.format import tree
from holdfast.format.manifest import TensorRecord
from holdfast.format.names import GRADIENTS_ENTRY, MANIFEST, RNG_ENTRY
from holdfast.state import modules, optimizers, rng
from holdfast.state.gradients import parameters_of
from holdfast.state.kinds import Kind, kind_of, live_objects, name_parameters
from holdfast.state.leaves import SavedArray, SavedLeaves, SavedTensor, fill
from holdfast.state.optimizers import OptimizerMatch, ParameterNames
from holdfast.state.overrides import plan_overrides
from holdfast.state.report import Findings, Misshapen, RestoreReport
from holdfast.state.tensors import dtype_name, new_tensor

_GENERATORS_LAST = len(Kind) + 1
_OVERRIDES = _GENERATORS_LAST + 1  # they draw nothing
_PLACE = Callable[[SavedTensor, str], torch.device | str]


def restore_state(
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    generators: bool = True,
    only: Container[str] | None = None,
    override: Mapping[str, Any] | None = None,
) -> RestoreReport:
    """Restore ``checkpoint`` (or ``only`` some of its entries) into the live objects of ``state``, then override.

    Raises:
        UsageError: an override leads nowhere. Nothing was touched.
        StateMismatchError: the structures differ (``strict``), or nothing matches at all. Nothing was touched.
        CorruptCheckpointError: damage was found while reading. Live tensors may hold a mixture: restore another one.
    """
    chosen = {entry: live for entry, live in state.items() if only is None or entry in only}
    plan = _Plan(checkpoint, name_parameters(state), _restored_optimizers(checkpoint, chosen), strict)
    for entry, live in chosen.items():
        _plan_entry(plan, state, entry, live)
    if GRADIENTS_ENTRY in checkpoint.manifest.state:
        _plan_gradients(plan, chosen)
    if generators and RNG_ENTRY in checkpoint.manifest.state:
        saved = plan.saved(RNG_ENTRY)
        plan.install(_GENERATORS_LAST, lambda: plan.findings.notes.extend(rng.restore_global(saved)))
    for change in plan_overrides(state, override or {}):
        plan.install(_OVERRIDES, lambda change=change: plan.findings.notes.append(change()))  # type: ignore[misc]
    report = plan.report(state)
    _refuse(report, plan.findings, strict)
    with torch.no_grad():
        fill(checkpoint, plan.copies, whole=only is None and not report.skipped)
        for _, action in sorted(plan.actions, key=lambda item: item[0]):
            action()
    return plan.report(state)


def _restored_optimizers(checkpoint: Checkpoint, state: Mapping[str, Any]) -> set[int]:
    saved = {entry: value for entry, value in state.items() if entry in checkpoint.manifest.state}
    return {id(value) for _, value, kind in live_objects(saved) if kind is Kind.OPTIMIZER}


def _refuse(report: RestoreReport, findings: Findings, strict: bool) -> None:
    if findings.unmatched:
        names = ", ".join(findings.unmatched)
        raise StateMismatchError(
            f"not one name of {names} matches; nothing was touched.\n{report}",
            report=report,
            path=report.path,
            step=report.step,
            key=findings.unmatched[0],
        )
    if strict and report.differs:
        first = [*report.missing, *report.unexpected, *(item.name for item in (*report.misshapen, *report.converted))][
            0
        ]
        raise StateMismatchError(
            "live objects and checkpoint differ; nothing was touched.\n"
            f"{report}\n"
            "Make them alike, or restore what matches with strict=False.",
            report=report,
            path=report.path,
            step=report.step,
            key=first,
        )


@dataclass(slots=True)
class _Plan:
    """What is to be done, collected before anything is."""

    checkpoint: Checkpoint
    names: ParameterNames
    optimizers: set[int]
    strict: bool
    copies: list[tuple[SavedTensor | SavedArray, Any]] = field(default_factory=list)
    actions: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    forms: dict[str, str] = field(default_factory=dict)
    _fresh: dict[str, Any] = field(default_factory=dict)

    def saved(self, entry: str) -> Any:
        """The saved value of an entry, with its tensors as :class:`SavedTensor`."""
        try:
            return tree.decode(self.checkpoint.manifest.state[entry], SavedLeaves(self.checkpoint, entry))
        except HoldfastError:
            raise
        except (ValueError, KeyError) as error:
            damage = [Damage(MANIFEST, f"state of {entry}: {error}")]
            raise CorruptCheckpointError.at(self.checkpoint.path, damage, self.checkpoint.step) from error

    def install(self, order: int, action: Callable[[], object]) -> None:
        """Do ``action`` after the tensors are filled; lower orders first."""
        self.actions.append((order, action))

    def report(self, state: Mapping[str, Any]) -> RestoreReport:
        """The report of what is planned."""
        entries = (entry for entry in self.checkpoint.manifest.state if not entry.startswith("_"))
        return self.findings.report(
            path=self.checkpoint.path,
            step=self.checkpoint.step,
            epoch=self.checkpoint.epoch,
            restored=len(self.copies),
            skipped=[entry for entry in entries if entry not in state],
            forms=self.forms,
        )

    def fresh(self, saved: SavedTensor, device: torch.device | str) -> torch.Tensor:
        """A new tensor for ``saved``; tied ones get one and the same."""
        key = f"{saved.key} on {device}"
        if key not in self._fresh:
            self._fresh[key] = new_tensor(saved.record, device)
            self.copies.append((saved, self._fresh[key]))
        tensor = self._fresh[key]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def into_tensor(self, saved: SavedTensor, live: torch.Tensor, name: str) -> bool:
        """Plan to fill ``live`` in place; False, and noted, when it has another shape."""
        if live.is_meta:
            raise StateMismatchError(
                f"{name}: the live tensor is a meta tensor and has no memory to restore into; "
                "materialize the module first: to_empty(device=...).",
                path=self.checkpoint.path,
                key=name,
            )
        if live.shape != saved.record.shape:
            self.findings.misshapen.append(Misshapen(name, tensor_form(live), saved.form))
            return False
        if dtype_name(live.dtype) != saved.record.dtype:
            self.findings.converted.append(Misshapen(name, tensor_form(live), saved.form))
        self.copies.append((saved, live))
        return True

    def graft(self, saved: Any, live: Any, path: str, place: _PLACE) -> Any:
        """``saved`` with its tensors as live ones: in place where ``live`` has an equal one, else new on ``place``."""
        if isinstance(saved, SavedTensor):
            if isinstance(live, torch.Tensor) and not live.is_meta and _is_alike(live, saved):
                self.copies.append((saved, live))
                return live
            return self.fresh(saved, place(saved, path))
        if isinstance(saved, SavedArray):
            if saved.fits(live):
                self.copies.append((saved, live))
                return live
            if saved.key not in self._fresh:
                self._fresh[saved.key] = saved.new()
                self.copies.append((saved, self._fresh[saved.key]))
            return self._fresh[saved.key]
        if isinstance(saved, dict):
            other = live if isinstance(live, Mapping) else {}
            for key, item in saved.items():
                saved[key] = self.graft(item, other.get(key), tree.child(path, key), place)
            return saved
        if type(saved) in (list, tuple):
            others = live if type(live) is type(saved) else ()
            return type(saved)(
                self.graft(item, others[index] if index < len(others) else None, f"{path}[{index}]", place)
                for index, item in enumerate(saved)
            )
        if isinstance(saved, deque):
            for index, item in enumerate(saved):
                saved[index] = self.graft(item, None, f"{path}[{index}]", place)
        return saved


def _is_alike(live: torch.Tensor, saved: SavedTensor) -> bool:
    return live.shape == saved.record.shape and dtype_name(live.dtype) == saved.record.dtype


def tensor_form(tensor: torch.Tensor) -> str:
    """Dtype and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _saved_device(saved: SavedTensor, path: str) -> str:
    """Where a new tensor goes when nothing says better: the kind of device it was saved from, if there is one."""
    kind = saved.record.device.partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        return saved.record.device if torch.cuda.device_count() > 1 else "cuda"
    if kind == "mps" and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


# ------------------------------------------------------------------------------------------------------------ entries


def _plan_entry(plan: _Plan, state: Mapping[str, Any], entry: str, live: Any) -> None:
    if entry not in plan.checkpoint.manifest.state:
        plan.findings.missing.append(entry)
        return

    def assign(value: Any) -> None:
        if not isinstance(state, MutableMapping):
            raise UsageError(
                f"state[{entry!r}] is to be replaced, but {type(state).__qualname__} is read-only.", key=entry
            )
        state[entry] = value

    _plan_value(plan, plan.saved(entry), live, entry, assign)


def _plan_value(plan: _Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
    """Plan one value: an object, a tensor, a container of such, or a plain value that ``assign`` puts in place."""
    if isinstance(live, torch.Tensor):
        if isinstance(saved, SavedTensor):
            plan.into_tensor(saved, live, path)
        else:
            plan.findings.misshapen.append(Misshapen(path, tensor_form(live), f"a {type(saved).__name__}"))
        return
    kind = kind_of(live)
    if kind is not None:
        _PLANNERS[kind](plan, saved, live, path)
    elif isinstance(live, np.ndarray) and isinstance(saved, SavedArray) and saved.fits(live):
        plan.copies.append((saved, live))
    elif isinstance(live, MutableMapping) and type(saved) is type(live):
        _plan_mapping(plan, saved, live, path)
    elif type(live) in (list, tuple) and type(saved) is type(live) and _is_structure(live):
        _plan_sequence(plan, saved, live, path, assign)
    else:
        _plan_plain(plan, saved, live, path, assign)


def _is_structure(live: Any) -> bool:
    """Whether a container holds objects or tensors to restore into, so that its shape matters."""
    return next(live_objects(live), None) is not None


def _plan_mapping(plan: _Plan, saved: Mapping[Any, Any], live: MutableMapping[Any, Any], path: str) -> None:
    for key, item in saved.items():
        where = tree.child(path, key)

        def assign(value: Any, key: Any = key) -> None:
            live[key] = value

        if key in live:
            _plan_value(plan, item, live[key], where, assign)
        else:
            _plan_plain(plan, item, None, where, assign)
    for key in [key for key in live if key not in saved]:
        if _is_structure(live[key]):
            plan.findings.missing.append(tree.child(path, key))
        elif plan.strict:  # a value that was not there when it was saved: the restored container has it neither
            plan.findings.notes.append(f"{tree.child(path, key)} was not there when this was saved, and was removed")
            plan.install(0, lambda key=key: live.pop(key))  # type: ignore[misc]  # mypy knows no default of a lambda


def _plan_sequence(plan: _Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
    if len(saved) != len(live):
        plan.findings.misshapen.append(Misshapen(path, f"{len(live)} items", f"{len(saved)} items"))
        return
    values = list(live)
    for index, item in enumerate(saved):

        def put(value: Any, index: int = index) -> None:
            values[index] = value

        _plan_value(plan, item, live[index], f"{path}[{index}]", put)

    def replace() -> None:
        if isinstance(live, list):
            live[:] = values
        elif any(new is not old for new, old in zip(values, live, strict=True)):
            assign(tuple(values))

    plan.install(_GENERATORS_LAST - 1, replace)


def _plan_plain(plan: _Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
    value = plan.graft(saved, live, path, _saved_device)

    def install() -> None:
        # Others may hold the list or set itself: it takes the saved contents and stays the same object.
        if type(live) is type(value) and isinstance(live, list):
            live[:] = value
        elif type(live) is type(value) and isinstance(live, (set, dict)):
            live.clear()
            live.update(value)
        elif isinstance(live, deque) and isinstance(value, deque) and live.maxlen == value.maxlen:
            live.clear()
            live.extend(value)
        elif value is not live:
            assign(value)

    plan.install(0, install)


# ------------------------------------------------------------------------------------------------------------- kinds


def _plan_module(plan: _Plan, saved: Any, module: torch.nn.Module, path: str) -> None:
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
            rest = rest or current.untyped_storage()._cdata not in owned
        else:  # extra state, and parameters that get their shape only now
            values[name] = plan.graft(item, None if lazy else current, f"{path}.{name}", _saved_device)
            rest = True
    if rest:
        plan.install(Kind.MODULE.value, lambda: modules.load_module(module, values))


def _note(plan: _Plan, where: list[str], name: str, value: Any) -> None:
    where.append(name)
    if isinstance(value, SavedTensor):
        plan.forms[name] = value.form
    elif isinstance(value, torch.Tensor) and not is_lazy(value):
        plan.forms[name] = tensor_form(value)


def _plan_optimizer(plan: _Plan, saved: Any, optimizer: torch.optim.Optimizer, path: str) -> None:
    if not isinstance(saved, Mapping) or "param_groups" not in saved or "state" not in saved:
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
        options.append((live, plan.graft(chosen, live, f"{path}.param_groups[{index}]", _saved_device)))
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
    plan: _Plan, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, match: OptimizerMatch, path: str
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
        ) -> str:
            name = where.rpartition(".")[2]
            return optimizers.slot_device(name, parameter, group, slot.record.device, device)

        live = optimizer.state.get(parameter, {})
        planned.append((parameter, plan.graft(values, live, f"{path}.state.{key}", place)))
    return planned


def _saved_parameter_device(checkpoint: Checkpoint, key: str) -> str:
    entry, _, name = key.partition(".")
    record: TensorRecord | None = checkpoint.manifest.tensors.get(entry, {}).get(name)
    return "cpu" if record is None else record.device


def _plan_stateful(plan: _Plan, saved: Any, live: Any, path: str) -> None:
    value = plan.graft(saved, live.state_dict(), path, _saved_device)
    plan.install(Kind.STATEFUL.value, lambda: live.load_state_dict(value))


def _plan_scheduler(plan: _Plan, saved: Any, scheduler: Any, path: str) -> None:
    value = plan.graft(saved, scheduler.state_dict(), path, _saved_device)

    def install() -> None:
        scheduler.load_state_dict(value)
        # A scheduler sets the learning rate when it is constructed. Where its optimizer is not restored with it, the
        # saved rate must be put back, or the next one would be computed from the first epoch's.
        if id(scheduler.optimizer) not in plan.optimizers:
            for group, rate in zip(scheduler.optimizer.param_groups, value.get("_last_lr", ()), strict=False):
                optimizers.install_options(group, {"lr": rate})

    plan.install(Kind.SCHEDULER.value, install)


def _plan_gradients(plan: _Plan, state: Mapping[str, Any]) -> None:
    """Gradients that waited for an optimizer step; those of parameters that are not restored stay what they are."""
    saved = plan.saved(GRADIENTS_ENTRY)
    for names, parameter in parameters_of(state, plan.names):
        gradient = next((saved[name] for name in names if name in saved), None)
        if gradient is not None:
            _plan_gradient(plan, gradient, parameter, f"{GRADIENTS_ENTRY}.{names[0]}")


def _plan_gradient(plan: _Plan, saved: Any, parameter: torch.Tensor, path: str) -> None:
    def place(gradient: SavedTensor, where: str) -> torch.device:
        return parameter.device

    value = plan.graft(saved, parameter.grad, path, place)

    def install() -> None:
        parameter.grad = value

    plan.install(Kind.MODULE.value, install)


def _plan_generator(plan: _Plan, saved: Any, generator: Any, path: str) -> None:
    why = rng.generator_mismatch(generator, saved)
    if why is not None:
        plan.findings.misshapen.append(Misshapen(path, why, "another state"))
        return
    plan.install(Kind.GENERATOR.value, lambda: rng.restore_generator(generator, saved))


_PLANNERS: dict[Kind, Callable[[_Plan, Any, Any, str], None]] = {
    Kind.MODULE: _plan_module,
    Kind.OPTIMIZER: _plan_optimizer,
    Kind.STATEFUL: _plan_stateful,
    Kind.SCHEDULER: _plan_scheduler,
    Kind.GENERATOR: _plan_generator,
}
