"""Modules: the plain names of their tensors, whatever they are wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from holdfast.state.sharding import local_of

# Recognized by name, so that none of them has to be imported to find out that it is not used.
_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "CheckpointWrapper",
    ): "_checkpoint_wrapped_module",
}


def _wrapped_attribute(kind: type[torch.nn.Module]) -> str | None:
    """The attribute under which a wrapper holds what it wraps; None for everything else."""
    for base in kind.__mro__:
        attribute = _WRAPPERS.get((base.__module__, base.__qualname__))
        if attribute is not None:
            return attribute
    return None


def register_shards(module: torch.nn.Module) -> None:
    """Have FSDP2 put back the parameters that optimizers hold, where it has whole ones in their place since a forward.

    Its ``state_dict()`` does the same. The whole ones are gathered again when they are needed.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for submodule in module.modules():
        if _is_fsdp(submodule):
            submodule.reshard()  # type: ignore[operator]


def waits_for_reduction(module: torch.nn.Module) -> bool:
    """Whether FSDP2 holds gradients that are not reduced over ranks yet, and so are no parameter's ``grad``."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(
        parameter.unsharded_accumulated_grad is not None
        or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
        for submodule in module.modules()
        if _is_fsdp(submodule)
        for group in submodule._get_fsdp_state()._fsdp_param_groups  # type: ignore[operator]
        for parameter in group.fsdp_params
    )


def _is_fsdp(module: torch.nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def name_cleaner(module: torch.nn.Module) -> Callable[[str], str]:
    """A function that strips from a name in ``module`` the parts that wrappers put there, and only those.

    A submodule that is really called ``module`` keeps its name: what counts is what stands at that place.
    """
    inserted = set()
    attributes: dict[type[torch.nn.Module], str | None] = {}
    for path, submodule in module.named_modules(remove_duplicate=False):
        kind = type(submodule)
        if kind not in attributes:
            attributes[kind] = _wrapped_attribute(kind)
        attribute = attributes[kind]
        if attribute is not None:
            inserted.add(f"{path}.{attribute}" if path else attribute)
    if not inserted:
        return lambda name: name

    def clean(name: str) -> str:
        kept = []
        raw = ""
        for part in name.split("."):
            raw = f"{raw}.{part}" if raw else part
            if raw not in inserted:
                kept.append(part)
        return ".".join(kept)

    return clean


def module_state(module: torch.nn.Module, clean: Callable[[str], str] | None = None) -> dict[str, Any]:
    """The module's ``state_dict()`` by plain names; the tensors are references.

    Args:
        module: whose.
        clean: its name cleaner, where that is known.
    """
    clean = name_cleaner(module) if clean is None else clean
    return {clean(name): value for name, value in module.state_dict().items()}


def parameter_names(module: torch.nn.Module, clean: Callable[[str], str]) -> list[tuple[str, torch.nn.Parameter]]:
    """Every name of every parameter, tied ones under each of their names; ``clean`` is the module's name cleaner."""
    return [(clean(name), parameter) for name, parameter in module.named_parameters(remove_duplicate=False)]


def owned_storages(module: torch.nn.Module) -> set[int]:
    """The storages of the module's own parameters and buffers: writing there is writing into the module."""
    return {
        local_of(tensor).untyped_storage()._cdata
        for tensor in [*module.parameters(), *module.buffers()]
        if not is_lazy(tensor)
    }


def needs_load_state_dict(module: torch.nn.Module) -> bool:
    """Whether the module does more at ``load_state_dict`` than copying its tensors."""
    return type(module).load_state_dict is not torch.nn.Module.load_state_dict or any(
        not all(map(_only_registers_shards, submodule._load_state_dict_pre_hooks.values()))
        or submodule._load_state_dict_post_hooks
        or not type(submodule)._load_from_state_dict.__module__.startswith("torch.")
        for submodule in module.modules()
    )


def _only_registers_shards(hook: Any) -> bool:
    """Whether a hook is FSDP2's own, which does no more than :func:`register_shards` does."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard")


def load_module(module: torch.nn.Module, values: dict[str, Any]) -> None:
    """Give ``values``, by plain names, to the module's own ``load_state_dict``."""
    clean = name_cleaner(module)
    current = module.state_dict()
    metadata = getattr(current, "_metadata", None)
    by_raw_name = type(current)((raw, values[clean(raw)]) for raw in current if clean(raw) in values)
    if metadata is not None:
        by_raw_name._metadata = metadata  # type: ignore[attr-defined]  # torch keeps the modules' versions there
    module.load_state_dict(by_raw_name, strict=False)
