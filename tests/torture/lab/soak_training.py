"""The training that a soak repeats: small, and made of everything that has to come back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from digest import digest
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from holdfast import KeepBest, KeepEvery, KeepLast
from holdfast.data import ResumableDataLoader
from holdfast.run import Retention

FEATURES = 16
SAMPLES = 192
BATCH_SIZE = 8
STEPS_PER_EPOCH = SAMPLES // BATCH_SIZE
KEPT_LAST = 3
FROZEN_BYTES = 16 * 2**10


def retention(kept_every: int) -> Retention:
    """What trainer and pruner keep."""
    return KeepLast(KEPT_LAST) | KeepBest("loss", "min") | KeepEvery(steps=kept_every)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples that each draw from all generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = torch.linspace(-1, 1, FEATURES) + index / SAMPLES
        noise = torch.rand(FEATURES) + random.random() + float(np.random.uniform())
        return place + 0.01 * noise, torch.sin(3 * place.sum()).reshape(1)


class Net(nn.Module):
    """A frozen backbone, a norm with buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Parameter(torch.randn(FROZEN_BYTES // 4 // FEATURES, FEATURES), requires_grad=False)
        self.body = nn.Sequential(
            *(nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
        )

    def forward(self, value: Tensor) -> Tensor:
        """What is predicted of a batch."""
        out: Tensor = self.body(value * self.backbone[0].tanh())
        return out


@dataclass(slots=True)
class Training:
    """The live objects."""

    model: Net
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: ResumableDataLoader

    @property
    def state(self) -> dict[str, Any]:
        """As Holdfast is given it."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def epoch(self) -> Iterator[None]:
        """Learn from what is left of an epoch; comes up for air after each optimizer step."""
        self.model.train()
        for inputs, targets in self.loader:
            scale = 1 + 0.01 * (random.random() + float(np.random.uniform()))
            loss = functional.mse_loss(self.model(inputs * scale), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield

    @torch.no_grad()
    def measure(self) -> float:
        """A loss on samples that are always the same."""
        self.model.eval()
        inputs = torch.linspace(-1, 1, FEATURES) + torch.linspace(0, 1, 32).reshape(-1, 1)
        loss = functional.mse_loss(self.model(inputs), torch.sin(3 * inputs.sum(1, keepdim=True)))
        self.model.train()
        return loss.item()


def make_training(seed: int, workers: int = 0) -> Training:
    """As it is before its first step; the same for the same seed, however many workers load the data."""
    torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7)
    loader = ResumableDataLoader(Noisy(), batch_size=BATCH_SIZE, shuffle=True, seed=seed, num_workers=workers)
    return Training(model, optimizer, scheduler, loader)


@dataclass(frozen=True, slots=True)
class Digest:
    """What stands for every bit of the training at one moment: its objects, and the global generators."""

    contents: str
    generators: str


def digest_of(training: Training) -> Digest:
    """Of the live objects."""
    names = [f"model.{name}" for name, p in training.model.named_parameters() if p.requires_grad]
    optimizer = training.optimizer.state_dict()
    named = {"state": {names[index]: value for index, value in optimizer["state"].items()}}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in optimizer["param_groups"]]
    contents = {
        "model": training.model.state_dict(),
        "optimizer": {**named, "param_groups": groups},
        "scheduler": training.scheduler.state_dict(),
        "loader": training.loader.state_dict(),
    }
    generators = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()]
    return Digest(digest_of_loaded(contents), digest(generators))


def digest_of_loaded(loaded: Mapping[str, Any]) -> str:
    """``Digest.contents`` of what ``holdfast.load`` returned."""
    return digest({name: loaded[name] for name in ("model", "optimizer", "scheduler", "loader")})
