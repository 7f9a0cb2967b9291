"""A training that a test starts as a process of its own: ``python loader_driver.py MODE [ARGUMENTS]``.

It prints one line of JSON for each batch, as soon as it has it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from typing import Any

import numpy as np
import torch

from holdfast import Checkpointer, Every
from holdfast.data import ResumableDataLoader

torch._utils.cpu_count = lambda: 16  # more workers than cores are fine here


class Pictures(torch.utils.data.Dataset[Any]):
    """Ids with augmentation."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(())], dtype=torch.float64)


class Stuck(Pictures):
    """A worker in it never comes back, and cannot be asked to: it waits outside of what Python's handlers reach."""

    def __getitem__(self, index: int) -> Any:
        if index >= 8:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            while True:
                time.sleep(1000)
        return index


def train(run: str, workers: str, kill_after: str) -> None:
    """Two epochs with a save at each step; dies after so many steps, 0 for never."""
    torch.manual_seed(1)
    loader = ResumableDataLoader(Pictures(), 4, shuffle=True, num_workers=int(workers))
    with Checkpointer(run, {"loader": loader}, save=Every(steps=1), background=False) as ckpt:
        for epoch in range(ckpt.epoch, 2):
            loader.set_epoch(epoch)
            for batch in loader:
                say([batch.tolist(), torch.rand(()).item()])
                ckpt.step()
                if loader.served == int(kill_after):
                    os.kill(os.getpid(), signal.SIGKILL)
            ckpt.end_epoch()


def spawned() -> None:
    """An epoch with workers that were started anew instead of forked."""
    loader = ResumableDataLoader(
        Pictures(), 4, seed=5, num_workers=1, multiprocessing_context="spawn", worker_init_fn=announce
    )
    for batch in loader:
        say(batch.tolist())


def announce(worker: int) -> None:
    """A ``worker_init_fn`` that a new process can import."""
    assert torch.utils.data.get_worker_info().dataset.__class__.__name__ == "Pictures"


def leave(how: str) -> None:
    """End with workers alive: held by a global, or stuck."""
    global held  # noqa: PLW0603 - that something outlives the function is what this is about
    dataset = Stuck() if how == "stuck" else Pictures()
    loader = ResumableDataLoader(dataset, 4, num_workers=2)
    held = iter(loader)
    say(len(next(held)))
    say([child.pid for child in torch.multiprocessing.active_children()])


held: Any = None


def say(what: Any) -> None:
    """Print a line."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    {"train": train, "spawned": spawned, "leave": leave}[sys.argv[1]](*sys.argv[2:])
