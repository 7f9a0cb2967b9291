"""States of a training, each told from all others by a number: what a workload saves, and what must come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

FROZEN = 3 * 512
"""Elements of the frozen backbone: two blocks of a disk, with what comes before them in their file."""


class Net(nn.Module):
    """A frozen backbone under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Parameter(torch.arange(FROZEN, dtype=torch.float32), requires_grad=False)
        self.head = nn.Parameter(torch.zeros(1500))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Not called: nothing is computed here, only saved."""
        return value


def new_state() -> dict[str, Any]:
    """A state that has no number yet."""
    return {"model": Net(), "moments": {"first": torch.zeros(1100), "second": torch.zeros(3)}, "plain": {"seed": 0}}


def fill(state: Mapping[str, Any], seed: int) -> None:
    """Make it the state number ``seed``, in place, as training would."""
    head, first, second = _values(seed)
    with torch.no_grad():
        state["model"].head.copy_(head)
    state["moments"]["first"].copy_(first)
    state["moments"]["second"].copy_(second)
    state["plain"]["seed"] = seed


def numbered(seed: int) -> dict[str, Any]:
    """A new state, number ``seed``."""
    state = new_state()
    fill(state, seed)
    return state


def number_of(loaded: Mapping[str, Any]) -> int | None:
    """The number of a state that was loaded; None when it is, bit for bit, none of those that were ever saved."""
    try:
        seed = loaded["plain"]["seed"]
        head, first, second = _values(seed)
        model, moments = loaded["model"], loaded["moments"]
        found = (model["backbone"], model["head"], moments["first"], moments["second"])
    except (KeyError, TypeError):
        return None
    expected = (torch.arange(FROZEN, dtype=torch.float32), head, first, second)
    same = all(isinstance(a, torch.Tensor) and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return seed if same else None


def _values(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """No element is zero, and none is equal to that of another number: a lost block cannot go unnoticed."""
    return (
        torch.arange(1500, dtype=torch.float32) + 1 + 10_000 * seed,
        -1 - torch.arange(1100, dtype=torch.float32) - 10_000 * seed,
        torch.tensor([seed + 0.5, seed + 0.25, seed + 0.125]),
    )
