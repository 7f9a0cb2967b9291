"""Orbax's ``CheckpointManager``, with NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from orbax import checkpoint as orbax
from torch import Tensor

from peers.peer import LAST, Saves, tensors, workloads


def manager(directory: Path) -> orbax.CheckpointManager:
    """Keeps two, and has saved when its call returns."""
    options = orbax.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return orbax.CheckpointManager(directory.resolve(), options=options)


@dataclass(frozen=True, slots=True)
class Orbax:
    """Its own rotation, and its own list of steps."""

    name: str = "Orbax"
    package: str = "orbax-checkpoint"
    keeps: int = 2

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        with manager(directory) as saver:
            for number in range(1, LAST + 1):
                with saves.each(number) as state:
                    arrays = {name: tensor.numpy() for name, tensor in state.items()}
                    saver.save(number, args=orbax.args.PyTreeSave(arrays))
                    saver.wait_until_finished()

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return str(number)

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        with manager(directory) as saver:
            return [str(step) for step in sorted(saver.all_steps())]

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        wanted = {key: orbax.RestoreArgs(restore_type=np.ndarray) for key in tensors(0)}
        with manager(directory) as saver:
            loaded = saver.restore(int(name), args=orbax.args.PyTreeRestore(restore_args=wanted))
        return {key: torch.from_numpy(array) for key, array in loaded.items()}


PEERS = (Orbax(),)
WORKLOADS = workloads(*PEERS)
