"""The processes of a training, seen from one of them: what they decide, they decide once, and together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from holdfast import errors
from holdfast.distributed.messages import Failure, KeyValueStore, Mailbox, answering, rank_error
from holdfast.errors import HoldfastError, RanksDifferError, RankTimeoutError

_PARTING_S = 10.0

Connect = Callable[[], KeyValueStore]
"""Makes another connection to the store."""


class _Message(msgspec.Struct, frozen=True):
    """What a process says at a meeting."""

    topic: str
    body: Any = None
    failure: Failure | None = None


class _Answer(msgspec.Struct, frozen=True):
    """What a meeting comes to; ``refused`` is why the coordinator could not decide, ``differing`` because of whom."""

    body: Any = None
    refused: Failure | None = None
    failures: tuple[Failure, ...] = ()
    differing: tuple[int, ...] = ()
    text: str = ""


class Group:
    """The processes that make up one training. All of them have to make the same calls in the same order.

    Args:
        connect: makes connections to the store that they share, under a prefix that is theirs alone.
        rank: of this process, from 0; rank 0 is the coordinator.
        size: how many there are.
        timeout_s: how long to wait for a process that does not answer.
    """

    def __init__(self, connect: Connect, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self._connect = connect
        self._mailbox = self.mailbox()
        self._meetings = itertools.count()
        self._last: list[str] = []
        self._refusal: BaseException | None = None

    @property
    def is_coordinator(self) -> bool:
        """Whether this process decides, where somebody has to."""
        return self.rank == 0

    def mailbox(self) -> Mailbox:
        """A connection of one's own, for another thread."""
        with answering(self.rank):
            store = self._connect()
        return Mailbox(store, self.rank, self.size, self.timeout_s)

    def agree(
        self,
        topic: str,
        mine: Any = None,
        decide: Callable[[list[Any]], Any] = lambda everybodys: None,
        *,
        failure: BaseException | None = None,
    ) -> Any:
        """Meet: tell the coordinator something, and get what it decides. Blocks until all processes are here.

        Args:
            topic: what is met for, in words; the same on all.
            mine: what this process has to say, in what JSON can say.
            decide: called on the coordinator with what everybody said, by rank; returns what all get.
            failure: why this process has nothing to say. All raise then.

        Raises:
            RankError: a process failed; this one's own ``failure`` is raised as it is where all failed alike.
            RankTimeoutError: a process did not come.
            RanksDifferError: a process has come for something else, or ``decide`` found a difference.
            HoldfastError: what ``decide`` raised, on all; where it raised something else, that on the coordinator, and
                RankError on the others.
        """
        number = next(self._meetings)
        reason = None if failure is None else Failure.of(self.rank, failure)
        keys = [f"{number}/{rank}" for rank in range(self.size)]
        self._mailbox.send(keys[self.rank], _Message(topic, mine, reason))
        if self.is_coordinator:
            answer = self._decide(topic, keys, decide)
            self._mailbox.send(f"{number}/answer", answer)
            # Whoever sent something to a meeting has had the answer of the one before. One that came too late sends
            # something to this one yet.
            self._mailbox.forget(self._last)
            self._last = [f"{number}/answer", *keys]
        else:
            answer = msgspec.convert(self._answer(number, topic), _Answer)
        if answer.failures:
            if failure is not None and len(answer.failures) == self.size:
                raise failure
            raise rank_error(topic, answer.failures) from failure
        if answer.refused is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal or again(answer.refused, answer.differing)
        if answer.text:
            raise RanksDifferError(answer.text, ranks=answer.differing)
        return answer.body

    def _answer(self, number: int, topic: str) -> Any:
        key = f"{number}/answer"
        try:
            return self._mailbox.receive(key, 0, topic)
        except RankTimeoutError:
            if not self._mailbox.has(f"{number}/0"):
                raise
            return self._mailbox.receive(key, 0, topic)  # the coordinator came, and says whom it waits for in vain

    def _decide(self, topic: str, keys: Sequence[str], decide: Callable[[list[Any]], Any]) -> _Answer:
        try:
            messages = [msgspec.convert(message, _Message) for message in self._mailbox.receive_all(keys, topic)]
        except RankTimeoutError as error:
            self._refusal = error
            return _Answer(refused=Failure.of(0, error), differing=error.ranks)
        failures = tuple(message.failure for message in messages if message.failure is not None)
        if failures:
            return _Answer(failures=failures)
        differing = tuple(rank for rank, message in enumerate(messages) if message.topic != topic)
        if differing:
            other = messages[differing[0]].topic
            return _Answer(
                text=f"rank 0 is at {topic!r}, and rank {differing[0]} at {other!r}: every process of the group has to "
                "make the same calls in the same order.",
                differing=differing,
            )
        try:
            return _Answer(decide([message.body for message in messages]))
        except RanksDifferError as error:
            return _Answer(text=str(error), differing=error.ranks)
        except Exception as error:  # noqa: BLE001 - all raise it
            self._refusal = error
            return _Answer(refused=Failure.of(0, error), differing=getattr(error, "ranks", ()))

    def forget(self, keys: Sequence[str]) -> None:
        """Remove messages that nobody will ask for any more."""
        self._mailbox.forget(keys)

    def part(self) -> None:
        """The training is over, for all. Blocks a moment: the store may live in the coordinator's process."""
        if self.is_coordinator:
            self._mailbox.timeout_s = min(self.timeout_s, _PARTING_S)
            byes = [f"bye/{rank}" for rank in range(1, self.size)]
            self._mailbox.receive_all(byes, "the end of the training")
            self._mailbox.forget([*byes, *self._last])
        else:
            self._mailbox.send(f"bye/{self.rank}", None)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process leaves the training because of ``error``."""
        self._mailbox.leave(Failure.of(self.rank, error))


def again(failure: Failure, ranks: Sequence[int] = ()) -> HoldfastError:
    """What another process raised, to be raised by this one."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, (errors.RankError, errors.RanksDifferError)):
        return kind(failure.text, ranks=ranks)
    if isinstance(kind, type) and issubclass(kind, HoldfastError):
        return kind(failure.text)
    return rank_error("a process failed", [failure])
