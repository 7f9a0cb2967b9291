"""The states that are saved and loaded: of real shapes, filled with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        frozen: the names of those that training leaves as they are.
    """

    objects: dict[str, Any]
    tensors: Tensors
    frozen: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def changing_bytes(self) -> int:
        """Bytes of the tensors that training changes."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name not in self.frozen)

    @torch.no_grad()
    def change(self) -> None:
        """Change every tensor that training changes, as an optimizer's step does, which it calls for its hooks."""
        for thing in self.objects.values():
            if isinstance(thing, torch.optim.Optimizer):
                thing.step()  # without gradients it leaves every parameter as it is
        for name, tensor in self.tensors.items():
            if name not in self.frozen:
                tensor.add_(1)


def gpt2(scale: str, seed: int) -> Workload:
    """GPT-2 small with AdamW: 148 parameters by three, 1.49 GB in float32; ``scale="small"`` is 29 MB."""
    generator = torch.Generator().manual_seed(seed)
    return _trained(_module(gpt2_shapes(scale), generator), generator)


def gpt2_shapes(scale: str) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of its parameters."""
    return _gpt2_shapes(*((768, 12, 50257, 1024) if scale == "full" else (128, 12, 50, 64)))


def many(scale: str, seed: int) -> Workload:
    """20,000 tensors of 4 KiB: what each single tensor costs; ``scale="small"`` has 500."""
    generator = torch.Generator().manual_seed(seed)
    count = 20_000 if scale == "full" else 500
    tensors = {f"tensor_{index:05d}": torch.rand(1024, generator=generator) for index in range(count)}
    return Workload({"tensors": tensors}, tensors)


def lora(scale: str, seed: int) -> Workload:
    """GPT-2 medium, frozen, 1.42 GB, with adapters of rank 8 at every linear layer: 1% more, trained with AdamW."""
    width, layers, words, places = (1024, 24, 50257, 1024) if scale == "full" else (256, 6, 1000, 64)
    generator = torch.Generator().manual_seed(seed)
    shapes = _gpt2_shapes(width, layers, words, places)
    adapters: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in shapes:
        if ".c_" in name and len(shape) == 2:
            path = name.removesuffix(".weight")
            adapters += [(f"{path}.lora_A.weight", (8, shape[0])), (f"{path}.lora_B.weight", (shape[1], 8))]
    frozen = {name for name, _ in shapes}
    model = _module([*shapes, *adapters], generator)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return _trained(model, generator)


WORKLOADS: dict[str, Callable[[str, int], Workload]] = {"gpt2": gpt2, "many": many, "lora": lora}


def _module(shapes: Iterable[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> nn.Module:
    """A module with random parameters of these names and shapes."""
    return module_of((name, torch.rand(shape, generator=generator)) for name, shape in shapes)


def module_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> nn.Module:
    """A module with these parameters, by name."""
    model = nn.Module()
    for name, tensor in tensors:
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, nn.Parameter(tensor))
    return model


def _trained(model: nn.Module, generator: torch.Generator) -> Workload:
    """The model with the AdamW that a first step would make, without the memory for gradients."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-4)
    tensors: Tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    frozen = frozenset(f"model.{name}" for name, _ in model.named_parameters() if name not in trained)
    for name, parameter in trained.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(1000.0),
            "exp_avg": torch.rand(parameter.shape, generator=generator),
            "exp_avg_sq": torch.rand(parameter.shape, generator=generator),
        }
        for slot, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{slot}"] = value
    return Workload({"model": model, "optimizer": optimizer}, tensors, frozen)


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
