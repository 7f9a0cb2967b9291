"""Samples of an iterable-style dataset, in the process that iterates it.

Each worker has a copy of the dataset, and takes batches from it in turn. With each batch comes how far the worker got:
where the dataset can say it, its own state, else how much is to be left out by iterating again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from holdfast.data.fetching import Collate
from holdfast.data.seeding import seed_globals, undisturbed
from holdfast.state.kinds import is_stateful

_END = object()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one worker got in an epoch.

    Attributes:
        batches: how many of its batches were consumed.
        samples: how many samples these had.
        ended: whether its part of the data is known to be exhausted, as it is by a last batch that was not filled.
        state: of the dataset and its iterator there; None where they have none.
    """

    batches: int = 0
    samples: int = 0
    ended: bool = False
    state: dict[str, Any] | None = None


class Turn(NamedTuple):
    """What a worker must know to load its next batch.

    Attributes:
        number: which turn of this pass over the loader it is.
        worker: whose turn it is.
        idle: whether this worker only passes, so that another one's turn comes.
        seeds: what its random numbers depend on: the loader's seed, the epoch, the rank.
        pass_number: which pass over the loader this is; a new one begins the dataset anew.
        begin: how far this worker had got before this pass; None at the start of an epoch.
        is_new_epoch: whether ``begin`` is the end of the epoch before.
    """

    number: int
    worker: int
    idle: bool
    seeds: tuple[int, ...]
    pass_number: int
    begin: Progress | None
    is_new_epoch: bool


class StreamDataset(Dataset[Any]):
    """An iterable dataset behind a map-style one, asked by :class:`Turn`: so that a turn can say what to do.

    Args:
        dataset: the user's dataset.
        collate: makes a batch of a list of samples, or converts a single sample.
        batch_size: samples in a batch; None gives single samples.
        drop_last: leave out the last samples of a worker when they do not fill a batch.
    """

    def __init__(self, dataset: Any, collate: Collate, batch_size: int | None, drop_last: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._pass_number = -1
        self._iterator: Iterator[Any] = iter(())
        self._progress = Progress()
        self._may_be_over = False

    def __getitem__(self, turn: Turn) -> tuple[int, Any, Progress | None]:
        if turn.idle:
            return turn.number, None, None
        if get_worker_info() is not None:
            return turn.number, *self._load(turn)
        with undisturbed():
            return turn.number, *self._load(turn)

    def _load(self, turn: Turn) -> tuple[Any, Progress]:
        seeds = (*turn.seeds, turn.worker)
        if turn.pass_number != self._pass_number:
            self._begin(turn, seeds)
            self._pass_number = turn.pass_number
        if self._progress.ended:
            return None, self._progress
        number = self._progress.batches
        batch = self._draw(seeds, number)
        if batch is _END and number == 0 and self._may_be_over:
            # The restored state was that of a finished pass: it gave nothing, and the next pass is this epoch's.
            self._iterate(seeds)
            batch = self._draw(seeds, number)
        self._may_be_over = False
        if batch is _END:
            self._progress = Progress(number, self._progress.samples, True, self._state())
            return None, self._progress
        count = 1 if self._batch_size is None else len(batch)
        # What is not full has met the end, where a dataset may have made itself ready to begin anew: its state then no
        # longer says that it ended.
        ended = count < (self._batch_size or 1)
        self._progress = Progress(number + 1, self._progress.samples + count, ended, self._state())
        return self._collate(batch), self._progress

    def _draw(self, seeds: tuple[int, ...], number: int) -> Any:
        """The samples of the next batch."""
        seed_globals(*seeds, number)
        if self._batch_size is None:
            return next(self._iterator, _END)
        batch = list(islice(self._iterator, self._batch_size))
        return _END if not batch or (self._drop_last and len(batch) < self._batch_size) else batch

    def _begin(self, turn: Turn, seeds: tuple[int, ...]) -> None:
        """Bring the dataset to where the worker's part of the epoch goes on."""
        begin = turn.begin or Progress()
        state = begin.state or {}
        if "dataset" in state:
            self.dataset.load_state_dict(state["dataset"])
        self._progress = Progress() if turn.is_new_epoch else begin
        self._may_be_over = begin.ended
        self._iterate(seeds)
        if "iterator" in state and not turn.is_new_epoch:
            self._iterator.load_state_dict(state["iterator"])  # type: ignore[attr-defined]  # it gave that state
        if begin.state is None and not turn.is_new_epoch:
            for number in range(begin.batches):
                self._draw(seeds, number)

    def _iterate(self, seeds: tuple[int, ...]) -> None:
        seed_globals(*seeds, "begin")
        self._iterator = iter(self.dataset)

    def _state(self) -> dict[str, Any] | None:
        """What the dataset, its iterator, or both say; copied, since they may go on with the dictionary they gave."""
        state = {}
        if is_stateful(self._iterator):
            state["iterator"] = copy.deepcopy(self._iterator.state_dict())  # type: ignore[attr-defined]
        if is_stateful(self.dataset) and self.dataset is not self._iterator:
            state["dataset"] = copy.deepcopy(self.dataset.state_dict())
        return state or None
