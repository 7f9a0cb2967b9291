"""From PyTorch's process group to the group that a training saves with."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.company import Alone, Company
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from holdfast.distributed.messages import KeyValueStore

_blocks: Counter[str] = Counter()
"""Of this process, by group. Those of a group enter its blocks in one order, so that a block has one number for all;
what other groups do meanwhile is no matter."""


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
    rank = module.get_rank()
    try:
        members = module.get_process_group_ranks(group)
    except (KeyError, TypeError) as error:  # what new_group() gives to those that are not in it is no group either
        raise UsageError(
            f"group=: expected 'world', None or a process group of which this process, rank {rank}, is one; found "
            f"{group!r}.",
            key="group",
        ) from error
    if rank not in members:
        raise UsageError(f"group=: this process, rank {rank}, is not among {members}.", key="group")
    if len(members) == 1:
        return Alone()
    return _joined(module, group, members, timeout_s, read_once=read_once)


def _joined(module: Any, group: Any, members: Sequence[int], timeout_s: float, *, read_once: bool) -> Company:
    # Only here: a training of one process starts without them.
    import xxhash

    from holdfast.distributed.group import Group
    from holdfast.distributed.messages import Mailbox
    from holdfast.distributed.session import meet
    from holdfast.distributed.together import Together

    who = xxhash.xxh3_64_hexdigest(repr(members).encode())
    _blocks[who] += 1
    name = f"holdfast/{who}/{_blocks[who]}"
    shared = module.distributed_c10d._get_default_store()

    def connect(prefix: str) -> KeyValueStore:
        # A connection of its own: one that waits for a key is of no use to anybody else meanwhile.
        store: KeyValueStore = module.PrefixStore(prefix, shared.clone())
        return store

    place = members.index(module.get_rank())
    session = meet(Mailbox(connect(name), place, len(members), timeout_s))
    joined = Group(lambda: connect(f"{name}/{session}"), place, len(members), timeout_s)
    return Together(joined, members, group if read_once else None)
