"""Accelerate's ``save_state`` with automatic names and a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import ProjectConfiguration
from torch import Tensor

from peers.peer import LAST, Module, Saves, number_in, workloads


@dataclass(frozen=True, slots=True)
class Accelerate:
    """It saves and restores the model and the random number generators.

    Attributes:
        random: whether the state of PyTorch's generator is looked at too.
    """

    name: str = "Accelerate, the model"
    package: str = "accelerate"
    keeps: int = 2
    random: bool = False

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        configuration = ProjectConfiguration(
            project_dir=str(directory), automatic_checkpoint_naming=True, total_limit=self.keeps
        )
        accelerator = Accelerator(cpu=True, project_config=configuration)
        module = Module()
        accelerator.prepare_model(module)
        for number in range(1, LAST + 1):
            with saves.each(number) as state:
                module.load_state_dict(state)
                torch.manual_seed(number)
                accelerator.save_state()

    def name_of(self, number: int) -> str:
        """Its names count from zero."""
        return f"checkpoint_{number - 1}"

    def visible(self, directory: Path) -> list[str]:
        """As ``load_state`` without a path finds the newest."""
        return sorted(path.name for path in (directory / "checkpoints").glob("*"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`; with another state of the generator it is no state that was saved."""
        accelerator = Accelerator(cpu=True)
        module = Module()
        accelerator.prepare_model(module)
        torch.manual_seed(9)
        accelerator.load_state(str(directory / "checkpoints" / name))
        loaded: dict[str, Tensor] = module.state_dict()
        return {} if self.random and torch.initial_seed() != number_in(loaded) else loaded


PEERS = (Accelerate(), Accelerate("Accelerate, the model and the random states", random=True))
WORKLOADS = workloads(*PEERS)
