"""Trainings that do not resume exactly, one for each mistake that people make. Each function builds one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

Training = tuple[dict[str, Any], Callable[[], Any]]

INPUTS, TARGETS = torch.linspace(-1, 1, 64).reshape(16, 4), torch.linspace(1, -1, 16).reshape(16, 1)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor = INPUTS, scale: Any = 1.0) -> Tensor:
    """One step of the usual loop."""
    loss = mse_loss(model(inputs) * scale, TARGETS[: len(inputs)])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def loader_across_the_border() -> Training:
    """A shuffled loader is half read when it is saved: the resumed run begins it anew."""
    model, optimizer = parts()
    loader = DataLoader(TensorDataset(INPUTS), batch_size=2, shuffle=True)

    def forever() -> Iterator[Tensor]:
        while True:
            for (batch,) in loader:
                yield batch

    batches = forever()
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, next(batches))


def iterator_over_a_list() -> Training:
    """An iterator that the new process has at its beginning."""
    model, optimizer = parts()
    rows = iter(list(INPUTS.split(2)))
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, next(rows))


def optimizer_forgotten() -> Training:
    """The moments of AdamW start from nothing."""
    model, optimizer = parts()
    return {"model": model}, lambda: learn(model, optimizer)


def scheduler_forgotten() -> Training:
    """The learning rate is restored with the optimizer; the scheduler that changes it is not."""
    model, optimizer = parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    def step() -> Tensor:
        loss = learn(model, optimizer)
        scheduler.step()
        return loss

    return {"model": model, "optimizer": optimizer}, step


def hidden_in_a_closure() -> Training:
    """A recurrent network's state, carried from step to step in a variable."""
    model, optimizer = parts()
    hidden = torch.zeros(4)

    def step() -> Tensor:
        nonlocal hidden
        hidden = hidden * 0.5 + INPUTS.mean(dim=0) + 1
        return learn(model, optimizer, INPUTS + hidden)

    return {"model": model, "optimizer": optimizer}, step


def generator_of_its_own() -> Training:
    """A numpy generator that nobody saves."""
    model, optimizer = parts()
    noise = np.random.default_rng(0)
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, scale=noise.normal())


class Curriculum:
    """Makes steps harder; forgets half of itself when it is loaded."""

    def __init__(self) -> None:
        self.level, self.seen = 1.0, 0

    def advance(self) -> float:
        """The scale of the next step."""
        self.seen += 1
        self.level *= 1 + self.seen
        return self.level

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"level": self.level, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Half of it."""
        self.level = state["level"]


def half_loaded() -> Training:
    """An object whose ``load_state_dict`` drops a field."""
    model, optimizer = parts()
    curriculum = Curriculum()
    state = {"model": model, "optimizer": optimizer, "curriculum": curriculum}
    return state, lambda: learn(model, optimizer, scale=curriculum.advance())


class Smoothed(nn.Module):
    """Divides by a running scale."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(()), persistent=persistent)

    def forward(self, inputs: Tensor) -> Tensor:
        """The scale changes with each pass."""
        self.scale: Tensor = self.scale * 1.5
        outputs: Tensor = self.inner(inputs) / self.scale
        return outputs


def buffer_not_persistent() -> Training:
    """A buffer that ``state_dict()`` leaves out."""
    torch.manual_seed(0)
    model = Smoothed(persistent=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer)


def counter_in_a_closure() -> Training:
    """A warm-up that counts for itself."""
    model, optimizer = parts()
    count = 0

    def step() -> Tensor:
        nonlocal count
        count += 1
        return learn(model, optimizer, scale=min(1.0, count / 10))

    return {"model": model, "optimizer": optimizer}, step


class Trainer:
    """A training as a class, with a field that is not saved."""

    def __init__(self) -> None:
        self.model, self.optimizer = parts()
        self.average = 0.0

    def step(self) -> Tensor:
        """One step, scaled by a running average of losses."""
        loss = learn(self.model, self.optimizer, scale=1 + self.average)
        self.average = 0.9 * self.average + loss.item()
        return loss


def attribute_of_a_trainer() -> Training:
    """A field of the object whose method ``step`` is."""
    trainer = Trainer()
    return {"model": trainer.model, "optimizer": trainer.optimizer}, trainer.step


def gradients_waiting() -> Training:
    """Gradients of two steps are added up, and the save falls between them."""
    model, optimizer = parts()
    counts = {"steps": 1}

    def step() -> Tensor:
        loss = mse_loss(model(INPUTS + counts["steps"]), TARGETS)
        loss.backward()
        counts["steps"] += 1
        if counts["steps"] % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return {"model": model, "optimizer": optimizer, "counts": counts}, step


def left_in_eval() -> Training:
    """An evaluation leaves the model in eval mode, and the training goes on like that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> Tensor:
        loss = learn(model, optimizer)
        model.eval()
        return loss

    return {"model": model, "optimizer": optimizer}, step


def order_of_a_set() -> Training:
    """Words get their numbers in the order in which a set gives them."""
    model, optimizer = parts()
    words = list({f"word {number}" for number in range(16)})
    order = torch.tensor([int(word.split()[1]) for word in words])
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, INPUTS[order])


def never_seeded() -> Training:
    """The data is split by a generator that nobody seeds."""
    model, optimizer = parts()
    order = torch.from_numpy(np.random.permutation(16))
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, INPUTS[order])


def by_the_clock() -> Training:
    """The noise of a step is seeded by the time."""
    model, optimizer = parts()
    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, scale=time.time_ns() % 997)


def by_the_system() -> Training:
    """A generator without a seed takes one from the system."""
    model, optimizer = parts()
    noise = random.Random(os.urandom(8))
    return {"model": model, "optimizer": optimizer, "noise": noise}, lambda: learn(
        model, optimizer, scale=noise.random()
    )


def racing_operator() -> Training:
    """As a GPU where two threads write to one place: chance says which of them is the last.

    Threads of this machine race too, but not on every machine, and not every time.
    """
    model, optimizer = parts()
    place = torch.tensor([0, 0])

    def step() -> Tensor:
        chance = 0 if torch.are_deterministic_algorithms_enabled() else int.from_bytes(os.urandom(2))
        won = torch.zeros(1).put_(place, torch.tensor([1.0, 1 + chance * 2**-20]))
        return learn(model, optimizer, scale=won.sum())

    return {"model": model, "optimizer": optimizer}, step


def benchmarked() -> Training:
    """As a GPU with benchmark on: chance makes one algorithm the fastest, and each rounds differently."""
    model, optimizer = parts()
    torch.backends.cudnn.benchmark = True

    def rounded() -> float:
        fastest = int.from_bytes(os.urandom(2)) if torch.backends.cudnn.benchmark else 0
        return 1 + fastest * 2**-20

    return {"model": model, "optimizer": optimizer}, lambda: learn(model, optimizer, scale=rounded())
