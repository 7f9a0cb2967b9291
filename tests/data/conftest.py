"""Data whose every number tells what was loaded, and how it was augmented."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from holdfast.format import tree


class Pictures(Dataset[Any]):
    """Each sample is its id and three "pixels" of random augmentation: Python's, numpy's and torch's.

    Args:
        count: how many there are.
        log: a file that takes the ids of what was decoded, from whichever process.
    """

    def __init__(self, count: int, log: Path | None = None) -> None:
        self.count = count
        self.log = log

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.log is not None:
            with self.log.open("ab", buffering=0) as file:
                file.write(b"%d\n" % index)
        return picture(index)


class Stream(IterableDataset[Any]):
    """Sample ids, as many for each worker as it is told."""

    def __init__(self, counts: list[int], log: Path | None = None) -> None:
        self.counts = counts
        self.log = log

    def ids(self) -> list[int]:
        """The ids that this worker has."""
        info = get_worker_info()
        worker = info.id if info else 0
        return [1000 * worker + index for index in range(self.counts[worker])]

    def sample(self, index: int) -> torch.Tensor:
        """A sample, noted."""
        if self.log is not None:
            with self.log.open("ab", buffering=0) as file:
                file.write(b"%d\n" % index)
        return picture(index)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.sample, self.ids())


class StatefulStream(Stream):
    """The same, with a state: a dictionary that it goes on changing."""

    def __init__(self, counts: list[int], log: Path | None = None) -> None:
        super().__init__(counts, log)
        self.place = {"next": 0}

    def __iter__(self) -> Iterator[torch.Tensor]:
        ids = self.ids()
        while self.place["next"] < len(ids):
            self.place["next"] += 1
            yield self.sample(ids[self.place["next"] - 1])
        self.place["next"] = 0

    def state_dict(self) -> dict[str, Any]:
        """Where it is: not a copy."""
        return self.place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        self.place = state


def picture(index: Any) -> torch.Tensor:
    """A sample."""
    pixels = [random.random(), np.random.rand(), torch.rand(()).item()]
    return torch.tensor([index, *pixels], dtype=torch.float64)


def batches(iterable: Iterable[Any], count: int | None = None) -> list[Any]:
    """The next batches, as plain numbers; the iterator goes afterwards, as at a ``break``."""
    return [torch.as_tensor(batch).tolist() for batch in islice(iterable, count)]


def ids(found: list[Any]) -> list[list[int]]:
    """The sample ids of batches."""
    return [[int(row[0]) for row in batch] for batch in found]


def flat(lists: list[list[Any]]) -> list[Any]:
    """What is in the lists."""
    return [item for items in lists for item in items]


def through_json(state: Any) -> Any:
    """A state as it comes back from a checkpoint's manifest."""
    return tree.decode(json.loads(json.dumps(tree.encode(state, "loader", NoLeaves()))), NoLeaves())


class NoLeaves:
    """States of loaders have no tensors."""

    def encode(self, value: Any, path: str) -> None:
        """None of ours."""

    def decode(self, tag: str, body: Any) -> Any:
        """None of ours."""
        raise KeyError(tag)


def resumed(loader: Any, state: Any) -> Any:
    """``loader``, at the place of ``state``."""
    loader.load_state_dict(through_json(state))
    return loader


def globals_drawn() -> list[float]:
    """A number from each global generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item(), np.random.standard_normal()]


def seed_everything(seed: int) -> None:
    """Seed the training's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the tests of loaders share."""
    return SimpleNamespace(
        Pictures=Pictures,
        Stream=Stream,
        StatefulStream=StatefulStream,
        picture=picture,
        batches=batches,
        ids=ids,
        flat=flat,
        through_json=through_json,
        resumed=resumed,
        globals_drawn=globals_drawn,
        seed_everything=seed_everything,
    )


@pytest.fixture(autouse=True)
def many_workers_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of more workers than cores; how many the machine has is not what is tested."""
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 16)


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """Every test ends its workers."""
    yield
    assert [child for child in torch.multiprocessing.active_children() if child.pid != os.getpid()] == []
