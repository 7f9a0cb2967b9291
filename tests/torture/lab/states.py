"""States of a training, each told from all others by a number: what a workload saves, and what must come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to save.

    Attributes:
        frozen: elements of the frozen backbone.
        head: elements of the part that is trained.
        moments: elements of what an optimizer would keep.
        extras: how many more tensors there are, each in a file of its own.
    """

    frozen: int
    head: int
    moments: int
    extras: int

    @classmethod
    def variant(cls, number: int) -> Sizes:
        """Larger ones with larger numbers, a few blocks of a disk each time, and none of them whole blocks."""
        return cls(1536 + 700 * number, 1500 + 1100 * number, 1100 + 600 * number, number)


_sizes = Sizes.variant(0)


def use_variant(number: int) -> None:
    """From here on, states in this process have these sizes."""
    global _sizes  # noqa: PLW0603 - of the process, like the workloads that it is asked for
    _sizes = Sizes.variant(number)


class Net(nn.Module):
    """A frozen backbone under a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Parameter(_backbone(), requires_grad=False)
        self.head = nn.Parameter(torch.zeros(_sizes.head))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Not called: nothing is computed here, only saved."""
        return value


def new_state() -> dict[str, Any]:
    """A state that has no number yet."""
    moments = {"first": torch.zeros(_sizes.moments), "second": torch.zeros(3)}
    extras = {f"extra{number}": torch.zeros(800) for number in range(_sizes.extras)}
    return {"model": Net(), "moments": moments, **extras, "plain": {"seed": 0}}


def fill(state: Mapping[str, Any], seed: int) -> None:
    """Make it the state number ``seed``, in place, as training would."""
    with torch.no_grad():
        state["model"].head.copy_(_values(seed, 1, _sizes.head))
        state["moments"]["first"].copy_(_values(seed, -1, _sizes.moments))
        state["moments"]["second"].copy_(_values(seed, -2, 3))
        for number in range(_sizes.extras):
            state[f"extra{number}"].copy_(_values(seed, 2 + number, 800))
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
        expected = numbered(seed)
        pairs = [
            (loaded["model"]["backbone"], _backbone()),
            (loaded["model"]["head"], expected["model"].head),
            *((loaded["moments"][name], value) for name, value in expected["moments"].items()),
            *((loaded[f"extra{number}"], expected[f"extra{number}"]) for number in range(_sizes.extras)),
        ]
    except (KeyError, TypeError):
        return None
    same = all(isinstance(found, torch.Tensor) and torch.equal(found, value) for found, value in pairs)
    return seed if same else None


def _backbone() -> torch.Tensor:
    return torch.arange(_sizes.frozen, dtype=torch.float32)


def _values(seed: int, sign: int, count: int) -> torch.Tensor:
    """None is zero, and none is equal to that of another number: a lost block cannot go unnoticed."""
    return sign * (torch.arange(count, dtype=torch.float32) + 1 + 10_000 * seed)
