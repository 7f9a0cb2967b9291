"""Tensors that each process holds whole although they are not the same everywhere: whose value counts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from holdfast.state.kinds import Kind, live_objects
from holdfast.state.modules import name_cleaner


def authoritative(state: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """By entry, the tensors of which what rank 0 has counts: it gives them to the others before each forward.

    These are the buffers of a module under DistributedDataParallel, unless ``broadcast_buffers=False``.
    """
    parallel = sys.modules.get("torch.nn.parallel")
    found: dict[str, set[str]] = {}
    if parallel is None:
        return {}
    for path, value, kind in live_objects(state):
        if kind is not Kind.MODULE:
            continue
        clean = name_cleaner(value)
        entry, _, rest = path.partition(".")
        for name, module in value.named_modules():
            if isinstance(module, parallel.DistributedDataParallel) and module.broadcast_buffers:
                for buffer, _ in module.named_buffers(prefix=name, remove_duplicate=False):
                    found.setdefault(entry, set()).add(".".join(part for part in (rest, clean(buffer)) if part))
    return {entry: frozenset(names) for entry, names in found.items()}
