"""A loader that a resumed training continues in the middle of an epoch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from holdfast.data.arguments import check_batches, check_data, check_ranks, make_feed
from holdfast.data.fetching import Collate
from holdfast.data.places import entry, logger, mismatch
from holdfast.errors import StateMismatchError, UsageError

_VERSION = 1


class ResumableDataLoader:
    """Batches of a dataset, as ``torch.utils.data.DataLoader`` gives them; knows its place, and can go back there.

    It uses PyTorch's loader, workers and all. What comes out depends on the seed, the epoch and the place alone: not on
    the number of workers, not on what was interrupted before, and not on what else draws random numbers. No sample that
    was consumed is loaded again. The training's own random numbers are left alone: iterating draws none.

    Every argument that is not listed here means what it means to ``torch.utils.data.DataLoader``. One loader is
    iterated once at a time, by one thread.

    Args:
        dataset: map-style or iterable-style.
        batch_size: samples in a batch, of one rank; None gives single samples.
        shuffle: a new order each epoch, from ``seed`` and the epoch.
        seed: what order and augmentation depend on. Without it, ``torch.initial_seed()`` when the loader is made: the
            seed of the last ``torch.manual_seed``. A restored loader goes on with the seed it was saved with.
        sampler: gives the indices, any picklable ones. It may draw random numbers from the global generators or from
            generators in its attributes; where it has ``set_epoch``, that is called.
        batch_sampler: the same for lists of indices.
        rank: whose share of the samples to give; map-style datasets without a sampler only.
        world_size: how many ranks share them. Needs a ``seed``, the same on all.

    Attributes:
        dataset: as given.
        batch_size: as given; None with a ``batch_sampler``.
        shuffle: whether epochs differ in their order: as given, and True with a sampler.
        num_workers: as given.
        served: batches handed out by this object in this process, ever.

    Raises:
        UsageError: arguments that exclude each other.

    Example:
        >>> from holdfast.data import ResumableDataLoader
        >>> loader = ResumableDataLoader(range(6), batch_size=2, shuffle=True, seed=1)
        >>> first = next(iter(loader))
        >>> another = ResumableDataLoader(range(6), batch_size=2, shuffle=True, seed=1)
        >>> another.load_state_dict(loader.state_dict())
        >>> len(list(another))
        2
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool = False,
        *,
        seed: int | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], object] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_data(dataset, shuffle, sampler, batch_sampler)
        check_batches(batch_size, shuffle, sampler, batch_sampler, drop_last)
        check_ranks(rank, world_size, seed, sampler is not None or batch_sampler is not None)
        self.dataset = dataset
        self.batch_size = None if batch_sampler is not None else batch_size
        self.shuffle = shuffle or sampler is not None or batch_sampler is not None
        self.num_workers = num_workers
        self.served = 0
        self._seed = torch.initial_seed() if seed is None else seed
        self._seed_is_given = seed is not None
        self._shared = world_size > 1
        self._epoch = 0
        self._waits = False  # at the end of an epoch, for end_epoch()
        self._finished = False
        self._continues = False  # whether the next iteration goes on from the place, or begins the next epoch
        self._live: weakref.ref[_Iteration] | None = None
        self._feed = make_feed(
            dataset,
            batch_size,
            shuffle=shuffle,
            sampler=sampler,
            batch_sampler=batch_sampler,
            collate=collate_fn,
            drop_last=drop_last,
            ranks=(rank, world_size),
            init=worker_init_fn,
            options={
                "num_workers": num_workers,
                "pin_memory": pin_memory,
                "timeout": timeout,
                "multiprocessing_context": multiprocessing_context,
                "prefetch_factor": prefetch_factor,
                "persistent_workers": persistent_workers,
                "pin_memory_device": pin_memory_device,
            },
        )

    # ------------------------------------------------------------------------------------------------- where it is

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._epoch

    @property
    def position(self) -> int:
        """Batches of this epoch that were handed out: ``enumerate(loader, start=loader.position)``."""
        return self._feed.position

    @property
    def shared(self) -> bool:
        """Whether its state says the same on all ranks, so that it is stored once and restored at any world size.

        That is so where ranks share the samples of a map-style dataset: the place counts the samples of all of them.
        """
        return self._shared and self._feed.kind == "map"

    def __len__(self) -> int:
        """Batches in a whole epoch; of an iterable-style dataset with a length, what PyTorch would guess."""
        return len(self._feed)

    def wait_for_end_epoch(self) -> None:
        """From here on the end of an epoch is reached with ``end_epoch()`` or the next iteration, not the last batch.

        The ``Checkpointer`` asks for it: what comes after the last batch, such as an evaluation, belongs to its epoch.
        """
        self._waits = True

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of ``epoch``. When the loader is in it already, nothing happens: it keeps its place."""
        if epoch != self._epoch:
            self._drop_live(f"set_epoch({epoch}) was called")
            self._feed.next_epoch(self._finished)
            self._finished = False
            self._epoch = epoch

    def end_epoch(self) -> None:
        """Go to the next epoch, when this one was left early: in part consumed, and its iterator is gone.

        A loader whose iterator is alive keeps its place: it is one that the training draws from on the side. The
        ``Checkpointer`` calls this for the loaders in its state.
        """
        if (self.position or self._finished) and self._living() is None:
            self._next_epoch(self._finished)

    # ------------------------------------------------------------------------------------------------- iterating

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of this epoch, on the first iteration after ``load_state_dict``.

        Otherwise those of a whole epoch: the next one, when this one was begun. An iterator of this loader that is not
        finished yet can no longer be used.

        Raises:
            StateMismatchError: the order of the data is not the one that was consumed in part.
        """
        self._drop_live("the loader was iterated again")
        if (self.position or self._finished) and not self._continues:
            self._next_epoch(self._finished)
        batches = self._feed.begin(self._seed, self._epoch)
        self._continues = False
        iteration = _Iteration(self, batches)
        self._live = weakref.ref(iteration)
        return iteration

    def _next_epoch(self, finished: bool) -> None:
        self._live = None
        self._continues = self._finished = False
        self._epoch += 1
        self._feed.next_epoch(finished)

    def _reach_end(self) -> None:
        """The last batch was consumed, and another one was asked for."""
        self._live = None
        self._continues = False
        self._finished = True
        if not self._waits:
            self._next_epoch(finished=True)

    def _living(self) -> _Iteration | None:
        return None if self._live is None else self._live()

    def _drop_live(self, why: str) -> None:
        live = self._living()
        self._live = None
        if live is not None:
            live.end(why)

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain values: after what was handed out, whatever workers have loaded in advance."""
        return {"version": _VERSION, "kind": self._feed.kind, "seed": self._seed, "epoch": self._epoch} | (
            self._feed.state()
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a place that ``state_dict`` returned. Iterators of this loader can no longer be used.

        Raises:
            StateMismatchError: this loader cannot continue there; it says why, and was not changed.
        """
        version = entry(state_dict, "version", int)
        if version > _VERSION:
            raise StateMismatchError(
                f"the loader's state has version {version}, and this Holdfast reads up to {_VERSION}: update it.",
                key="version",
            )
        kind = entry(state_dict, "kind", str)
        seed, epoch = entry(state_dict, "seed", int), entry(state_dict, "epoch", int)
        if kind != self._feed.kind:
            raise mismatch("dataset", f"a {kind} one", f"a {self._feed.kind} one", "Use the kind it was saved with.")
        self._feed.load(state_dict, epoch)
        self._drop_live("the loader was restored")
        if self._seed_is_given and seed != self._seed:
            logger.warning(
                "the loader goes on with the seed it was saved with, %d, not with seed=%d.", seed, self._seed
            )
        self._seed, self._epoch = seed, epoch
        self._continues = True
        self._finished = False


class _Iteration:
    """One pass over a loader. The loader knows whether it is alive, and so must not be what keeps it alive."""

    def __init__(self, loader: ResumableDataLoader, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = batches
        self._ended_because = ""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            if self._ended_because:
                raise UsageError(
                    f"this iterator has ended because {self._ended_because}: it would no longer be known which batches "
                    "count. Iterate a loader once at a time, or make two loaders."
                )
            raise StopIteration
        try:
            batch = next(self._batches)
        except StopIteration:
            self._batches = None  # ends the workers
            self._loader._reach_end()
            raise
        self._loader.served += 1
        return batch

    def end(self, why: str) -> None:
        """Give no more batches; ends the workers."""
        self._batches = None
        self._ended_because = why
