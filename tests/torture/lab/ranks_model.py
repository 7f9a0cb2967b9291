"""A small model with what is awkward about real ones, and the ways in which ranks can share it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

SYMBOLS, WIDTH, PLACES, CLASSES = 23, 12, 5, 5


class Small(nn.Module):
    """Sizes that divide by nothing, tied weights, a scalar parameter, buffers, dropout.

    Args:
        batch_norm: with statistics over the batch, which every rank has its own of between two steps.
    """

    seen: Tensor
    places: Tensor
    tokens: nn.Embedding

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS, WIDTH)
        self.up = nn.Linear(WIDTH, 18)
        self.down = nn.Linear(18, WIDTH)
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH) if batch_norm else nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.head.weight = self.tokens.weight
        self.classes = nn.Linear(WIDTH, CLASSES)  # dealt to four ranks as 2, 2, 1 and 0 rows
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("places", torch.arange(PLACES), persistent=False)

    def forward(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """The next symbol's scores at each place, and the scores of the classes."""
        if self.training:
            self.seen += 1
        hidden = self.tokens(symbols) + (self.places / PLACES)[:, None]
        hidden = hidden + self.dropout(self.down(torch.relu(self.up(hidden))))
        if isinstance(self.norm, nn.BatchNorm1d):
            hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        else:
            hidden = self.norm(hidden)
        mean = hidden.mean(dim=1) * self.scale
        return self.head(self.dropout(mean)), self.classes(mean)


@dataclass(frozen=True, slots=True)
class Laid:
    """A model as its ranks share it.

    Attributes:
        model: what is called, and saved.
        bare: the same without a wrapper around it.
        data_rank: whose share of the data this rank takes.
        data_ranks: how many shares there are.
        average: to be called after the backward pass: gradients that nobody else averages over the ranks.
    """

    model: nn.Module
    bare: Small
    data_rank: int
    data_ranks: int
    average: Callable[[], None] = lambda: None


def alone(model: Small) -> Laid:
    """Every rank has a model of its own, which is the same everywhere since the data is too."""
    return Laid(model, model, 0, 1)


def ddp(model: Small) -> Laid:
    """Replicated; gradients are averaged, in the same order in each step of a process."""
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    return Laid(parallel, model, dist.get_rank(), dist.get_world_size())


def fsdp(model: Small) -> Laid:
    """Sharded over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    _shard(model, mesh)
    return Laid(model, model, dist.get_rank(), dist.get_world_size(), lambda: _average(model.scale, mesh))


def hsdp(model: Small) -> Laid:
    """Sharded over pairs of ranks, and replicated over these."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    _shard(model, mesh)
    flat = mesh._flatten("data")
    return Laid(model, model, dist.get_rank(), dist.get_world_size(), lambda: _average(model.scale, flat))


def tp(model: Small) -> Laid:
    """Cut within its layers, over all ranks, which see the same data."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    _cut(model, mesh)
    return Laid(model, model, 0, 1)


def fsdp_tp(model: Small) -> Laid:
    """Cut within its layers over pairs of ranks, and sharded over these."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shard", "tensor"))
    _cut(model, mesh["tensor"])
    _shard(model, mesh["shard"])
    shard = mesh["shard"]
    return Laid(model, model, shard.get_local_rank(), shard.size(), lambda: _average(model.scale, shard))


LAYOUTS: dict[str, Callable[[Small], Laid]] = {
    "alone": alone,
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp+tp": fsdp_tp,
}

WORLD_SIZES = {"alone": (1,), "ddp": (1, 2, 4), "fsdp": (1, 2, 4), "tp": (1, 2, 4), "hsdp": (4,), "fsdp+tp": (4,)}
"""On how many ranks a layout can be tried here."""


def _shard(model: Small, mesh: DeviceMesh) -> None:
    """All but the scalar, which FSDP2 does not take."""
    for module in (model.up, model.down):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.scale})


def _cut(model: Small, mesh: DeviceMesh) -> None:
    parallelize_module(
        model,
        mesh,
        {
            "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "up": ColwiseParallel(use_local_output=False),  # its parts are not of one size
            "down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
            "classes": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        },
    )
    model.head.weight = model.tokens.weight  # each got a tensor of its own
    assert isinstance(model.head.weight, DTensor)
    assert model.head.weight.placements == (Shard(0),)


def _average(parameter: nn.Parameter, mesh: DeviceMesh) -> None:
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        parameter.grad /= mesh.size()


def gathered(bare: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a model and its optimizer, whole, by name; all ranks have to call it."""
    found = {f"model.{name}": tensor for name, tensor in bare.state_dict().items()}
    for name, parameter in bare.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{slot}"] = torch.as_tensor(value)
    for index, group in enumerate(optimizer.param_groups):
        found[f"optimizer.group {index}.lr"] = torch.as_tensor(group["lr"])
    return {name: whole(tensor) for name, tensor in found.items()}


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of all of a tensor."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def local(bare: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What of the same tensors this rank has."""
    slots = (
        (f"{name}.{slot}", value)
        for name, parameter in bare.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    )
    for name, tensor in itertools.chain(bare.state_dict().items(), slots):
        yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor


def grads(bare: nn.Module) -> dict[str, Any]:
    """The gradients that wait, as this rank has them."""
    return {
        name: parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in bare.named_parameters()
        if parameter.grad is not None
    }
