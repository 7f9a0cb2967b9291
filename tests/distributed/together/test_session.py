"""The handshake: a store may hold everything that an earlier attempt of the same training left in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from holdfast.distributed.messages import Mailbox
from holdfast.distributed.session import meet
from holdfast.errors import RankTimeoutError


def all_meet(store: Any, size: int, ranks: range | None = None, timeout_s: float = 20.0) -> list[Any]:
    """What each rank found."""

    def one(rank: int) -> Any:
        try:
            return meet(Mailbox(store, rank, size, timeout_s))
        except RankTimeoutError as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, ranks or range(size)))


def test_all_are_in_one_session() -> None:
    """And it has a name."""
    found = all_meet(dist.HashStore(), 4)
    assert len(set(found)) == 1
    assert found[0]


def test_another_attempt_is_another_session() -> None:
    """Whatever the store still holds of those before, and whoever comes first."""
    store = dist.HashStore()
    sessions = [all_meet(store, 3) for _ in range(20)]
    assert all(len(set(found)) == 1 for found in sessions)
    assert len({found[0] for found in sessions}) == 20


def test_the_others_come_first() -> None:
    """They take nothing of the last attempt for the coordinator's word: they wait for its own."""
    store = dist.HashStore()
    (old, *_) = all_meet(store, 3)
    early = all_meet(store, 3, range(1, 3), timeout_s=0.2)
    assert [type(error) for error in early] == [RankTimeoutError] * 2
    assert [error.ranks for error in early] == [(0,), (0,)]
    found = all_meet(store, 3)
    assert len(set(found)) == 1
    assert found[0] != old


def test_one_that_does_not_come() -> None:
    """All say which."""
    found = all_meet(dist.HashStore(), 4, range(3), timeout_s=0.2)
    assert [type(error) for error in found] == [RankTimeoutError] * 3
    assert {error.ranks for error in found} == {(3,)}
