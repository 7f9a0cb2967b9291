"""The loaders of a state that know their position in the data, seen from the training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from holdfast.state.kinds import live_objects

_logger = logging.getLogger("holdfast")


@runtime_checkable
class KnowsPosition(Protocol):
    """What a loader offers so that a loop's end of an epoch reaches it: :class:`holdfast.data.ResumableDataLoader`."""

    @property
    def position(self) -> int:
        """Batches of the current epoch that were handed out."""

    @property
    def served(self) -> int:
        """Batches that were handed out in all, by this object."""

    def wait_for_end_epoch(self) -> None:
        """An epoch is over with :meth:`end_epoch`, not with its last batch."""

    def end_epoch(self) -> None:
        """The loop ended its epoch: the next iteration begins the next one."""


class Loaders:
    """All of them; true when there are any."""

    def __init__(self, loaders: Sequence[KnowsPosition]) -> None:
        self._loaders = loaders
        for loader in loaders:
            loader.wait_for_end_epoch()
        self._served_at_step: list[int] = []
        self._lengths: list[int | None] = []  # a sampler may have to count, so not at every step
        self._warned = False
        self.note_step()
        self._note_lengths()

    @classmethod
    def in_state(cls, state: Mapping[str, Any]) -> Loaders:
        """Those in ``state``."""
        return cls([value for _, value, kind in live_objects(state) if kind and isinstance(value, KnowsPosition)])

    def __bool__(self) -> bool:
        return bool(self._loaders)

    def end_epoch(self) -> None:
        """The loop ended its epoch."""
        for loader in self._loaders:
            loader.end_epoch()
        self._note_lengths()

    def reached_end(self) -> bool:
        """Whether one has handed out the last batch of its epoch since the last step, as far as it knows how many."""
        return any(place == length for place, length in self._read_since_step())

    def note_step(self) -> None:
        """What was handed out up to now has been trained on."""
        self._served_at_step = [loader.served for loader in self._loaders]

    def warn_of_batch_in_hand(self, path: str) -> None:
        """Warn, once, when a batch was handed out that no step was told of: a save now would skip it."""
        # At the beginning or the end of its data, a loader was read through: not a batch, but an evaluation.
        in_hand = any(place not in (0, length) for place, length in self._read_since_step())
        if in_hand and not self._warned:
            self._warned = True
            _logger.warning(
                "%s: save() between a batch and its step(): whoever resumes from this checkpoint continues behind that "
                "batch, without having trained on it. Call save() right after step().",
                path,
            )

    def _read_since_step(self) -> Iterator[tuple[int, int | None]]:
        """Position and length of those that handed out batches since the last step."""
        for loader, noted, length in zip(self._loaders, self._served_at_step, self._lengths, strict=True):
            if loader.served != noted:
                yield loader.position, length

    def _note_lengths(self) -> None:
        self._lengths = [_length(loader) for loader in self._loaders]


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
