"""How a save of several processes ends: they report, the coordinator commits, and all learn how it went.

Nothing is committed unless all have written their parts durably and nobody has given up waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from holdfast.checkpoint import Checkpoint, open  # noqa: A004 - the public name
from holdfast.distributed.group import Group, again
from holdfast.distributed.messages import Failure, Mailbox, rank_error
from holdfast.errors import CheckpointNotFoundError, RankError, RankTimeoutError
from holdfast.format.records import FileRecord, TensorRecord

T = TypeVar("T")

_PAUSE_S = 0.05
"""Between two looks for what another machine made."""
_COMMIT, _GIVEN_UP = "commit", "given up"


class Report(msgspec.Struct, frozen=True):
    """What a process wrote.

    Attributes:
        files: its files.
        own: the records of what is kept for this process alone.
        aliases: the same tensors under other names.
        begins: by entry and name of a tensor that is not cut evenly, and by file, where its piece begins.
        failure: why it has written nothing.
    """

    files: dict[str, FileRecord] = {}
    own: dict[str, TensorRecord] = {}
    aliases: dict[str, str] = {}
    begins: dict[str, dict[str, dict[str, int]]] = {}
    failure: Failure | None = None


class _Outcome(msgspec.Struct, frozen=True):
    """Under which name it was committed, or why it was not."""

    name: str = ""
    failure: Failure | None = None
    ranks: tuple[int, ...] = ()


class Ending:
    """The end of one save, seen from one process, in the thread that writes.

    Args:
        group: the processes.
        number: of the save; all count alike.
        what: what is done, in words.
    """

    def __init__(self, group: Group, number: int, what: str) -> None:
        self._group = group
        self._mailbox: Mailbox = group.mailbox()
        self._number = number
        self._what = what

    def tell(self, report: Report) -> None:
        """Send the coordinator what this process wrote."""
        self._mailbox.send(self._key(self._group.rank), report)
        if report.failure is not None:
            self._mailbox.settle(self._key("verdict"), _GIVEN_UP)

    def lead(self, publish: Callable[[Sequence[Report]], Checkpoint]) -> Checkpoint:
        """For the coordinator: wait for all reports, commit with ``publish`` if all are good, and tell the others.

        Raises:
            RankError: a process could not do its part, or the commit failed.
            RankTimeoutError: a process did not report, or gave up waiting.
        """
        try:
            checkpoint = publish(self._reports())
        except Exception as error:
            self._mailbox.settle(self._key("verdict"), _GIVEN_UP)
            failure = error
            if not isinstance(error, RankError):
                failure = rank_error(f"{self._what}: the commit failed", [Failure.of(0, error)])
            told = _Outcome(failure=Failure.of(0, failure), ranks=getattr(failure, "ranks", ()))
            self._mailbox.send(self._key("outcome"), told)
            if failure is error:
                raise
            raise failure from error
        self._mailbox.send(self._key("outcome"), _Outcome(checkpoint.name))
        return checkpoint

    def learn(self, cause: BaseException | None) -> str:
        """For the others: wait until it is known how the save went, and return the name of the checkpoint.

        Args:
            cause: what went wrong in this process, if anything.

        Raises:
            RankError: a process could not do its part; nothing was committed.
            RankTimeoutError: the coordinator did not tell; what it does now is not committed any more.
        """
        self._mailbox.timeout_s *= 2  # the coordinator waits for the others that long, and then has to tell
        key = self._key("outcome")
        try:
            found = self._mailbox.receive(key, 0, self._what)
        except RankTimeoutError:
            if self._mailbox.settle(self._key("verdict"), _GIVEN_UP) != _COMMIT:
                raise
            found = self._mailbox.receive(key, 0, self._what)
        outcome = msgspec.convert(found, _Outcome)
        if outcome.failure is not None:
            raise again(outcome.failure, outcome.ranks) from cause
        return outcome.name

    def _reports(self) -> list[Report]:
        """What all have written, when it is certain that it will be committed."""
        keys = [self._key(rank) for rank in range(self._group.size)]
        reports = [msgspec.convert(report, Report) for report in self._mailbox.receive_all(keys, self._what)]
        failures = [report.failure for report in reports if report.failure is not None]
        if failures:
            raise rank_error(f"{self._what}: nothing was committed", failures)
        if self._mailbox.settle(self._key("verdict"), _COMMIT) != _COMMIT:
            raise RankTimeoutError(f"{self._what}: a process gave up waiting for the others; nothing was committed")
        return reports

    def _key(self, name: int | str) -> str:
        return key_of(self._number, name)


def forget(group: Group, number: int) -> None:
    """Remove the messages of a save at which nobody is any more."""
    group.forget([key_of(number, name) for name in (*range(group.size), "verdict", "outcome")])


def key_of(number: int, name: int | str) -> str:
    """Where a message of save ``number`` lies."""
    return f"save/{number}/{name}"


def open_elsewhere(path: str, checkpoint_id: str, timeout_s: float, *, since_s: float | None = None) -> Checkpoint:
    """A checkpoint that another process committed: it may take a moment until another machine sees it.

    Args:
        path: where it is.
        checkpoint_id: its id.
        timeout_s: how long that may take.
        since_s: from when on, by the monotonic clock: what is not there so long after the commit has been removed.

    Raises:
        RankTimeoutError: it did not come to be seen.
        CorruptCheckpointError, StorageError: it cannot be read.
    """

    def look() -> Checkpoint:
        checkpoint = open(path)
        if checkpoint.checkpoint_id != checkpoint_id:
            raise CheckpointNotFoundError(f"it has the id {checkpoint.checkpoint_id}, expected {checkpoint_id}")
        return checkpoint

    try:
        return seen_in_time(look, timeout_s, since_s)
    except CheckpointNotFoundError as error:
        raise RankTimeoutError(
            f"rank 0 committed {path}, and this process did not see it within {timeout_s:g} s: {error}. Either it has "
            "been removed since, or the processes of the group do not see one file system.",
            path=path,
        ) from error


def seen_in_time(look: Callable[[], T], timeout_s: float, since_s: float | None = None) -> T:
    """What ``look`` finds, of what another machine made: now, or ``since_s``.

    Raises:
        CheckpointNotFoundError: it was not seen in time.
    """
    deadline_s = (time.monotonic() if since_s is None else since_s) + timeout_s
    while True:
        try:
            return look()
        except CheckpointNotFoundError:
            if time.monotonic() >= deadline_s:
                raise
        time.sleep(_PAUSE_S)
