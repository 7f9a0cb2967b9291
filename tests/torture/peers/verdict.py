"""What can be said of a directory after a crash, by the peer's own means: what is lost, what is wrong, what is torn."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lab.marks import Promises

from peers.peer import Peer, number_in


class Harm(enum.Enum):
    """What a state may show; one may show several."""

    LOST = "lost"
    """A checkpoint was acknowledged, and is not there, does not load, or is the one that it replaced."""
    SILENT = "silent"
    """A checkpoint loads without a word, with values that were never saved there."""
    EVERYTHING = "everything lost"
    """Something was acknowledged, and nothing is left that loads with the right values."""
    TORN_NEWEST = "torn newest"
    """What counts as the newest does not load, or not with the right values."""


@dataclass(slots=True)
class Tally:
    """How many states were looked at, and what they showed."""

    states: int = 0
    harmed: int = 0
    harms: Counter[Harm] = field(default_factory=Counter)

    def add(self, harms: set[Harm]) -> None:
        """One more state."""
        self.states += 1
        self.harmed += bool(harms)
        self.harms.update(harms)


def harms(peer: Peer, directory: Path, promises: Promises) -> set[Harm]:
    """What a directory shows."""
    visible = _visible(peer, directory)
    loaded = {name: _load(peer, directory, name) for name in visible}
    right = {name for name, number in loaded.items() if number in promises.may.get(name, set())}
    found: set[Harm] = set()
    if any(loaded.get(name, NOT_LOADED) == NOT_LOADED for name in promises.must):
        found.add(Harm.LOST)
    if any(loaded[name] not in numbers for name, numbers in promises.must.items() if name in right):
        found.add(Harm.LOST)
    if any(number != NOT_LOADED for name, number in loaded.items() if name not in right):
        found.add(Harm.SILENT)
    if promises.must and not right:
        found.add(Harm.EVERYTHING)
    if visible and visible[-1] not in right:
        found.add(Harm.TORN_NEWEST)
    return found


NOT_LOADED, WRONG = -1, -2


def _visible(peer: Peer, directory: Path) -> list[str]:
    try:
        return peer.visible(directory)
    except Exception:  # noqa: BLE001 - whatever it fails with, it finds nothing
        return []


def _load(peer: Peer, directory: Path, name: str) -> int:
    try:
        loaded = peer.load(directory, name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - what each fails with; that of torch.distributed.checkpoint is no Exception
        return NOT_LOADED
    number = number_in(loaded)
    return WRONG if number is None else number
