"""``safetensors.torch.save_file``, a new file for each state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from peers.peer import LAST, Saves, workloads


@dataclass(frozen=True, slots=True)
class Safetensors:
    """It writes a file; which one, and what is removed, is left to its users."""

    name: str = "safetensors"
    package: str = "safetensors"
    keeps: int = 0

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                save_file(state, directory / self.name_of(number))

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return f"step-{number}.safetensors"

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        return sorted(path.name for path in directory.glob("step-*.safetensors"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        return {key: tensor.clone() for key, tensor in load_file(directory / name).items()}


PEERS = (Safetensors(),)
WORKLOADS = workloads(*PEERS)
