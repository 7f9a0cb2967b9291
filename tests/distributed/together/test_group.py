"""Meetings: what is decided is decided once, and who fails or does not come is named by all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from holdfast.distributed.group import Group
from holdfast.errors import (
    CheckpointNotFoundError,
    DiskFullError,
    RankError,
    RanksDifferError,
    RankTimeoutError,
    UsageError,
)

Make = Callable[..., Any]


def test_all_get_what_the_coordinator_decides(ranks: Make) -> None:
    """From what everybody said, in order of the ranks."""
    assert ranks(4).run(lambda group: group.agree("counting", group.rank * 10, sum)) == [60] * 4


def test_many_meetings(ranks: Make) -> None:
    """One after the other, none gets the answer of another one."""

    def work(group: Group) -> list[Any]:
        return [group.agree("again", [number, group.rank], list) for number in range(50)]

    assert ranks(3).run(work) == [[[[number, rank] for rank in range(3)] for number in range(50)]] * 3


def test_old_messages_are_forgotten(ranks: Make) -> None:
    """A training of days leaves no more in the store than a short one."""
    some = ranks(2)
    some.run(lambda group: [group.agree("again") for _ in range(30)])
    assert some._store.num_keys() <= 4


def test_one_that_fails(ranks: Make) -> None:
    """All raise one error that says who and why, and ranks have it as a number too."""

    def work(group: Group) -> Any:
        failure = DiskFullError("no space on node 2") if group.rank == 2 else None
        return group.agree("saving step 7", failure=failure)

    errors = ranks(4).run(work)
    assert [type(error) for error in errors] == [RankError] * 4
    assert {str(error) for error in errors} == {"saving step 7:\n  rank 2: DiskFullError: no space on node 2"}
    assert [error.ranks for error in errors] == [(2,)] * 4
    assert isinstance(errors[2].__cause__, DiskFullError)


def test_all_fail_alike(ranks: Make) -> None:
    """Each raises what it found: a mistake in a script is the same on all, and no matter of ranks."""
    errors = ranks(2).run(lambda group: group.agree("saving", failure=UsageError(f"mine {group.rank}")))
    assert [str(error) for error in errors] == ["mine 0", "mine 1"]


def test_one_that_does_not_come(ranks: Make) -> None:
    """Those who wait say for whom, when their time is over."""
    errors = ranks(3, timeout_s=0.3).run(lambda group: group.agree("stepping"), range(2))
    assert [type(error) for error in errors] == [RankTimeoutError] * 2
    assert "waited 0.3 s for rank 2, which did not answer" in str(errors[0])
    assert errors[0].ranks == (2,)


def test_the_coordinator_does_not_come(ranks: Make) -> None:
    """The same for those who wait for its answer."""
    errors = ranks(3, timeout_s=0.3).run(lambda group: group.agree("stepping"), range(1, 3))
    assert [error.ranks for error in errors] == [(0,), (0,)]


def test_all_name_the_one_that_does_not_come(ranks: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came long before the coordinator waits on, and hears whom all wait for."""
    came = threading.Event()

    def work(group: Group) -> Any:
        if group.rank == 0:
            assert came.wait(10)
        else:
            receive = group._mailbox.receive

            def waiting(key: str, sender: int, what: str) -> Any:
                try:
                    return receive(key, sender, what)
                finally:
                    came.set()
                    group._mailbox.timeout_s = 10.0  # now the coordinator waits
                    group._mailbox.wait([key.replace("answer", "0")], lambda missing: [0], what)

            monkeypatch.setattr(group._mailbox, "receive", waiting)
        return group.agree("stepping")

    errors = ranks(3, timeout_s=0.3).run(work, range(2))
    assert [(type(error), error.ranks) for error in errors] == [(RankTimeoutError, (2,))] * 2, errors


