"""The states that are saved and loaded: of real shapes, filled with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Workload:
    """One state: its objects, and the same tensors by name, for those who save tensors only.

    Attributes:
        objects: what a training would give: modules and optimizers, or a dictionary of tensors.
        tensors: every tensor of it; they share memory with the objects.
    """

    objects: dict[str, Any]
    tensors: Tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def gpt2(scale: str, seed: int) -> Workload:
    """GPT-2 small with AdamW: 148 parameters by three, 1.49 GB in float32; ``scale="small"`` is 29 MB."""
    width, layers, words, places = (768, 12, 50257, 1024) if scale == "full" else (128, 12, 50, 64)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in _gpt2_shapes(width, layers, words, places):
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, nn.Parameter(torch.rand(shape, generator=generator)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for parameter in model.parameters():
        # What a first step would make, without the memory for gradients.
        optimizer.state[parameter] = {
            "step": torch.tensor(1000.0),
            "exp_avg": torch.rand(parameter.shape, generator=generator),
            "exp_avg_sq": torch.rand(parameter.shape, generator=generator),
        }
    tensors: Tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{slot}"] = value
    return Workload({"model": model, "optimizer": optimizer}, tensors)


def many(scale: str, seed: int) -> Workload:
    """20,000 tensors of 4 KiB: what each single tensor costs; ``scale="small"`` has 500."""
    generator = torch.Generator().manual_seed(seed)
    count = 20_000 if scale == "full" else 500
    tensors = {f"tensor_{index:05d}": torch.rand(1024, generator=generator) for index in range(count)}
    return Workload({"tensors": tensors}, tensors)


WORKLOADS: dict[str, Callable[[str, int], Workload]] = {"gpt2": gpt2, "many": many}


def _gpt2_shapes(width: int, layers: int, words: int, places: int) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("wte.weight", (words, width)), ("wpe.weight", (places, width))]
    for layer in range(layers):
        for name, shape in (
            ("ln_1.weight", (width,)),
            ("ln_1.bias", (width,)),
            ("attn.c_attn.weight", (width, 3 * width)),
            ("attn.c_attn.bias", (3 * width,)),
            ("attn.c_proj.weight", (width, width)),
            ("attn.c_proj.bias", (width,)),
            ("ln_2.weight", (width,)),
            ("ln_2.bias", (width,)),
            ("mlp.c_fc.weight", (width, 4 * width)),
            ("mlp.c_fc.bias", (4 * width,)),
            ("mlp.c_proj.weight", (4 * width, width)),
            ("mlp.c_proj.bias", (width,)),
        ):
            shapes.append((f"h.{layer}.{name}", shape))
    return [*shapes, ("ln_f.weight", (width,)), ("ln_f.bias", (width,))]
