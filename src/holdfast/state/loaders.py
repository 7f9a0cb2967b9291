"""Loaders that draw random numbers when they make an iterator: torchdata's ``StatefulDataLoader``.

Its iterator draws the seed of its workers from torch's global generator, as every iterator over a ``DataLoader`` does.
In the middle of an epoch that happened before the save; so a resumed process must do it before the generators are put
back, not when the loop begins, or all that training draws from then on differs. Asked for its state, such a loader
makes the iterator at once, and its next ``__iter__`` returns that one. At the border of two epochs, where an
uninterrupted training makes a new iterator, it makes a new one then too: a finished iterator is replaced.
"""

from __future__ import annotations

from typing import Any

_STATEFUL_DATA_LOADER = "StatefulDataLoader"
_KNOWS_POSITION = ("position", "served", "wait_for_end_epoch", "end_epoch")


def makes_iterator_for_state(value: object) -> bool:
    """Whether ``state_dict()`` of an object makes an iterator, with its workers. Known by name: nothing is imported."""
    return any(kind.__name__ == _STATEFUL_DATA_LOADER for kind in type(value).__mro__)


def is_kept_per_rank(value: object) -> bool:
    """Whether an object is a loader whose position each rank has for itself: one that does not say it is shared."""
    if makes_iterator_for_state(value):
        return True
    return all(hasattr(value, name) for name in _KNOWS_POSITION) and not getattr(value, "shared", False)


def state_to_restore_into(value: Any) -> Any:
    """The live state of an object, for tensors to be filled in place; none where asking for it would start workers."""
    return {} if makes_iterator_for_state(value) else value.state_dict()


def load_state(value: Any, state: Any) -> None:
    """Have an object load its state, and draw what it has to draw."""
    value.load_state_dict(state)
    if makes_iterator_for_state(value):
        value.state_dict()
