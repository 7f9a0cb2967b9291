"""Ways to save ranks without holdfast, good and bad ones: what the harness has to tell from each other."""

from __future__ import annotations

import datetime
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lab.ranks_training import Nothing, Training

PATIENCE = datetime.timedelta(seconds=5)


class Apart(Nothing):
    """Each rank saves with torch.save into a directory of its own, all at the same step, and waits for the others.

    Args:
        directory: of the run.
        training: what is saved.
        save_batches: after how many batches.
        forget: what is not restored: ``"generators"``, ``"loader"``, ``"optimizer"``; or nothing.
        agree: whether all resume from the newest that all have; else each from its own newest.
    """

    def __init__(
        self, directory: Path, training: Training, *, save_batches: int, forget: str = "", agree: bool = True
    ) -> None:
        super().__init__()
        self._directory = directory / f"rank-{dist.get_rank()}"
        self._training = training
        self._save_batches = save_batches
        self._forget = forget
        self._agree = agree
        self._batches = 0

    def step(self, *, accumulating: bool = False) -> None:
        """See :class:`Nothing`."""
        super().step(accumulating=accumulating)
        self._batches += 1
        if self._batches % self._save_batches == 0:
            self._save()

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """See :class:`Nothing`."""
        self._training.loader.end_epoch()
        super().end_epoch(metrics)

    def __enter__(self) -> Apart:
        self._training.loader.wait_for_end_epoch()
        self._directory.mkdir(parents=True, exist_ok=True)
        newest = max((int(path.stem) for path in self._directory.glob("*.pt")), default=0)
        if self._agree:
            least = torch.tensor(newest)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            newest = int(least)
        if newest:
            self._load(torch.load(self._directory / f"{newest}.pt", weights_only=False))
        return self

    def _save(self) -> None:
        training = self._training
        saved = {
            "model": training.bare.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "scheduler": training.scheduler.state_dict(),
            "loader": training.loader.state_dict(),
            "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "gradients": [parameter.grad for parameter in training.bare.parameters()],
            "progress": (self.epoch, self.global_step, self.accumulated, self._batches),
        }
        temporary = self._directory / "temporary"
        torch.save(saved, temporary)
        temporary.rename(self._directory / f"{self._batches}.pt")
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Until every rank has saved; by messages, as a save in the background would have to."""
        store = _get_default_store()
        store.set(f"saved/{self._batches}/{dist.get_rank()}", "")
        store.wait([f"saved/{self._batches}/{rank}" for rank in range(dist.get_world_size())], PATIENCE)

    def _load(self, saved: dict[str, Any]) -> None:
        training = self._training
        training.bare.load_state_dict(saved["model"])
        if self._forget != "optimizer":
            training.optimizer.load_state_dict(saved["optimizer"])
        training.scheduler.load_state_dict(saved["scheduler"])
        if self._forget != "loader":
            training.loader.load_state_dict(saved["loader"])
        for parameter, gradient in zip(training.bare.parameters(), saved["gradients"], strict=True):
            parameter.grad = gradient
        if self._forget != "generators":
            random.setstate(saved["generators"][0])
            np.random.set_state(saved["generators"][1])
            torch.set_rng_state(saved["generators"][2])
        self.epoch, self.global_step, self.accumulated, self._batches = saved["progress"]
