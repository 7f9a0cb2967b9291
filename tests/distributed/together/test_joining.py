"""Who trains together: from what a user says to a company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from holdfast.company import Alone
from holdfast.distributed.joining import company_of
from holdfast.distributed.together import Together
from holdfast.errors import UsageError


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """What the processes share."""
    shared = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: shared)
    return shared


@pytest.fixture
def world(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 2 of four processes, of which the others are not there, though it takes them to be."""
    monkeypatch.setattr("holdfast.distributed.session.meet", lambda mailbox: "met")
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("group", ["world", None])
def test_no_process_group(group: Any) -> None:
    """One process."""
    assert isinstance(company_of(group, 5.0), Alone)


@pytest.mark.usefixtures("world")
def test_the_world() -> None:
    """All of it."""
    company = company_of("world", 5.0)
    assert (type(company), company.rank, company.size) == (Together, 2, 4)


@pytest.mark.usefixtures("world")
def test_this_process_alone() -> None:
    """Even under a process group, where it is asked for."""
    assert isinstance(company_of(None, 5.0), Alone)


@pytest.mark.usefixtures("world")
def test_some_of_them() -> None:
    """A rank has a place in the group, and meshes know it by another number."""
    company = company_of(dist.new_group([1, 2]), 5.0)
    assert isinstance(company, Together)
    assert (company.rank, company.size, list(company._members)) == (1, 2, [1, 2])


@pytest.mark.usefixtures("world")
def test_a_group_of_one() -> None:
    """Is alone."""
    assert isinstance(company_of(dist.new_group([2]), 5.0), Alone)


@pytest.mark.usefixtures("store", "world")
def test_the_handshake_names_the_place(store: dist.Store) -> None:
    """What an earlier attempt left in the store lies elsewhere."""
    company = company_of("world", 5.0)
    assert isinstance(company, Together)
    company._group._mailbox.send("here", None)
    assert any(key.endswith("/met/here") for key in store.list_keys())


@pytest.mark.usefixtures("world")
def test_blocks_of_a_group_are_numbered_by_themselves(store: dist.Store) -> None:
    """What other groups do meanwhile, of which some processes know nothing, does not lead them to another place."""

    def place(group: Any) -> str:
        company = company_of(group, 5.0)
        assert isinstance(company, Together)
        company._group._mailbox.send("here", None)
        (found,) = [key for key in (store.list_keys()) if key.endswith("here")]
        store.delete_key(found)
        return found

    some, others = dist.new_group([1, 2]), dist.new_group([0, 2])
    first, *_, of_others, second = [place(group) for group in (some, others, others, some)]
    assert first.split("/")[1] == second.split("/")[1]
    numbers = [int(key.split("/")[2]) for key in (first, second)]
    assert numbers[1] == numbers[0] + 1
    assert of_others.split("/")[1] != first.split("/")[1]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("group", ["mesh", 7, dist.GroupMember.NON_GROUP_MEMBER], ids=str)
def test_no_group_at_all(group: Any) -> None:
    """What ``new_group`` gives to those that are not in it is none either."""
    with pytest.raises(UsageError, match=r"group=: expected 'world', None or a process group.*found") as caught:
        company_of(group, 5.0)
    assert caught.value.key == "group"


def test_a_group_without_torch_distributed() -> None:
    """There is none to be had."""
    with pytest.raises(UsageError, match="group=: expected 'world', None or a process group"):
        company_of("all", 5.0)


@pytest.mark.parametrize("timeout_s", [0, -1.0, True, "600", float("nan")], ids=repr)
def test_how_long_to_wait(timeout_s: Any) -> None:
    """It is a positive number of seconds."""
    with pytest.raises(UsageError, match="timeout_s=: expected a positive number of seconds, found"):
        company_of(None, timeout_s)
