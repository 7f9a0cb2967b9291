"""The training that all ranks do, the same in every layout, and what it comes to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from holdfast.data import ResumableDataLoader
from lab.ranks_model import LAYOUTS, PLACES, SYMBOLS, Small, gathered, grads, local


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a training is like.

    Attributes:
        layout: how the ranks share the model; one of :data:`lab.ranks_model.LAYOUTS`.
        epochs: how many.
        samples: in an epoch.
        batch: samples in a batch of all ranks together.
        accumulate: batches in an optimizer step.
        seed: of everything.
        batch_norm: whether the model has it.
    """

    layout: str = "ddp"
    epochs: int = 3
    samples: int = 28
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    batch_norm: bool = False


class Samples(torch.utils.data.Dataset[tuple[int, Tensor, Tensor, Tensor]]):
    """Symbols, one of which is drawn anew each time that a sample is looked at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor]:
        symbols = (torch.arange(PLACES) * 7 + index * 3) % SYMBOLS
        symbols[index % PLACES] = random.randrange(SYMBOLS)
        return index, symbols, torch.tensor(index * 5 % SYMBOLS), torch.tensor(index % 5)


class Training:
    """All that a training is made of, as one rank has it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.laid = LAYOUTS[settings.layout](Small(batch_norm=settings.batch_norm))
        self.model, self.bare = self.laid.model, self.laid.bare
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)  # plain tensors beside sharded ones
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.loader = ResumableDataLoader(
            Samples(settings.samples),
            batch_size=settings.batch // self.laid.data_ranks,
            shuffle=True,
            seed=settings.seed,
            rank=self.laid.data_rank,
            world_size=self.laid.data_ranks,
        )
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }
        own = settings.seed + 1000 * (self.laid.data_rank + 1)  # ranks that share their data share their dropout
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)

    def batch(self, batch: Any, *, last: bool) -> dict[str, Any]:
        """Add the gradients of one batch; what there is to say of it. ``last``: the optimizer's step follows."""
        indices, symbols, following, kinds = batch
        with self._together(last):
            scores, classes = self.model(symbols)
            loss = cross_entropy(scores, following) + cross_entropy(classes, kinds)
            (loss / self.settings.accumulate).backward()
        return {"ids": indices.tolist(), "loss": loss.item()}

    def optimize(self) -> None:
        """One step of the optimizer, with the gradients that wait."""
        self.laid.average()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _together(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange their gradients with the last batch only, where that is the custom."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    # ------------------------------------------------------------------------------------------- what it came to

    def gathered(self) -> dict[str, str]:
        """A digest of each whole tensor of model and optimizer, by name; all ranks have to call it."""
        return {name: digest(tensor) for name, tensor in gathered(self.bare, self.optimizer).items()}

    def own(self) -> dict[str, str]:
        """Digests of what this rank has."""
        own_tensors = {name: digest(tensor) for name, tensor in local(self.bare, self.optimizer)}
        return {
            "tensors": digest(own_tensors),
            "gradients": digest({name: digest(tensor) for name, tensor in grads(self.bare).items()}),
            "scheduler": digest(self.scheduler.state_dict()),
            "loader": digest(self.loader.state_dict()),
            "random": digest(random.getstate()),
            "numpy": digest(str(np.random.get_state())),
            "torch": digest(torch.get_rng_state()),
        }


def digest(value: Any) -> str:
    """A line that stands for a tensor's bits, or for plain values."""
    if isinstance(value, Tensor):
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:32]}"
    return hashlib.sha256(repr(_sorted(value)).encode()).hexdigest()[:32]


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(str(key), _sorted(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return digest(value) if isinstance(value, Tensor) else value


class Log:
    """A line for each batch of a rank. What a process repeats after a restart is there twice, and must be the same."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"log-{dist.get_rank():03d}.jsonl"

    def add(self, told: Mapping[str, Any]) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    @staticmethod
    def read(directory: Path, rank: int) -> list[dict[str, Any]]:
        """The batches of a rank in their order.

        Raises:
            AssertionError: a batch that was repeated was another one.
        """
        found: dict[tuple[int, int], dict[str, Any]] = {}
        lines = (directory / f"log-{rank:03d}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            told = json.loads(line)
            place = told["epoch"], told["position"]
            first = found.setdefault(place, told)
            assert first == told, f"rank {rank} repeated another batch: {first}, then {told}"
        return [found[place] for place in sorted(found)]


def together(directory: Path, world_size: int) -> list[list[int]]:
    """The samples of each batch of all ranks together, in the order in which they were dealt out."""
    logs = [Log.read(directory, rank) for rank in range(world_size)]
    batches = zip(*([told["ids"] for told in log] for log in logs), strict=True)
    return [list(_dealt(batch)) for batch in batches]


def _dealt(hands: tuple[list[int], ...]) -> Iterator[int]:
    for cards in zip(*hands, strict=True):
        yield from cards


def settings_of(arguments: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """The settings among some arguments, and the others."""
    names = {field.name for field in dataclasses.fields(Settings)}
    chosen = {name: value for name, value in arguments.items() if name in names}
    return Settings(**chosen), {name: value for name, value in arguments.items() if name not in names}


class Nothing:
    """Saves nothing; a Checkpointer otherwise, as far as the training asks."""

    def __init__(self) -> None:
        self.epoch = self.global_step = self.accumulated = 0

    def step(self, *, accumulating: bool = False) -> None:
        """One batch is done."""
        self.global_step += not accumulating
        self.accumulated = self.accumulated + 1 if accumulating else 0

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """One epoch is done."""
        del metrics
        self.epoch += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
