"""Holdfast saves and restores the complete state of a PyTorch training run.

    with Checkpointer("runs/digits", {"model": model, "optimizer": optimizer}) as ckpt:
        for epoch in range(ckpt.epoch, 20):
            for batch in loader:
                train_step(batch)
                ckpt.step()
            ckpt.end_epoch({"val_loss": validate()})

Running the same script again continues it. The names below are loaded when they are first used: ``import holdfast``
alone does not import torch, and neither does looking at checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from holdfast._version import __version__

if TYPE_CHECKING:
    from holdfast import audit, classic, data, errors, notices
    from holdfast.checkpoint import Checkpoint, open  # noqa: A004 - the public name, used as holdfast.open
    from holdfast.checkpointer import Checkpointer
    from holdfast.format.codecs import register_codec
    from holdfast.handle import SaveHandle, SaveReport
    from holdfast.loading import load, restore
    from holdfast.policies import Every, KeepBest, KeepEvery, KeepLast
    from holdfast.preemption import Preempted, Preemption
    from holdfast.resume import Resume
    from holdfast.run import Run
    from holdfast.saving import save
    from holdfast.state.report import RestoreReport

_HOMES = {
    "Checkpoint": "checkpoint",
    "Checkpointer": "checkpointer",
    "Every": "policies",
    "KeepBest": "policies",
    "KeepEvery": "policies",
    "KeepLast": "policies",
    "Preempted": "preemption",
    "Preemption": "preemption",
    "RestoreReport": "state.report",
    "Resume": "resume",
    "Run": "run",
    "SaveHandle": "handle",
    "SaveReport": "handle",
    "load": "loading",
    "open": "checkpoint",
    "register_codec": "format.codecs",
    "restore": "loading",
    "save": "saving",
}
_MODULES = ("audit", "classic", "data", "errors", "notices")

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Every",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Preempted",
    "Preemption",
    "RestoreReport",
    "Resume",
    "Run",
    "SaveHandle",
    "SaveReport",
    "__version__",
    "audit",
    "classic",
    "data",
    "errors",
    "load",
    "notices",
    "open",
    "register_codec",
    "restore",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"holdfast.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"holdfast.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
