"""Holds the optimizers of a state back while a save still copies what they are about to change."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from holdfast.state.kinds import Kind, live_objects
from holdfast.state.staging import Staging
from holdfast.state.tensors import tensor_address


class StepGuard:
    """A hook before the step of each optimizer of a state.

    Args:
        state: the live objects; optimizers that are not in it are not known here, and neither is what they own.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        found = {id(value): value for _, value, kind in live_objects(state) if kind is Kind.OPTIMIZER}
        self._optimizers: list[torch.optim.Optimizer] = list(found.values())
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in self._optimizers]
        self._staging: Staging | None = None
        self._pid = os.getpid()
        self.waited_s = 0.0  # by optimizers, for the last save

    def addresses(self) -> frozenset[int]:
        """Where the tensors lie that only these optimizers change: parameters, and what is kept for each of them."""
        found = set()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found.add(tensor_address(parameter))
                    slots = optimizer.state.get(parameter, {})
                    found.update(tensor_address(slot) for slot in slots.values() if isinstance(slot, torch.Tensor))
        return frozenset(found - {0})

    def hold(self, staging: Staging) -> None:
        """Have the next step of each optimizer wait for ``staging``."""
        self.waited_s = 0.0
        self._staging = staging

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._staging = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        staging = self._staging
        if staging is None or os.getpid() != self._pid:  # in a forked child nobody would ever finish the copy
            return
        start_s = time.perf_counter()
        staging.before_step()
        self.waited_s += time.perf_counter() - start_s
