"""``torchsnapshot``, a new directory for each state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peers.peer import LAST, Saves, tensors, workloads

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it was written for an older PyTorch
    from torchsnapshot import Snapshot, StateDict


@dataclass(frozen=True, slots=True)
class Torchsnapshot:
    """``Snapshot.take``."""

    name: str = "torchsnapshot"
    package: str = "torchsnapshot"
    keeps: int = 0

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                Snapshot.take(path=str(directory / self.name_of(number)), app_state={"state": StateDict(**state)})

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return f"step-{number}"

    def visible(self, directory: Path) -> list[str]:
        """Those with metadata, which are written last."""
        return sorted(path.parent.name for path in directory.glob("step-*/.snapshot_metadata"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        state = StateDict(**{key: torch.full_like(tensor, 9) for key, tensor in tensors(0).items()})
        Snapshot(str(directory / name)).restore({"state": state})
        return dict(state)


PEERS = (Torchsnapshot(),)
WORKLOADS = workloads(*PEERS)
