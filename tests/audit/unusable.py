"""Functions that cannot be audited, one for each reason."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

NOT_A_FUNCTION = 3


def returns_one_thing() -> Any:
    """No step."""
    return {"total": torch.zeros(1)}


def returns_three_things() -> Any:
    """One too many."""
    return {"total": torch.zeros(1)}, int, int


def state_is_a_list() -> Any:
    """No names."""
    return [torch.zeros(1)], int


def step_is_a_number() -> Any:
    """Nothing to call."""
    return {"total": torch.zeros(1)}, 1


def build_fails() -> Any:
    """An error before the first step."""
    raise FileNotFoundError("no data here")


def third_step_fails() -> Any:
    """An error on the way."""
    total = torch.zeros(1)

    def step() -> None:
        total.add_(1)
        if total.item() == 3:
            raise ZeroDivisionError("the third step is one too many")

    return {"total": total}, step


def step_is_killed() -> Any:
    """No error at all: the process is gone."""
    os.write(1, b"the last words")
    return {"total": torch.zeros(1)}, lambda: os.kill(os.getpid(), signal.SIGKILL)


def step_exits() -> Any:
    """A step that ends the program."""
    return {"total": torch.zeros(1)}, lambda: exit(0)


def state_cannot_be_saved() -> Any:
    """A value that has no exact form in a file."""
    return {"total": torch.zeros(1), "strange": object()}, int


def structure_changes() -> Any:
    """A state that the next process has in another shape."""
    return {"total": torch.zeros(1 + os.getpid())[:, None].sum(1)}, lambda: None
