"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are faster on one thread, and sums do not depend on how they are split."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """How often a slow test repeats: the first number by default, the second under ``make torture``."""
    torture = os.environ.get("HOLDFAST_TORTURE") == "1"
    return lambda default, full: full if torture else default
