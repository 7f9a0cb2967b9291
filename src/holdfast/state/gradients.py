"""Gradients in the middle of an accumulation: between two optimizer steps they are state like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from holdfast.errors import UnsupportedValueError
from holdfast.state.kinds import Kind, live_objects
from holdfast.state.modules import waits_for_reduction
from holdfast.state.optimizers import ParameterNames


def parameters_of(state: Mapping[str, Any], names: ParameterNames) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Each tensor of a state that can have a gradient, with all its names, the one used for saving first."""
    for _, value, kind in live_objects(state):
        found = value.parameters() if kind is Kind.MODULE else [value] if kind is None else []
        for tensor in found:
            if tensor.requires_grad and tensor.is_leaf:
                yield names.of(tensor), tensor


def gradients_of(state: Mapping[str, Any], names: ParameterNames) -> dict[str, torch.Tensor]:
    """The gradients that are there, by the name of their parameter; the tensors are references.

    Raises:
        UnsupportedValueError: FSDP2 holds some that are not reduced over ranks yet.
    """
    for path, value, kind in live_objects(state):
        if kind is Kind.MODULE and waits_for_reduction(value):
            raise UnsupportedValueError(
                f"{path}: expected gradients that are reduced over ranks, but FSDP2 holds some that wait for it. Save "
                "after an optimizer step, or after a backward under set_requires_gradient_sync(True).",
                key=path,
            )
    return {known[0]: tensor.grad for known, tensor in parameters_of(state, names) if tensor.grad is not None}
