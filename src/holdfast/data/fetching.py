"""Samples of a map-style dataset: each is loaded as if it were the only one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Subset, get_worker_info

from holdfast.data.seeding import seed_globals, spell, undisturbed

Collate = Callable[[Any], Any]


class BatchKey(NamedTuple):
    """Everything that a process must know to load one batch; small, and goes to it through a queue.

    Attributes:
        number: which batch of this pass over the loader it is; comes back with the batch.
        seed: of the loader.
        epoch: whose batch it is.
        first: the position of its first sample in the epoch's order, over all ranks.
        stride: how far apart its samples lie in that order: the number of ranks.
        indices: what the dataset is asked for: a list, or a single index where samples are not batched.
    """

    number: int
    seed: int
    epoch: int
    first: int
    stride: int
    indices: Any


class SeededDataset(Dataset[Any]):
    """A dataset of whole batches, asked by :class:`BatchKey`.

    Before each sample the global generators are seeded from the loader's seed, the epoch, the sample's index and its
    position in the epoch. The position is among them because a sampler may draw an index twice, and two draws should
    not get one augmentation.

    Args:
        dataset: the user's dataset.
        collate: makes a batch of a list of samples, or converts a single sample.
        batched: whether keys hold lists of indices.
    """

    def __init__(self, dataset: Any, collate: Collate, batched: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._batched = batched
        self._loads_batches = batched and loads_batches(dataset)

    def __getitem__(self, key: BatchKey) -> tuple[int, Any]:
        if get_worker_info() is not None:
            return key.number, self._load(key)
        with undisturbed():
            return key.number, self._load(key)

    def _load(self, key: BatchKey) -> Any:
        _, seed, epoch, first, stride, indices = key
        # Several ranks with samplers of their own count positions alike: their first samples tell them apart.
        of_batch = (seed, epoch, first, spell(indices[0]) if self._batched and indices else "")
        data: Any
        if self._loads_batches:
            seed_globals(*of_batch, "batch")
            data = self.dataset.__getitems__(indices)
        elif self._batched:
            data = []
            for position, index in enumerate(indices):
                seed_globals(seed, epoch, spell(index), first + position * stride)
                data.append(self.dataset[index])
        else:
            seed_globals(seed, epoch, spell(indices), first)
            data = self.dataset[indices]
        seed_globals(*of_batch, "collate")
        return self._collate(data)


def loads_batches(dataset: Any) -> bool:
    """Whether a dataset loads a whole batch in one call.

    Every ``Subset`` has the method, and only hands the call on; one of a plain dataset is better asked for each sample.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))
