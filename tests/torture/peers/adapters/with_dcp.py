"""``torch.distributed.checkpoint``, one process, a new directory for each state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from peers.peer import LAST, Saves, tensors, workloads

# One process is what is meant, and that it is alone is no news here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True, slots=True)
class DCP:
    """With its defaults: ``FileSystemWriter(path)``, which has ``sync_files=True``."""

    name: str = "torch.distributed.checkpoint"
    package: str = "torch"
    keeps: int = 0

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                writer = FileSystemWriter(directory / self.name_of(number))
                save(state, storage_writer=writer, no_dist=True)

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return f"step-{number}"

    def visible(self, directory: Path) -> list[str]:
        """Those with metadata, which are written last."""
        return sorted(path.parent.name for path in directory.glob("step-*/.metadata"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        state = {key: torch.full_like(tensor, 9) for key, tensor in tensors(0).items()}
        load(state, storage_reader=FileSystemReader(directory / name), no_dist=True)
        return state


PEERS = (DCP(),)
WORKLOADS = workloads(*PEERS)
