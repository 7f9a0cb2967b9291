"""How the processes of a training find each other in a store that may hold what an earlier training left there.

``torchrun`` starts all processes again when one has died, and may give them the store of the attempt before, with every
message in it. So they begin with a handshake: the coordinator announces a session that nobody has heard of, each of the
others answers with a number of its own, and goes on only when the coordinator has repeated that number.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import msgspec

from holdfast.distributed.messages import Failure, Mailbox
from holdfast.errors import RankTimeoutError

_PAUSE_S = 0.005
_WHAT = "finding the processes of the training"


class _Met(msgspec.Struct, frozen=True):
    """Everybody's numbers, by rank; or why there are none."""

    numbers: tuple[str, ...] = ()
    failure: Failure | None = None
    missing: tuple[int, ...] = ()


def meet(mailbox: Mailbox) -> str:
    """Find the other processes; returns the name of the session, which nobody before has used. Blocks.

    Args:
        mailbox: over a store that may hold messages of others.

    Raises:
        RankTimeoutError: a process did not come.
    """
    return _announce(mailbox) if mailbox.rank == 0 else _answer(mailbox)


def _announce(mailbox: Mailbox) -> str:
    session = secrets.token_hex(8)
    mailbox.send("session", session)
    others = range(1, mailbox.size)
    keys = [f"{session}/{rank}" for rank in others]

    def ranks(missing: Sequence[str]) -> list[int]:
        return [others[keys.index(key)] for key in missing]

    try:
        mailbox.wait(keys, ranks, _WHAT)
    except RankTimeoutError as error:
        mailbox.send(f"{session}/met", _Met(failure=Failure.of(0, error), missing=error.ranks))
        raise
    numbers = ("", *(mailbox.read(key) for key in keys))
    mailbox.send(f"{session}/met", _Met(numbers))
    return session


def _answer(mailbox: Mailbox) -> str:
    own = secrets.token_hex(8)
    answered = ""
    # The coordinator may come last, and then waits for others as long as always, and has to tell who is missing.
    timeout_s = 2 * mailbox.timeout_s
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if mailbox.has("session"):
            session = mailbox.read("session")
            if session != answered:  # that of an earlier attempt is followed by that of this one
                mailbox.send(f"{session}/{mailbox.rank}", own)
                answered = session
            elif mailbox.has(f"{session}/met"):
                met = msgspec.convert(mailbox.read(f"{session}/met"), _Met)
                if met.failure is not None and mailbox.rank not in met.missing:
                    raise RankTimeoutError(met.failure.text, ranks=met.missing)
                if met.numbers[mailbox.rank : mailbox.rank + 1] == (own,):
                    return str(session)
        time.sleep(_PAUSE_S)
    raise RankTimeoutError(
        f"{_WHAT}: rank {mailbox.rank} of {mailbox.size} waited {timeout_s:g} s for rank 0, which did not come. Every "
        "process of the group has to construct the Checkpointer and enter its block.",
        ranks=[0],
    )
