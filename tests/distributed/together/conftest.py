"""Processes of a training as threads of one, over a store that lies in memory: fast, and any of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from holdfast.distributed.group import Group
from holdfast.distributed.together import Together
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.sharding import Sharding

TIMEOUT_S = 20.0


class Ranks:
    """Runs a function as each rank of a group.

    Args:
        size: how many ranks.
        timeout_s: how long one waits for another.
    """

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._store = dist.HashStore()

    def group(self, rank: int, size: int | None = None) -> Group:
        """The group, seen from one rank."""
        return Group(lambda: self._store, rank, size or self.size, self.timeout_s)

    def company(self, rank: int) -> Together:
        """The processes of a training, seen from one rank."""
        return Together(self.group(rank), range(self.size))

    def run(self, work: Callable[[Group], Any], ranks: range | None = None) -> list[Any]:
        """What ``work`` returned on each rank; what it raised, where it did."""

        def one(rank: int) -> Any:
            try:
                return work(self.group(rank))
            except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - handed to whoever asked
                return error

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(one, ranks or range(self.size)))


@pytest.fixture
def ranks() -> Callable[..., Ranks]:
    """Makes ranks."""
    return Ranks


class Cut:
    """A tensor that ranks hold parts of, without a process group.

    Args:
        whole: all of it.
        sharding: how it is cut.
    """

    def __init__(self, whole: torch.Tensor, sharding: Sharding | None) -> None:
        self.whole = whole
        self.sharding = sharding

    def of(self, name: str, rank: int) -> CapturedTensor:
        """What ``rank`` would capture of it."""
        local = self.whole
        if self.sharding is not None:
            box = self.sharding.box(rank)
            assert box is not None
            local = self.whole[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))].contiguous()
        return CapturedTensor(
            name=name,
            dtype=str(self.whole.dtype).removeprefix("torch."),
            shape=tuple(self.whole.shape),
            memory_format="contiguous",
            device="cpu",
            value=local,
            address=local.data_ptr(),
            flat=True,
            sharding=self.sharding,
        )


@pytest.fixture
def cut() -> type[Cut]:
    """Makes tensors that are cut over ranks."""
    return Cut


def captured_of(tensors: dict[str, Cut], rank: int, tree: Any = None) -> dict[str, CapturedEntry]:
    """An entry ``model`` of such tensors, as ``rank`` captures it."""
    nodes = {name: {"$tensor": name} for name in tensors} if tree is None else tree
    return {"model": CapturedEntry(nodes, {name: tensor.of(name, rank) for name, tensor in tensors.items()}, {})}


@pytest.fixture
def captured() -> Callable[..., dict[str, CapturedEntry]]:
    """Captures an entry ``model`` of tensors that are cut over ranks, as one rank would."""
    return captured_of
