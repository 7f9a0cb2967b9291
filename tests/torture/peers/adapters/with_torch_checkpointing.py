"""``torch_checkpointing``, saving synchronously, a new directory for each state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from peers.peer import LAST, Saves, tensors, workloads


def manager() -> CheckpointManager:
    """As its documentation says for machines without CUDA; ext4 and XFS refuse its unaligned writes under O_DIRECT."""
    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(config)


@dataclass(frozen=True, slots=True)
class TorchCheckpointing:
    """One manager for all saves."""

    name: str = "torch_checkpointing"
    package: str = "torch-checkpointing"
    keeps: int = 0

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        saver = manager()
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                saver.save(str(directory / self.name_of(number)), {"state": state})
        saver.close()

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return f"step-{number}"

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        return sorted(path.name for path in directory.glob("step-*"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        state = {key: torch.full_like(tensor, 9) for key, tensor in tensors(0).items()}
        loader = manager()
        try:
            loaded: Mapping[str, Tensor] = loader.load(str(directory / name), into={"state": state})["state"]
        finally:
            loader.close()
        return loaded


PEERS = (TorchCheckpointing(),)
WORKLOADS = workloads(*PEERS)
