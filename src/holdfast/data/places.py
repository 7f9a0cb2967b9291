"""What a loader's state says, checked when it comes back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import StateMismatchError

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far an epoch of a map-style dataset was consumed.

    Attributes:
        position: batches handed out.
        samples: how far that is in the epoch's order; for the loader's own order over all ranks.
        digest: of the order up to there, or of the whole of it: what an order that is made again has to equal.
    """

    position: int = 0
    samples: int = 0
    digest: str = ""


def mismatch(what: str, expected: object, found: object, advice: str) -> StateMismatchError:
    """The error for a loader that cannot continue from a state."""
    return StateMismatchError(f"the loader's {what}: saved with {expected}, now {found}. {advice}", key=what)


FRESH_EPOCH = "Make it as it was, or start the next epoch instead: loader.set_epoch({next_epoch}) after the restore."


def entry(state: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """One value of a loader's state."""
    value = state.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise StateMismatchError(
            f"expected the state of a ResumableDataLoader, found {key!r}: {value!r}. "
            "It may have been saved by another kind of loader; give each its own name in the state.",
            key=key,
        )
    return value
