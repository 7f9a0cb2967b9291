"""From PyTorch's process group to the group that a training saves with."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

import xxhash

from holdfast.company import Alone, Company
from holdfast.distributed.group import Group, telling_s
from holdfast.distributed.messages import KeyValueStore, Mailbox
from holdfast.distributed.session import meet
from holdfast.distributed.together import Together
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_blocks = itertools.count(1)
"""Of this process. All processes enter their blocks in one order, so that those of one block have one number."""


def company_of(group: ProcessGroup | str | None, timeout_s: float, *, read_once: bool = False) -> Company:
    """The processes that one training is made of.

    Args:
        group: ``"world"`` for all that PyTorch's default process group has, if there is one; a group of them; or None
            for this process alone.
        timeout_s: how long to wait for a process that does not answer.
        read_once: whether what all hold whole is read by one process and sent to the others.

    Raises:
        UsageError: ``group`` is something else, or this process is not in it.
        RankTimeoutError: a process did not come.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise UsageError(f"timeout_s=: expected a positive number of seconds, found {timeout_s!r}.", key="timeout_s")
    if group is None:
        return Alone()
    module: Any = sys.modules.get("torch.distributed")
    running = module is not None and module.is_available() and module.is_initialized()
    if group == "world":
        if not running:
            return Alone()
        group = module.group.WORLD
    if isinstance(group, str) or not running:
        raise UsageError(
            f"group=: expected 'world', None or a process group of torch.distributed, found {group!r}.", key="group"
        )
    members = module.get_process_group_ranks(group)
    if module.get_rank() not in members:
        raise UsageError(f"group=: this process, rank {module.get_rank()}, is not among {members}.", key="group")
    if len(members) == 1:
        return Alone()
    name = f"holdfast/{next(_blocks)}/{xxhash.xxh3_64_hexdigest(repr(members).encode())}"
    shared = module.distributed_c10d._get_default_store()
    rank = members.index(module.get_rank())

    def connect(prefix: str) -> KeyValueStore:
        # A connection of its own: one that waits for a key is of no use to anybody else meanwhile.
        store: KeyValueStore = module.PrefixStore(prefix, shared.clone())
        return store

    session = meet(Mailbox(connect(name), rank, len(members), timeout_s), telling_s(timeout_s))
    return Together(
        Group(lambda: connect(f"{name}/{session}"), rank, len(members), timeout_s),
        members,
        group if read_once else None,
    )
