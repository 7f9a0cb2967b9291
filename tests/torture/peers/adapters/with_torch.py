"""``torch.save``, as the tutorials use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peers.peer import LAST, Saves, workloads

FILE = "model.pt"


@dataclass(frozen=True, slots=True)
class Tutorial:
    """``torch.save(state, path)``, the same path each time."""

    name: str = "torch.save to one path"
    package: str = "torch"
    keeps: int = 1

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                self._save(state, directory / FILE)

    def _save(self, state: dict[str, Tensor], path: Path) -> None:
        torch.save(state, path)

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return FILE

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        return [FILE] if (directory / FILE).exists() else []

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        loaded: dict[str, Tensor] = torch.load(directory / name, weights_only=True)
        return loaded


@dataclass(frozen=True, slots=True)
class Careful(Tutorial):
    """To a temporary name, which then replaces the path at once."""

    name: str = "torch.save, then os.replace"

    def _save(self, state: dict[str, Tensor], path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)  # noqa: PTH105 - as the tutorials say it


PEERS = (Tutorial(), Careful())
WORKLOADS = workloads(*PEERS)
