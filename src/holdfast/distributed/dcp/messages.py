"""What the coordinator of a save tells the other ranks, through the store that the process group was made with.

DCP has no way of its own for it: of a plan that is in its planner's cache, nothing of what a storage writer added for
this save arrives.
"""

from __future__ import annotations

import contextlib
import hashlib

import msgspec
import torch.distributed as dist

from holdfast.distributed.messages import Mailbox, answering
from holdfast.errors import RankError, UsageError


class Message(msgspec.Struct, frozen=True):
    """A save that has begun.

    Attributes:
        pending: the name of its temporary directory.
        checkpoint_id: the id that the checkpoint will have.
        world_size: how many ranks write it.
    """

    pending: str
    checkpoint_id: str
    world_size: int


def post(path: str, message: Message) -> None:
    """Tell the other ranks of the save to ``path``; where there are none, nobody."""
    mailbox = _mailbox()
    if mailbox is not None:
        mailbox.send(_key(path), message)


def fetch(path: str) -> Message:
    """What the coordinator said of the save to ``path``, which it did before this rank got its plan.

    Raises:
        UsageError: it saves to another path.
    """
    mailbox = _mailbox()
    if mailbox is None or not mailbox.has(_key(path)):
        raise UsageError(
            f"the coordinator does not save to {path}. Give the same path on every rank: one that all of them reach, "
            "in a file system that they share.",
            path=path,
        )
    return msgspec.convert(mailbox.read(_key(path)), Message)


def withdraw(path: str) -> None:
    """Forget what was said of the save to ``path``: every rank has heard of it."""
    with contextlib.suppress(RankError):  # of a group that is gone, nobody asks any more
        mailbox = _mailbox()
        if mailbox is not None:
            mailbox.forget([_key(path)])


def _mailbox() -> Mailbox | None:
    """On a connection of its own: on a shared one, whoever waits for something keeps everybody else waiting."""
    if not dist.is_initialized():
        return None
    rank = dist.get_rank()
    with answering(rank):
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return Mailbox(store, rank, dist.get_world_size(), 0)  # nobody waits


def _key(path: str) -> str:
    return "holdfast/dcp/" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
