"""Modules under DistributedDataParallel: whose buffers count, and which sum in another order after a restart."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.state.kinds import Kind, live_objects
from holdfast.state.modules import name_cleaner


def authoritative(state: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """By entry, the tensors of which what rank 0 has counts: it gives them to the others before each forward.

    These are the buffers of a module under DistributedDataParallel, unless ``broadcast_buffers=False``.
    """
    found: dict[str, set[str]] = {}
    for path, value, name, module in _parallel_modules(state):
        if module.broadcast_buffers:
            clean = name_cleaner(value)
            entry, _, rest = path.partition(".")
            for buffer, _ in module.named_buffers(prefix=name, remove_duplicate=False):
                found.setdefault(entry, set()).add(".".join(part for part in (rest, clean(buffer)) if part))
    return {entry: frozenset(names) for entry, names in found.items()}


def reordering(state: Mapping[str, Any]) -> list[str]:
    """The paths of modules whose gradients are summed in another order in the first step of a process than later.

    DistributedDataParallel puts gradients into buckets: at first by the order of the parameters, from the second step
    on by the order in which the gradients came. Where in its bucket a gradient lies decides in which order those of the
    ranks are added up, which makes a difference to the last bits where there are more than two. With
    ``find_unused_parameters=True`` the buckets stay as they are.
    """
    return [
        ".".join(part for part in (path, name) if part)
        for path, _, name, module in _parallel_modules(state)
        if module.process_group.size() > 2 and (module.static_graph or not module.find_unused_parameters)
    ]


def _parallel_modules(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """The path of each module in a state, the module, and the name within it of what is under DDP."""
    parallel = sys.modules.get("torch.nn.parallel")
    if parallel is None:
        return
    for path, value, kind in live_objects(state):
        if kind is Kind.MODULE:
            for name, module in value.named_modules():
                if isinstance(module, parallel.DistributedDataParallel):
                    yield path, value, name, module
