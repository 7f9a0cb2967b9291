"""Tensors of which each process holds a part: PyTorch's DTensor, as FSDP2 and tensor parallelism use it."""

from __future__ import annotations

import sys

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Does not import what makes them."""
    api = sys.modules.get("torch.distributed.tensor")
    return api is not None and isinstance(tensor, api.DTensor)


def local_box(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this process holds of ``tensor``, and where that begins in the whole: empty for all of a plain tensor."""
    if not is_sharded(tensor):
        return tensor, ()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with torch.no_grad():
        local = tensor.to_local()  # type: ignore[attr-defined]
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return local, offset
