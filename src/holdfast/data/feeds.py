"""What a loader iterates over: PyTorch's own loader, told batch by batch what to load and how far that leads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from holdfast.data.fetching import BatchKey, Collate, SeededDataset
from holdfast.data.order import Order
from holdfast.data.places import FRESH_EPOCH, Cursor, entry, mismatch
from holdfast.data.seeding import hashed
from holdfast.data.workers import Workers


class Feed(Protocol):
    """One kind of data, and how far its epoch was consumed.

    Attributes:
        kind: says in the state what kind of data it was.
    """

    kind: str

    @property
    def position(self) -> int:
        """Batches of the epoch that were consumed."""
        ...

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        ...

    def begin(self, seed: int, epoch: int) -> Iterator[Any]:
        """The batches that the epoch still has. What is taken from it counts as consumed."""
        ...

    def next_epoch(self, finished: bool) -> None:
        """Forget the place; ``finished`` when it was the end."""
        ...

    def state(self) -> dict[str, Any]:
        """The place, in plain values."""
        ...

    def load(self, state: Mapping[str, Any], epoch: int) -> None:
        """Go to a place that :meth:`state` returned."""
        ...


class Inner:
    """PyTorch's loader, given keys instead of indices. It makes no batches: one key is one batch.

    Args:
        dataset: is asked by key.
        init: the user's ``worker_init_fn``.
        options: the other arguments of ``torch.utils.data.DataLoader``.
    """

    def __init__(self, dataset: Any, init: Callable[[int], object] | None, options: Mapping[str, Any]) -> None:
        self._workers = Workers(init)
        self._keys = _Keys()
        self._generator = torch.Generator()
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._keys,
            collate_fn=_as_it_is,
            worker_init_fn=self._workers.start,
            generator=self._generator,
            **options,
        )

    def iterate(self, keys: Iterator[Any], seed: int, epoch: int) -> Iterator[Any]:
        """What the dataset gives for each of ``keys``, in their order."""
        # PyTorch draws the seeds of workers from this generator; without it, from the one that training draws from.
        self._generator.manual_seed(hashed(seed, epoch, "workers") >> 64)
        self._keys.next = keys
        with self._workers.being_started():
            iterator = iter(self._loader)
        self._workers.watch(getattr(iterator, "_workers", ()))
        return iterator


class _Keys:
    """A sampler that gives the keys of one pass. PyTorch asks for its iterator twice, and uses the second."""

    def __init__(self) -> None:
        self.next: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.next


def _as_it_is(batch: Any) -> Any:
    return batch


class MapFeed:
    """The batches of a map-style dataset, in an order."""

    kind = "map"

    def __init__(
        self,
        dataset: Any,
        order: Order,
        collate: Collate,
        *,
        batched: bool,
        init: Callable[[int], object] | None,
        options: Mapping[str, Any],
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._inner = Inner(SeededDataset(dataset, collate, batched), init, options)
        self._cursor = Cursor()

    @property
    def position(self) -> int:
        """Batches of the epoch that were consumed."""
        return self._cursor.position

    def __len__(self) -> int:
        return len(self._order)

    def begin(self, seed: int, epoch: int) -> Iterator[Any]:
        """See :class:`Feed`. No process is started for an epoch that has nothing left."""
        keys = self._order.keys(seed, epoch, self._cursor)
        first = next(keys, None)
        if first is None:
            return iter(())
        under_way: dict[int, Cursor] = {}
        return _MapPass(self, self._inner.iterate(_noting(first, keys, under_way), seed, epoch), under_way)

    def consumed(self, cursor: Cursor) -> None:
        """The batch before ``cursor`` was handed out."""
        self._cursor = cursor

    def next_epoch(self, finished: bool) -> None:
        """See :class:`Feed`."""
        self._cursor = Cursor()
        self._order.next_epoch()

    def state(self) -> dict[str, Any]:
        """See :class:`Feed`."""
        return {
            "position": self._cursor.position,
            "samples": self._cursor.samples,
            "digest": self._cursor.digest,
            "length": _length(self._dataset),
            "order": self._order.name,
            **self._order.state(),
        }

    def load(self, state: Mapping[str, Any], epoch: int) -> None:
        """See :class:`Feed`. At the border of two epochs the data may have changed, within one it may not."""
        cursor = Cursor(entry(state, "position", int), entry(state, "samples", int), entry(state, "digest", str))
        advice = FRESH_EPOCH.format(next_epoch=epoch + 1)
        if cursor.position and state.get("order") != self._order.name:
            raise mismatch("order", f"its {state.get('order')} order", f"its {self._order.name} order", advice)
        if cursor.position and state.get("length") != _length(self._dataset):
            raise mismatch(
                "dataset", f"{state.get('length')} samples", f"{_length(self._dataset)} in mid-epoch", advice
            )
        if state.get("order") == self._order.name:
            cursor = self._order.load(state, cursor)
        self._cursor = cursor


class _MapPass:
    """Batches from PyTorch's loader; each tells its number, and so how far it leads.

    Counting them here would go wrong after an error: it takes the place of a batch, or it does not.
    """

    def __init__(self, feed: MapFeed, inner: Iterator[Any], under_way: dict[int, Cursor]) -> None:
        self._feed = feed
        self._inner = inner
        self._under_way = under_way

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        number, batch = next(self._inner)
        self._feed.consumed(self._under_way.pop(number))
        return batch


def _noting(
    first: tuple[BatchKey, Cursor], rest: Iterator[tuple[BatchKey, Cursor]], under_way: dict[int, Cursor]
) -> Iterator[BatchKey]:
    key, under_way[first[0].number] = first
    yield key
    for key, cursor in rest:
        under_way[key.number] = cursor
        yield key


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
