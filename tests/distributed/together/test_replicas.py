"""Of which tensors that every process holds whole only one value counts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from holdfast.distributed.replicas import authoritative, reordering


@pytest.fixture
def wrap() -> Iterator[Any]:
    """Puts a module under DistributedDataParallel, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    dist.destroy_process_group()


def net() -> nn.Module:
    """Has buffers of its own and of a part."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("seen", torch.zeros(1))
    return model


BUFFERS = {"seen", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_no_ddp() -> None:
    """Nobody gives buffers to others: they have to be alike."""
    assert authoritative({"model": net()}) == {}


def test_buffers_under_ddp(wrap: Any) -> None:
    """By the names that a checkpoint has them by, whoever wraps them."""
    assert authoritative({"model": wrap(net())}) == {"model": BUFFERS}


def test_buffers_that_are_not_broadcast(wrap: Any) -> None:
    """Have to be alike."""
    model = wrap(net())
    model.broadcast_buffers = False
    assert authoritative({"model": model}) == {}


def test_a_part_under_ddp(wrap: Any) -> None:
    """Only its buffers."""
    whole = nn.ModuleDict({"frozen": net(), "trained": wrap(net())})
    assert authoritative({"model": whole}) == {"model": {f"trained.{name}" for name in BUFFERS}}


def test_ddp_in_a_container(wrap: Any) -> None:
    """The path to it is a part of the names."""
    found = authoritative({"nets": {"student": wrap(net()), "teacher": net()}})
    assert found == {"nets": {f"student.{name}" for name in BUFFERS}}


@pytest.mark.parametrize(
    ("ranks", "unused", "static", "found"),
    [
        (4, False, False, ["nets.student.1"]),
        (2, False, False, []),
        (4, True, False, []),
        (4, True, True, ["nets.student.1"]),
    ],
)
def test_gradients_that_are_summed_in_another_order(
    wrap: Any, ranks: int, unused: bool, static: bool, found: list[str]
) -> None:
    """By more than two ranks whose buckets change after the first step."""
    parallel = wrap(net(), find_unused_parameters=unused)
    parallel.static_graph = static
    parallel.process_group = SimpleNamespace(size=lambda: ranks)
    assert reordering({"nets": {"student": nn.Sequential(nn.Linear(2, 2), parallel), "teacher": net()}}) == found


def test_what_is_no_module() -> None:
    """Has no buffers."""
    assert authoritative({"x": torch.ones(2), "n": 3}) == {}
