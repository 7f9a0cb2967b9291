"""From a checkpoint into live objects: first everything is matched, then tensors are filled, then objects installed.

Nothing is touched before the whole structure has been compared. Tensors are filled in place wherever there is one, so
that compiled functions, views and references from optimizers stay valid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint import Checkpoint
from holdfast.errors import CorruptCheckpointError, Damage, StateMismatchError, UsageError
from holdfast.format import tree
from holdfast.format.names import GRADIENTS_ENTRY, MANIFEST, RNG_ENTRY
from holdfast.state import rng
from holdfast.state.kinds import Kind, PerRank, has_per_rank_value, kind_of, live_objects, name_parameters
from holdfast.state.leaves import Fill, SavedArray, SavedTensor, fill
from holdfast.state.overrides import plan_overrides
from holdfast.state.planners import PLANNERS, plan_gradients
from holdfast.state.ranks import PerRankShare, share_of
from holdfast.state.report import Findings, Misshapen, RestoreReport
from holdfast.state.restore_plan import GENERATORS_LAST, OVERRIDES, Plan, saved_device, tensor_form


def restore_state(
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    generators: bool = True,
    only: Container[str] | None = None,
    override: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    per_rank: str = "error",
    fill: Fill = fill,
) -> RestoreReport:
    """Restore ``checkpoint`` (or ``only`` some of its entries) into the live objects of ``state``, then override.

    Of tensors that are cut over ranks, what ``rank`` holds is read; of what each rank kept for itself, what it had.
    ``fill`` reads them.

    Raises:
        UsageError: an override leads nowhere. Nothing was touched.
        StateMismatchError: the structures differ (``strict``), or nothing matches at all, or another number of ranks
            saved it and ``per_rank`` is ``"error"``. Nothing was touched.
        CorruptCheckpointError: damage was found while reading. Live tensors may hold a mixture: restore another one.
    """
    chosen = {entry: live for entry, live in state.items() if only is None or entry in only}
    own = (RNG_ENTRY, GRADIENTS_ENTRY) if generators else (GRADIENTS_ENTRY,)
    share = share_of(checkpoint, chosen, rank, world_size, per_rank, own)
    plan = Plan(checkpoint, name_parameters(state), _restored_optimizers(checkpoint, chosen), strict, share)
    plan.findings.notes.extend(_left_out(share, entry, world_size) for entry in sorted(share.lost))
    for entry, live in chosen.items():
        _plan_entry(plan, state, entry, live)
    if GRADIENTS_ENTRY in checkpoint.manifest.state or GRADIENTS_ENTRY in {*share.values, *share.anew}:
        plan_gradients(plan, chosen)
    if RNG_ENTRY in share.anew:
        plan.install(GENERATORS_LAST, lambda: rng.seed_global(share.seed))
        plan.findings.notes.append(_seeded(share, RNG_ENTRY))
    elif generators and (RNG_ENTRY in checkpoint.manifest.state or RNG_ENTRY in share.values):
        saved = plan.saved(RNG_ENTRY)
        problem = rng.global_problem(saved)
        if problem is not None:
            damage = [Damage(MANIFEST, f"state of {RNG_ENTRY}: {problem}")]
            raise CorruptCheckpointError.at(checkpoint.path, damage, checkpoint.step)
        plan.install(GENERATORS_LAST, lambda: plan.findings.notes.extend(rng.restore_global(saved)))
    for change in plan_overrides(state, override or {}):
        plan.install(OVERRIDES, lambda change=change: plan.findings.notes.append(change()))  # type: ignore[misc]
    report = plan.report(state)
    _refuse(report, plan.findings, strict)
    with torch.no_grad():
        # One process reads all there is; of many, each what it needs.
        fill(checkpoint, plan.copies, whole=only is None and not report.skipped and world_size == 1)
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


def _plan_entry(plan: Plan, state: Mapping[str, Any], entry: str, live: Any) -> None:
    if entry in plan.per_rank.anew:
        _plan_anew(plan, entry, live)
        return
    if entry not in plan.checkpoint.manifest.state and entry not in plan.per_rank.values:
        plan.findings.missing.append(entry)
        return

    def assign(value: Any) -> None:
        if not isinstance(state, MutableMapping):
            raise UsageError(
                f"state[{entry!r}] is to be replaced, but {type(state).__qualname__} is read-only.", key=entry
            )
        state[entry] = value

    _plan_value(plan, plan.saved(entry), live, entry, assign)


def _plan_anew(plan: Plan, entry: str, live: Any) -> None:
    """An entry that each rank kept for itself, and of which this one takes nothing."""
    seeded = False
    for path, value, kind in live_objects(live, entry):
        if kind is Kind.GENERATOR:
            seeded = True
            seed = rng.seed_for(plan.per_rank.seed, path)
            plan.install(Kind.GENERATOR.value, lambda value=value, seed=seed: rng.seed_generator(value, seed))  # type: ignore[misc]
    saved_by = plan.per_rank.saved_world_size
    plan.findings.notes.append(
        _seeded(plan.per_rank, entry)
        if seeded
        else f"{entry}: as it was constructed; {saved_by} rank(s) saved it, each its own"
    )


def _seeded(share: PerRankShare, entry: str) -> str:
    return f"{entry}: generators seeded anew; {share.saved_world_size} rank(s) saved it, each its own"


def _left_out(share: PerRankShare, entry: str, world_size: int) -> str:
    last = share.saved_world_size - 1
    gone = f"rank {last}" if last == world_size else f"ranks {world_size} to {last}"
    return f"{entry}: what {gone} had is left out, since fewer ranks go on"


def _plan_value(plan: Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
    """Plan one value: an object, a tensor, a container of such, or a plain value that ``assign`` puts in place."""
    if type(live) is PerRank:

        def put(value: Any) -> None:
            live.value = value

        _plan_value(plan, saved, live.value, path, put)
    elif isinstance(live, torch.Tensor):
        if isinstance(saved, SavedTensor):
            plan.into_tensor(saved, live, path)
        else:
            plan.findings.misshapen.append(Misshapen(path, tensor_form(live), f"a {type(saved).__name__}"))
    elif (kind := kind_of(live)) is not None:
        PLANNERS[kind](plan, saved, live, path)
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
    return has_per_rank_value(live) or next(live_objects(live), None) is not None


def _plan_mapping(plan: Plan, saved: Mapping[Any, Any], live: MutableMapping[Any, Any], path: str) -> None:
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


def _plan_sequence(plan: Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
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

    plan.install(GENERATORS_LAST - 1, replace)


def _plan_plain(plan: Plan, saved: Any, live: Any, path: str, assign: Callable[[Any], None]) -> None:
    value = plan.graft(saved, live, path, saved_device)

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
