"""Training time lost per background save: steps of a real training with and without saves, in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measures
from benchmarks.background import BackgroundPeer, Session, Wait
from benchmarks.files import remove
from benchmarks.rounds import Figures, Samples, interleave
from benchmarks.workloads import Workload

SAVES = 4
"""Stretches with a save in one turn; there is one more without."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some steps of a training: seconds of all together, of the optimizer's part of each, and how long that waited."""

    seconds: float
    optimizer: tuple[float, ...]
    waited_s: float = 0.0


class Training:
    """A residual network trained with AdamW on random regression data, in float32 on all cores.

    Args:
        scale: ``"full"`` has a state of 308 MB.
        seed: of the parameters and the data.
    """

    def __init__(self, scale: str, seed: int) -> None:
        width, blocks, self.batch, self.steps = (896, 4, 64, 8) if scale == "full" else (64, 2, 16, 3)
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._inputs = torch.randn(self.batch, width)
        self._targets = torch.randn(self.batch, width)
        self.step(nullcontext())  # makes the optimizer's state

    @property
    def workload(self) -> Workload:
        """The state; its tensors are the live ones."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{slot}"] = value
        return Workload({"model": self.model, "optimizer": self.optimizer}, tensors)

    def step(self, guard: AbstractContextManager[object]) -> float:
        """One step; returns the seconds of the optimizer's part of it."""
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self._inputs), self._targets).backward()
        start = time.perf_counter()
        with guard:
            self.optimizer.step()
        return time.perf_counter() - start


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, inputs: torch.Tensor) -> Any:
        return inputs + self.down(F.gelu(self.up(self.norm(inputs))))


@dataclass(frozen=True)
class NoSave:
    """Saves nothing: what it loses is the noise of the measurement."""

    name: str = measures.NO_SAVE
    package: str = "torch"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`benchmarks.background.BackgroundPeer`."""
        yield _NoSession()


class _NoSession:
    waited_s = 0.0

    def save(self) -> Wait:
        return lambda: 0

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def stepped(self) -> None:
        return

    @property
    def newest(self) -> Path:
        raise LookupError("nothing was saved")

    def load(self, live: Workload) -> None:
        raise LookupError("nothing was saved")


def training_rounds(
    peers: Sequence[BackgroundPeer], training: Training, directory: Path, rounds: int, tell: Callable[[str], None]
) -> Samples:
    """Measure every peer, and nobody, in each round."""
    turns: dict[str, Callable[[], Figures]] = {
        peer.name: partial(measure_peer, peer, training, directory / "training") for peer in (*peers, NoSave())
    }
    return interleave(turns, rounds, tell)


def measure_peer(peer: BackgroundPeer, training: Training, directory: Path) -> Figures:
    """Stretches of steps without and with a save, in turn, after a first save that is not counted."""
    os.sync()
    try:
        with peer.open(training.workload, directory) as session:
            session.save()()
            _stretch(training, session, save=False)
            stretches = [_stretch(training, session, save=number % 2 == 1) for number in range(2 * SAVES + 1)]
    finally:
        remove(directory)
    return lost(stretches)


def lost(stretches: Sequence[Stretch]) -> Figures:
    """What saves cost, from stretches without and with a save in turn, the first and the last without.

    A stretch with a save is compared with the mean of its two neighbours, so that a machine that gets slower or
    faster meanwhile counts for nothing; the median over the saves is returned.
    """
    times: list[float] = []
    longer: list[float] = []
    for before, saving, after in zip(stretches[::2], stretches[1::2], stretches[2::2], strict=False):
        times.append(saving.seconds - (before.seconds + after.seconds) / 2)
        longer.append(saving.optimizer[0] - statistics.median([*before.optimizer, *after.optimizer]))
    return {
        measures.LOST: statistics.median(times),
        measures.WAITED: statistics.median(stretch.waited_s for stretch in stretches[1::2]),
        measures.LONGER: statistics.median(longer),
    }


def _stretch(training: Training, session: Session, *, save: bool) -> Stretch:
    """Some steps, with a save before the first one if asked for.

    A save that takes longer than the steps is waited for, so that it costs here what it costs.
    """
    waited_s, start = session.waited_s, time.perf_counter()
    wait = session.save() if save else None
    optimizer = []
    for _ in range(training.steps):
        optimizer.append(training.step(session.guard()))
        session.stepped()
    if wait is not None:
        wait()
    return Stretch(time.perf_counter() - start, tuple(optimizer), session.waited_s - waited_s)
