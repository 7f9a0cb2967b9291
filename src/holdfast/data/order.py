"""The order of an epoch: the loader's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from holdfast.data.fetching import BatchKey
from holdfast.data.places import FRESH_EPOCH, Cursor, logger, mismatch
from holdfast.data.seeding import hashed

Indices = np.ndarray[Any, np.dtype[np.int64]]


class Order(Protocol):
    """Which samples an epoch has, in batches.

    Attributes:
        name: says in the state what kind of order it was.
    """

    name: str

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        ...

    def keys(self, seed: int, epoch: int, after: Cursor) -> Iterator[tuple[BatchKey, Cursor]]:
        """The batches of an epoch after a place in it, each with the place after it.

        Raises:
            StateMismatchError: the order differs from what was consumed.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What else is needed to make the epoch's order again."""
        ...

    def load(self, state: Mapping[str, Any], cursor: Cursor) -> Cursor:
        """Take back what ``state`` returned; gives the cursor as it reads here."""
        ...

    def next_epoch(self) -> None:
        """What was needed for this epoch's order is needed no more."""
        ...


class OwnOrder:
    """First to last, or shuffled by the loader's seed and the epoch; dealt out to the ranks like cards.

    Args:
        dataset: has a length.
        batch_size: samples in a batch of one rank; None gives single samples.
        shuffle: whether the order is random.
        drop_last: leave out what does not fill a batch on every rank; otherwise ranks are filled from the beginning.
        ranks: whose samples to give, and how many ranks there are.
    """

    name = "own"

    def __init__(
        self, dataset: Any, batch_size: int | None, *, shuffle: bool, drop_last: bool, ranks: tuple[int, int]
    ) -> None:
        self._dataset = dataset
        self._batched = batch_size is not None
        self._batch_size = batch_size or 1
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank, self._world_size = ranks

    def __len__(self) -> int:
        per_rank = self._per_rank(len(self._dataset))
        return per_rank // self._batch_size if self._drop_last else -(-per_rank // self._batch_size)

    def keys(self, seed: int, epoch: int, after: Cursor) -> Iterator[tuple[BatchKey, Cursor]]:
        """See :class:`Order`. Nothing is skipped: an order that is known as a whole is entered at any place."""
        length = len(self._dataset)
        order = self._shuffled(length, seed, epoch) if self._shuffle else None
        digest = "in order" if order is None else xxhash.xxh3_128_hexdigest(order.data)
        if after.position and digest != after.digest:
            raise mismatch(
                "order",
                f"another one (shuffle={after.digest != 'in order'})",
                f"shuffle={self._shuffle}",
                "Was shuffle= changed, or PyTorch updated to one that shuffles differently? "
                + FRESH_EPOCH.format(next_epoch=epoch + 1),
            )
        return self._keys(seed, epoch, Cursor(after.position, after.samples, digest), order, length)

    def _keys(
        self, seed: int, epoch: int, after: Cursor, order: Indices | None, length: int
    ) -> Iterator[tuple[BatchKey, Cursor]]:
        stride = self._world_size
        per_rank = self._per_rank(length - after.samples)
        for number, begin in enumerate(range(0, per_rank, self._batch_size)):
            count = min(self._batch_size, per_rank - begin)
            if count < self._batch_size and self._drop_last:
                return
            first = after.samples + begin * stride + self._rank
            positions = np.arange(first, first + count * stride, stride, dtype=np.int64) % length
            indices = (positions if order is None else order[positions]).tolist()
            cursor = Cursor(after.position + number + 1, after.samples + (begin + count) * stride, after.digest)
            yield BatchKey(number, seed, epoch, first, stride, indices if self._batched else indices[0]), cursor

    def state(self) -> dict[str, Any]:
        """Seed and epoch are all it takes; the rest says how the epoch was cut into batches."""
        return {"batch_size": self._batch_size, "world_size": self._world_size}

    def load(self, state: Mapping[str, Any], cursor: Cursor) -> Cursor:
        """See :class:`Order`. The place counts samples over all ranks, so that another cut continues there."""
        saved = (state.get("batch_size"), state.get("world_size"))
        if not cursor.position or saved == (self._batch_size, self._world_size):
            return cursor
        together = self._batch_size * self._world_size
        logger.warning(
            "the loader's epoch was begun with batch_size=%s on %s ranks and goes on with batch_size=%d on %d: %s",
            *saved,
            self._batch_size,
            self._world_size,
            f"it continues after {cursor.samples} samples, and no sample is repeated or left out"
            + (
                "."
                if cursor.samples % together == 0
                else f"; but {together} samples at a time do not end there, so that its batches are not those that an "
                "epoch begun this way has."
            ),
        )
        return Cursor(-(-cursor.samples // together), cursor.samples, cursor.digest)

    def next_epoch(self) -> None:
        """Nothing is kept."""

    def _per_rank(self, samples: int) -> int:
        samples = max(samples, 0)
        return samples // self._world_size if self._drop_last else -(-samples // self._world_size)

    def _shuffled(self, length: int, seed: int, epoch: int) -> Indices:
        generator = torch.Generator()
        generator.manual_seed(hashed(seed, epoch, "order") >> 64)
        shuffled: Indices = torch.randperm(length, generator=generator).numpy()
        return shuffled
