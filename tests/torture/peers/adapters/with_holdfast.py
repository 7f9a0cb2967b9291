"""Holdfast's ``Checkpointer``, with a retention policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import holdfast
from holdfast import Checkpointer, Every, KeepLast, Run
from holdfast.format.names import CheckpointName
from peers.peer import LAST, Saves, tensors, workloads


@dataclass(frozen=True, slots=True)
class Holdfast:
    """It acknowledges a save by its handle."""

    name: str = "Holdfast"
    package: str = "holdfast"
    keeps: int = 2

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        state: dict[str, Any] = {"tensors": tensors(0)}
        with Checkpointer(directory, state, save=Every(steps=10**6), keep=KeepLast(self.keeps)) as checkpointer:
            for number in range(1, LAST + 1):
                checkpointer.step()
                with saves.each(number) as values:
                    for name, tensor in values.items():
                        state["tensors"][name].copy_(tensor)
                    checkpointer.save().result()

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return str(CheckpointName(number))

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        return [str(name) for name in Run(directory).names()]

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        loaded: Mapping[str, Tensor] = holdfast.load(directory / name)["tensors"]
        return loaded


PEERS = (Holdfast(),)
WORKLOADS = workloads(*PEERS)
