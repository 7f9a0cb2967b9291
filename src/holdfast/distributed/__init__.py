"""Checkpoints that many processes write and read together.

A training that runs in several processes needs nothing from here but :class:`PerRank`, now and then: a
:class:`holdfast.Checkpointer` finds its process group by itself.

The names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.distributed.dcp.reader import HoldfastReader
    from holdfast.distributed.dcp.writer import HoldfastWriter
    from holdfast.state.per_rank import PerRank

_HOMES = {
    "HoldfastReader": "holdfast.distributed.dcp.reader",
    "HoldfastWriter": "holdfast.distributed.dcp.writer",
    "PerRank": "holdfast.state.per_rank",
}

__all__ = ["HoldfastReader", "HoldfastWriter", "PerRank"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'holdfast.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
