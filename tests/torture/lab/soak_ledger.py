"""What was promised in a soak, and whether it is kept: states by their digests, checkpoints by the retention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.format.names import CheckpointName
from lab.soak_training import KEPT_LAST
from lab.soak_voice import Message

MOST_SPARE = 8
"""So many checkpoints more than the retention keeps may lie there: of trainers killed before it, or being read."""
CLEANINGS = 3
"""What a dead process left may survive so many starts: a reader may be looking at it, an error be injected."""

Place = tuple[int, int]  # step and epoch, which together name a state


class PromiseError(Exception):
    """A promise was broken."""


@dataclass(slots=True)
class States:
    """What the training is at each moment, from a training that nobody interrupted."""

    known: dict[Place, Message] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    compared: int = 0
    furthest: int = 0
    _waiting: list[tuple[str, Message]] = field(default_factory=list)
    _newest_known: int = -1

    def learn(self, message: Message) -> None:
        """Another state of the reference."""
        self.known[message["step"], message["epoch"]] = message
        self._newest_known = message["step"]
        if message.get("loss") is not None:
            self.losses[message["step"]] = message["loss"]

    def behind(self) -> bool:
        """Whether the reference should go on."""
        return self._newest_known <= self.furthest + 1

    def compare(self, who: str, message: Message) -> None:
        """A state that ``who`` came by must be that of the reference, now or when that has come so far."""
        self.furthest = max(self.furthest, message["step"])
        self._waiting.append((who, message))
        self.settle()

    def settle(self) -> bool:
        """Compare what can be compared; whether nothing is left."""
        left = [(who, message) for who, message in self._waiting if message["step"] >= self._newest_known]
        for who, message in self._waiting:
            if message["step"] < self._newest_known:
                self._compare(who, message)
        self._waiting = left
        return not left

    def _compare(self, who: str, message: Message) -> None:
        self.compared += 1
        place = (message["step"], message["epoch"])
        reference = self.known.get(place)
        if reference is None:
            raise PromiseError(f"{who}: the training never comes by step {place[0]}, epoch {place[1]}: {message}")
        for part in ("contents", "generators"):
            if message.get(part) not in (None, reference[part]):
                raise PromiseError(f"{who}: other {part} than the uninterrupted training: {message}, not {reference}")
        # A loss that was measured at the end of an epoch is given to the checkpoint of its last step too.
        if message.get("loss") not in (None, self.losses.get(place[0])):
            raise PromiseError(f"{who}: another loss than the uninterrupted training: {message}, not {self.losses}")


@dataclass(slots=True)
class Checkpoints:
    """Which checkpoints there must be. Only what decides that is remembered.

    Args:
        kept_every: as for the retention.
    """

    kept_every: int
    acknowledged: int = 0
    most: int = 0
    most_bytes: int = 0
    pinned: dict[str, int] = field(default_factory=dict)
    _newest: list[CheckpointName] = field(default_factory=list)
    _for_ever: set[str] = field(default_factory=set)
    _best: float = math.inf
    _litter: dict[str, int] = field(default_factory=dict)

    def saved(self, message: Message) -> None:
        """A checkpoint was acknowledged, or seen."""
        name = CheckpointName.parse(message["name"])
        assert name is not None
        if name not in self._newest:
            self._newest = sorted([*self._newest, name])[-KEPT_LAST:]
        if name.step % self.kept_every == 0:
            self._for_ever.add(str(name))
        if message["loss"] is not None:
            self._best = min(self._best, message["loss"])

    @property
    def newest(self) -> str | None:
        """What the next start must continue from."""
        return str(self._newest[-1]) if self._newest else None

    def inspect(self, seen: Mapping[str, Message], starts: int, litter: Mapping[str, Message]) -> None:
        """What is there while nobody trains."""
        for item in seen.values():  # some were committed and their trainer killed before it could say so
            self.saved(item)
        lost = [str(name) for name in self._newest if str(name) not in seen]
        if lost:
            raise PromiseError(
                f"lost, and among the {KEPT_LAST} newest that were acknowledged: {lost}; there: {[*seen]}"
            )
        lost = sorted(self._for_ever - seen.keys())
        if lost:
            raise PromiseError(f"lost, and to be kept for ever: {lost}")
        best = min((item["loss"] for item in seen.values() if item["loss"] is not None), default=math.inf)
        if best > self._best:
            raise PromiseError(f"the best was lost: it had a loss of {self._best}, the best of those left has {best}")
        for name in self.pinned:
            if name not in seen:
                raise PromiseError(f"lost, and pinned: {name}")
            if not seen[name]["pinned"]:
                raise PromiseError(f"no longer pinned: {name}")
        self._check_amount(seen)
        self._check_litter(starts, litter)

    def _check_amount(self, seen: Mapping[str, Message]) -> None:
        self.most = max(self.most, len(seen))
        self.most_bytes = max(self.most_bytes, sum(item["nbytes"] for item in seen.values()))
        kept = KEPT_LAST + 1 + len(self._for_ever) + sum(item["pinned"] for item in seen.values())
        if len(seen) > kept + MOST_SPARE:
            raise PromiseError(f"{len(seen)} checkpoints, where the retention keeps {kept}: {[*seen]}")

    def _check_litter(self, starts: int, litter: Mapping[str, Message]) -> None:
        self._litter = {name: self._litter.get(name, starts) for name in litter}
        old = [name for name, since in self._litter.items() if starts - since > CLEANINGS]
        if old:
            raise PromiseError(f"left by dead processes, and still there after {CLEANINGS} starts: {old}")
