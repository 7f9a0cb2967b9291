"""What the coordinator of a save tells the other ranks, through the store that the process group was made with.

DCP has no way of its own for it: of a plan that is in its planner's cache, nothing of what a storage writer added for
this save arrives.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import msgspec
import torch.distributed as dist

from holdfast.errors import UsageError


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
    store = _store()
    if store is not None:
        store.set(_key(path), msgspec.json.encode(message).decode())


def fetch(path: str) -> Message:
    """What the coordinator said of the save to ``path``, which it did before this rank got its plan.

    Raises:
        UsageError: it saves to another path.
    """
    store = _store()
    if store is None or not store.check([_key(path)]):
        raise UsageError(
            f"the coordinator does not save to {path}. Give the same path on every rank: one that all of them reach, "
            "in a file system that they share.",
            path=path,
        )
    return msgspec.json.decode(store.get(_key(path)), type=Message)


def withdraw(path: str) -> None:
    """Forget what was said of the save to ``path``: every rank has heard of it."""
    with contextlib.suppress(dist.DistError):  # of a group that is gone, nobody asks any more
        store = _store()
        if store is not None:
            store.delete_key(_key(path))


def _store() -> Any:
    """A connection of its own: on a shared one, whoever waits for something keeps everybody else waiting."""
    if not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _key(path: str) -> str:
    return "holdfast/dcp/" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