def test_one_that_comes_too_late(ranks: Make) -> None:
    """It raises at once what the others raised, and those who go on go on together."""
    given_up = threading.Event()

    def work(group: Group) -> Any:
        if group.rank == 2:
            assert given_up.wait(10)
        try:
            group.agree("stepping")
        except RankTimeoutError as error:
            given_up.set()
            group._mailbox.timeout_s = 10.0
            return error.ranks, group.agree("again", group.rank, list)
        return None

    some = ranks(3, timeout_s=0.3)
    assert some.run(work) == [((2,), [0, 1, 2])] * 3
    assert some._store.num_keys() <= 4


def test_an_answer_that_came_before_somebody_left(ranks: Make) -> None:
    """Whoever has had the answer may leave at once: the others get it all the same."""
    some = ranks(2)

    class Late:
        """A store that says once that there is no answer, when there is one and its sender has left."""

        def __init__(self) -> None:
            self.looks = 0

        def check(self, keys: list[str]) -> bool:
            self.looks += keys != ["left"]
            return some._store.check(keys) and (keys == ["left"] or self.looks > 16)

        def __getattr__(self, name: str) -> Any:
            return getattr(some._store, name)

    some._store.set("0/answer", b'{"body":7}')
    some.group(0).leave(ValueError("over"))
    assert Group(Late, 1, 2, 5.0).agree("stepping") == 7


def test_long_messages() -> None:
    """PyTorch's store closes the connection of whoever sends more than 8 MiB: long ones are compressed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    message = {f"model.layers.{number}.weight": "float32 [1024, 1024], whole" for number in range(200_000)}
    mailbox = Group(store.clone, 0, 1, 5.0).mailbox()
    mailbox.send("key", message)
    assert mailbox.receive("key", 0, "comparing") == message


def test_the_coordinator_cannot_decide(ranks: Make) -> None:
    """What it raised is raised by all, as what it is."""

    def decide(said: list[Any]) -> None:
        raise CheckpointNotFoundError("nothing there")

    errors = ranks(3).run(lambda group: group.agree("choosing", None, decide))
    assert [(type(error), str(error)) for error in errors] == [(CheckpointNotFoundError, "nothing there")] * 3


def test_meetings_of_different_kinds(ranks: Make) -> None:
    """Two that make different calls learn of it, instead of taking each other's messages."""

    def work(group: Group) -> Any:
        return group.agree("the end of an epoch" if group.rank == 1 else "a step")

    errors = ranks(3).run(work)
    assert [type(error) for error in errors] == [RanksDifferError] * 3
    assert "rank 0 is at 'a step', and rank 1 at 'the end of an epoch'" in str(errors[0])
    assert errors[2].ranks == (1,)


def test_one_that_has_left(ranks: Make) -> None:
    """Nobody waits for it, and all say why it left."""

    def work(group: Group) -> Any:
        if group.rank == 1:
            group.leave(ValueError("loss is nan"))
            return None
        return group.agree("stepping")

    errors = ranks(3, timeout_s=60).run(work)
    assert [type(error) for error in (errors[0], errors[2])] == [RankError] * 2
    assert "rank 1: ValueError: loss is nan" in str(errors[0])


def test_the_coordinator_goes_last(ranks: Make) -> None:
    """It may hold the store: it waits until all others have told that they need it no more."""
    order: list[int] = []

    def work(group: Group) -> None:
        group.agree("the end")
        if group.is_coordinator:
            group.part()
            order.append(0)
        else:
            order.append(group.rank)
            group.part()

    ranks(4).run(work)
    assert order[-1] == 0


class Gone:
    """A store whose server has gone away."""

    def __getattr__(self, name: str) -> Any:
        def fail(*arguments: object) -> None:
            raise RuntimeError("Connection reset by peer\nstack ...")

        return fail


def test_the_store_is_gone() -> None:
    """It is an error of ours, which says what that means."""
    with pytest.raises(RankError, match=r"the store of the process group does not answer.*Connection reset by peer$"):
        Group(Gone, 1, 2, 5).agree("stepping")


def test_no_connection() -> None:
    """Likewise where not even that can be made."""

    def refused() -> Any:
        raise RuntimeError("Connection refused")

    with pytest.raises(RankError, match=r"does not answer.*Connection refused$"):
        Group(refused, 1, 2, 5)
