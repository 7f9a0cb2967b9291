"""The loaders of a state that know their position in the data, seen from the training loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
        self._warned = False
        self.note_step()

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

    def at_end(self) -> bool:
        """Whether one of them has handed out the last batch of its epoch, as far as it knows how many there are."""
        return any(loader.position and loader.position == _length(loader) for loader in self._loaders)

    def note_step(self) -> None:
        """What was handed out up to now has been trained on."""
        self._served_at_step = [loader.served for loader in self._loaders]

    def warn_of_batch_in_hand(self, path: str) -> None:
        """Warn, once, when a batch was handed out that no step was told of: a save now would skip it."""
        in_hand = any(
            loader.served != noted and loader.position not in (0, _length(loader))  # else it was read through
            for loader, noted in zip(self._loaders, self._served_at_step, strict=True)
        )
        if in_hand and not self._warned:
            self._warned = True
            _logger.warning(
                "%s: save() between a batch and its step(): whoever resumes from this checkpoint continues behind that "
                "batch, without having trained on it. Call save() right after step().",
                path,
            )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
