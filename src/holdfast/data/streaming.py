"""The batches of an iterable-style dataset: whose turn it is, and how far each worker's were consumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.data.feeds import Inner
from holdfast.data.fetching import Collate
from holdfast.data.places import FRESH_EPOCH, entry, logger, mismatch
from holdfast.data.streams import Progress, StreamDataset, Turn


@dataclass(slots=True)
class Course:
    """How far an epoch was consumed.

    What asks for turns holds this, and not the feed: PyTorch's loader holds what asks, and a circle around its workers
    would end them when the collector finds it, perhaps in another process.

    Attributes:
        progress: of each worker.
        position: batches consumed.
        next_worker: whose turn it is.
    """

    progress: list[Progress]
    position: int = 0
    next_worker: int = 0

    @property
    def ended(self) -> bool:
        """Whether every worker's data is exhausted."""
        return all(progress.ended for progress in self.progress)

    def take(self, worker: int, progress: Progress | None) -> bool:
        """Note a turn; True when there was a batch in it."""
        self.next_worker = (worker + 1) % len(self.progress)
        if progress is None:
            return False
        is_batch = progress.batches > self.progress[worker].batches
        self.progress[worker] = progress
        self.position += is_batch
        return is_batch

    def turns(self, seeds: tuple[int, ...], pass_number: int, begins: list[Progress | None]) -> Iterator[Turn]:
        """Turn after turn, until every worker is known to have ended; those that were asked for nothing pass.

        Args:
            seeds: what random numbers depend on.
            pass_number: which pass over the loader it is.
            begins: what each worker is to continue from.
        """
        first = self.next_worker
        is_new_epoch = self.position == 0
        number = 0
        while not self.ended:
            worker = number % len(begins)
            idle = number < first or self.progress[worker].ended
            yield Turn(number, worker, idle, seeds, pass_number, begins[worker], is_new_epoch)
            number += 1


class StreamFeed:
    """The batches of an iterable-style dataset.

    PyTorch's loader asks its workers in turn, from the first one, and so do the turns here. A worker whose data is
    exhausted passes when it is asked. So do, at the start of a pass that continues an epoch, those before the one whose
    turn it is.

    Args:
        dataset: the user's dataset.
        collate: makes a batch of a list of samples, or converts a single sample.
        batch_size: samples in a batch; None gives single samples.
        drop_last: leave out the last samples of a worker when they do not fill a batch.
        ranks: the rank, and how many there are.
        init: the user's ``worker_init_fn``.
        options: the other arguments of ``torch.utils.data.DataLoader``.
    """

    kind = "iterable"

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        batch_size: int | None,
        drop_last: bool,
        ranks: tuple[int, int],
        init: Callable[[int], object] | None,
        options: Mapping[str, Any],
    ) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._rank, self._world_size = ranks
        self._inner = Inner(StreamDataset(dataset, collate, batch_size, drop_last), init, options)
        # With persistent workers, and with none, the dataset of one epoch is that of the next.
        self._dataset_lives_on = options["num_workers"] == 0 or options["persistent_workers"]
        self._course = Course([Progress()] * max(options["num_workers"], 1))
        self._pass_number = 0
        self._at_end: list[Progress] | None = None  # of the epoch before, where its dataset lives on
        self._untold: set[int] = set()  # workers whose dataset does not know yet where it was in a restored epoch

    @property
    def position(self) -> int:
        """Batches of the epoch that were consumed."""
        return self._course.position

    def __len__(self) -> int:
        length = len(self._dataset)
        if self._batch_size is None:
            return length
        return length // self._batch_size if self._drop_last else -(-length // self._batch_size)

    def begin(self, seed: int, epoch: int) -> Iterator[Any]:
        """See :class:`holdfast.data.feeds.Feed`. No process is started for an epoch that has nothing left."""
        course = self._course
        if course.ended:
            return iter(())
        begins: list[Progress | None] = [None] * len(course.progress)
        if course.position:
            begins = list(course.progress)
            _tell_of_replay(course, epoch)
            self._untold = {worker for worker, progress in enumerate(course.progress) if progress.ended}
        elif self._at_end is not None:
            begins = [one if worker in self._untold else None for worker, one in enumerate(self._at_end)]
            self._untold = set()
        self._pass_number += 1
        turns = course.turns((seed, epoch, self._rank), self._pass_number, begins)
        return _StreamPass(course, self._inner.iterate(turns, seed, epoch))

    def next_epoch(self, finished: bool) -> None:
        """See :class:`holdfast.data.feeds.Feed`.

        When an epoch was left before its end, the dataset itself says where its next iteration begins, as with any
        loader.
        """
        if self._course.position or finished:
            self._at_end = self._course.progress if finished and self._dataset_lives_on else None
        self._course = Course([Progress()] * len(self._course.progress))

    def state(self) -> dict[str, Any]:
        """See :class:`holdfast.data.feeds.Feed`."""
        course = self._course
        progress = course.progress if course.position else self._at_end or []
        return {
            "position": course.position,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "num_workers": len(course.progress),
            "next_worker": course.next_worker if course.position else 0,
            "workers": [asdict(one) for one in progress],
        }

    def load(self, state: Mapping[str, Any], epoch: int) -> None:
        """See :class:`holdfast.data.feeds.Feed`."""
        position, next_worker = entry(state, "position", int), entry(state, "next_worker", int)
        count = len(self._course.progress)
        here = {"num_workers": count, "batch_size": self._batch_size, "world_size": self._world_size}
        for what, found in here.items():
            if position and state.get(what) != found:
                advice = FRESH_EPOCH.format(next_epoch=epoch + 1)
                raise mismatch(f"{what} in mid-epoch", state.get(what), found, advice)
        progress = [Progress(**one) for one in entry(state, "workers", list)]
        self._course = Course(progress if position else [Progress()] * count, position, next_worker)
        self._at_end = progress if not position and len(progress) == count else None
        self._untold = set(range(count))


def _tell_of_replay(course: Course, epoch: int) -> None:
    replayed = [one for one in course.progress if one.state is None and one.batches and not one.ended]
    if replayed:
        logger.warning(
            "the dataset has no state: %d batches (%d samples) of epoch %d are loaded again and left out. Give it "
            "state_dict() and load_state_dict() to continue at once.",
            sum(one.batches for one in replayed),
            sum(one.samples for one in replayed),
            epoch,
        )


class _StreamPass:
    """Batches from PyTorch's loader, and the turns in between that gave none."""

    def __init__(self, course: Course, inner: Iterator[Any]) -> None:
        self._course = course
        self._inner = inner

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not self._course.ended:
            number, batch, progress = next(self._inner)
            if self._course.take(number % len(self._course.progress), progress):
                return batch
        raise StopIteration
