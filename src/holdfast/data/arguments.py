"""The arguments of a loader: which exclude each other, and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import IterableDataset, IterDataPipe, MapDataPipe, default_collate, default_convert

from holdfast.data.feeds import Feed, MapFeed
from holdfast.data.fetching import Collate
from holdfast.data.order import OwnOrder
from holdfast.data.samplers import SamplerOrder
from holdfast.data.streaming import StreamFeed
from holdfast.errors import UsageError


def make_feed(
    dataset: Any,
    batch_size: int | None,
    *,
    shuffle: bool,
    sampler: Any,
    batch_sampler: Any,
    collate: Collate | None,
    drop_last: bool,
    ranks: tuple[int, int],
    init: Callable[[int], object] | None,
    options: Mapping[str, Any],
) -> Feed:
    """What a loader with these arguments iterates over."""
    batched = batch_sampler is not None or batch_size is not None
    collate = collate or (default_collate if batched else default_convert)
    if isinstance(dataset, IterableDataset):
        return StreamFeed(
            dataset, collate, batch_size=batch_size, drop_last=drop_last, ranks=ranks, init=init, options=options
        )
    order: OwnOrder | SamplerOrder
    if batch_sampler is not None:
        order = SamplerOrder(batch_sampler, None, drop_last=False, gives_batches=True)
    elif sampler is not None:
        order = SamplerOrder(sampler, batch_size, drop_last=drop_last, gives_batches=False)
    else:
        order = OwnOrder(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, ranks=ranks)
    return MapFeed(dataset, order, collate, batched=batched, init=init, options=options)


def check_data(dataset: Any, shuffle: bool, sampler: Any, batch_sampler: Any) -> None:
    """Refuse data that a place cannot be kept in."""
    if isinstance(dataset, (IterDataPipe, MapDataPipe)):
        raise UsageError(
            "dataset: expected a Dataset or an IterableDataset, found a data pipe, which PyTorch's loader shards in "
            "ways of its own. Use torchdata's StatefulDataLoader for it.",
            key="dataset",
        )
    if not isinstance(dataset, IterableDataset):
        return
    for name, value in (("shuffle", shuffle), ("sampler", sampler), ("batch_sampler", batch_sampler)):
        if value not in (None, False):
            raise UsageError(
                f"{name}=: an IterableDataset gives its samples in its own order; leave {name} out.", key=name
            )


def check_batches(batch_size: int | None, shuffle: bool, sampler: Any, batch_sampler: Any, drop_last: bool) -> None:
    """Refuse what excludes each other, as PyTorch does."""
    if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
        raise UsageError(
            "batch_sampler=: it says how batches are made; leave batch_size, shuffle, sampler and drop_last out.",
            key="batch_sampler",
        )
    if sampler is not None and shuffle:
        raise UsageError("sampler=: it says in which order samples come; leave shuffle out.", key="sampler")
    if batch_size is None:
        if drop_last:
            raise UsageError("drop_last=True: with batch_size=None there are no batches to drop.", key="drop_last")
    elif isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size=: expected a positive number or None, found {batch_size!r}.", key="batch_size")


def check_ranks(rank: int, world_size: int, seed: int | None, has_sampler: bool) -> None:
    """Refuse ranks that would not agree on the order."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UsageError(f"seed=: expected an integer, found {seed!r}.", key="seed")
    if world_size < 1 or not 0 <= rank < world_size:
        raise UsageError(f"rank=: expected one of the {world_size} ranks, counted from 0, found {rank}.", key="rank")
    if world_size > 1 and seed is None:
        raise UsageError("seed=: several ranks need one seed for all of them, or their orders differ.", key="seed")
    if world_size > 1 and has_sampler:
        raise UsageError(
            "world_size=: the sampler says what each rank gets. Give the ranks to it, as to DistributedSampler.",
            key="world_size",
        )
