"""Messages between the processes of a training, through the key-value store that they share.

Not by collectives: those would have to be called by all processes in one order, and a thread that writes in the
background cannot promise that. What is sent is JSON.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from holdfast.errors import RankError, RankTimeoutError

_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 0.05
_LONG_BYTES = 64 * 2**10
"""Longer messages are compressed: the store of PyTorch takes no value of more than 8 MiB."""
_LOOKS_BETWEEN = 16
"""So many looks for what is awaited come between two looks for whether somebody has left."""


class KeyValueStore(Protocol):
    """What is needed of ``torch.distributed.Store``. Its server outlives the processes where ``torchrun`` starts it."""

    def set(self, key: str, value: Any) -> None:
        """Give ``key`` a value."""

    def get(self, key: str) -> bytes:
        """The value of a key that has one."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of several."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have values. Does not wait."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Give ``key`` the value ``desired`` if it has the value ``expected`` (empty: none), and return what it has."""

    def delete_key(self, key: str) -> bool:
        """Forget a key."""


class Failure(msgspec.Struct, frozen=True):
    """Why a process could not do its part, in words."""

    rank: int
    kind: str
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What ``error`` was to process ``rank``."""
        text = str(error).encode("utf-8", "backslashreplace").decode()  # paths may hold what no JSON can
        return cls(rank, type(error).__name__, text)

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.text}"


def rank_error(doing: str, failures: Sequence[Failure]) -> RankError:
    """The one error that all processes raise where some failed."""
    told = "\n".join(f"  {failure}" for failure in failures[:5])
    more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
    return RankError(f"{doing}:\n{told}{more}", ranks=[failure.rank for failure in failures])


class Mailbox:
    """Waits for messages, and says who did not send any. One thread at a time.

    Args:
        store: what carries them. No other thread may use this connection, for one that waits holds it.
        rank: of this process.
        size: how many processes there are.
        timeout_s: how long to wait for one that does not answer.
    """

    def __init__(self, store: KeyValueStore, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self._store = store

    def send(self, key: str, message: Any) -> None:
        """Leave a message for whoever asks for ``key``."""
        encoded = _encode(message)
        with answering(self.rank):
            self._store.set(key, encoded)

    def receive(self, key: str, sender: int, what: str) -> Any:
        """The message under ``key``, when it has come.

        Args:
            key: its key.
            sender: who is to send it.
            what: what for, in words.

        Raises:
            RankTimeoutError: it did not come in time.
            RankError: somebody left the training, so that it will not come.
        """
        self.wait([key], lambda missing: [sender], what)
        return self.read(key)

    def read(self, key: str) -> Any:
        """The message under ``key``, which has come."""
        with answering(self.rank):
            return _decode(self._store.get(key))

    def receive_all(self, keys: Sequence[str], what: str) -> list[Any]:
        """The messages under ``keys``, one of each process in order of their ranks, when all have come."""
        self.wait(keys, lambda missing: [keys.index(key) for key in missing], what)
        with answering(self.rank):
            return [_decode(message) for message in self._store.multi_get(list(keys))]

    def wait(
        self,
        keys: Sequence[str],
        senders: Callable[[Sequence[str]], Sequence[int]],
        what: str,
    ) -> None:
        """Wait until all ``keys`` have messages.

        Args:
            keys: what is awaited.
            senders: whose messages are missing, of some keys.
            what: what for, in words.
        """
        deadline_s = time.monotonic() + self.timeout_s
        pause_s, looks = _FIRST_PAUSE_S, 0
        wanted = list(keys)
        while not self._has(wanted):
            looks += 1
            if looks % _LOOKS_BETWEEN == 0:
                left = self._who_left(what)
                if left is not None:
                    if self._has(wanted):  # they came before it was told
                        return
                    raise left
            if time.monotonic() >= deadline_s:
                missing = [key for key in wanted if not self._has([key])]
                if missing:
                    raise self._timeout(senders(missing), what)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    def settle(self, key: str, answer: str) -> str:
        """Give ``key`` an answer, unless somebody else gave it one before; returns the one that it has."""
        with answering(self.rank):
            return bytes(self._store.compare_set(key, "", answer)).decode()

    def has(self, key: str) -> bool:
        """Whether there is a message under ``key``. Does not wait."""
        return self._has([key])

    def forget(self, keys: Sequence[str]) -> None:
        """Remove messages that nobody will ask for any more."""
        with answering(self.rank):
            for key in keys:
                self._store.delete_key(key)

    # ------------------------------------------------------------------------------------------------ who has left

    def leave(self, failure: Failure) -> None:
        """Tell the others that this process leaves the training, and why: nobody shall wait for it.

        The first that leaves is the one that is told of: others may leave because of it.
        """
        self.settle("left", msgspec.json.encode(failure).decode())

    def _who_left(self, what: str) -> RankError | None:
        """The error to raise when a process has told that it left."""
        if not self._has(["left"]):
            return None
        with answering(self.rank):
            failure = msgspec.json.decode(self._store.get("left"), type=Failure)
        if failure.rank == self.rank:
            return None
        return rank_error(f"{what}: a process has left the training", [failure])

    def _has(self, keys: list[str]) -> bool:
        with answering(self.rank):
            return self._store.check(keys)

    def _timeout(self, ranks: Sequence[int], what: str) -> RankTimeoutError:
        shown = ", ".join(map(str, ranks[:10])) + (f" and {len(ranks) - 10} more" if len(ranks) > 10 else "")
        return RankTimeoutError(
            f"{what}: rank {self.rank} of {self.size} waited {self.timeout_s:g} s for rank {shown}, which did not "
            "answer. Every process of the group has to make the same calls: construct the Checkpointer, step(), "
            "end_epoch(), save(). Look at the output of that process; timeout_s= says how long to wait.",
            ranks=ranks,
        )


@contextmanager
def answering(rank: int) -> Iterator[None]:
    """RankError where the store does not answer to process ``rank``, instead of what PyTorch raises."""
    try:
        yield
    except RuntimeError as error:  # what c10d raises, whatever has become of the store
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise RankError(
            f"rank {rank}: the store of the process group does not answer; the process that holds it is gone: {told}"
        ) from error


def _encode(message: Any) -> bytes:
    encoded = msgspec.json.encode(message)
    return zlib.compress(encoded, 1) if len(encoded) > _LONG_BYTES else encoded


def _decode(message: bytes) -> Any:
    # No JSON begins with the byte that every compressed message begins with.
    return msgspec.json.decode(zlib.decompress(message) if message[:1] == b"\x78" else message)
