"""Makes the golden run of format 1 whose checkpoints share a file, next to this file. Run once.

    python tests/golden/make_format_1_shared.py

What it wrote stays as it is for ever; see ``make_format_1.py``. A checkout has two copies of the shared file, which is
as good: each checkpoint is complete.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from holdfast.run import Run
from holdfast.state import unchanged

HERE = pathlib.Path(__file__).parent


def state(step: int) -> dict[str, Any]:
    """A frozen part, a trained part that is tied, and an entry that is one file."""
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 2), "adapter": torch.nn.Linear(2, 2)})
    model["tied"] = torch.nn.Linear(2, 2, bias=False)
    model["tied"].weight = model["adapter"].weight
    with torch.no_grad():
        model["backbone"].weight.copy_(torch.arange(6.0).view(2, 3))
        model["backbone"].bias.copy_(torch.tensor([0.5, -0.5]))
        model["adapter"].weight.fill_(float(step))
        model["adapter"].bias.fill_(-float(step))
    model["backbone"].requires_grad_(False)
    return {"model": model, "x": torch.tensor([float(step)])}


def main() -> None:
    """Write it."""
    unchanged.MIN_GROUP_BYTES = 1  # a golden checkpoint is small
    run = Run(HERE / "format-1-shared")
    for step in (1, 2):
        run.save(state(step), step=step, reason="golden")


if __name__ == "__main__":
    main()
