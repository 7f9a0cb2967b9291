"""What the README shows works as it is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def surroundings() -> dict[str, Any]:
    """What a training script has before the example begins."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[int] = []

    def train_step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch[0]).sum().backward()
        optimizer.step()
        seen.append(1)

    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        "dataset": torch.utils.data.TensorDataset(torch.ones(60 * 64, 2)),
        "train_step": train_step,
        "validate": lambda: model.weight.sum().item(),
        "seen": seen,
    }


def run_the_example() -> int:
    """The first example, as a process would: nothing of it is alive afterwards. How many steps it made."""
    names = surroundings()
    exec(BLOCKS[0], names)
    return len(names["seen"])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first example, run once."""
    monkeypatch.chdir(tmp_path)
    run_the_example()
    return tmp_path


def test_the_example_resumes(trained: Path) -> None:
    """Run again it has nothing left to do; with the last checkpoints gone it does only what is missing."""
    run = Run("runs/digits")
    assert [checkpoint.epoch for checkpoint in run][-3:] == [18, 19, 20]
    assert run_the_example() == 0
    for epoch in (19, 20):
        for file in Path(run[epoch * 60].path).glob("*.safetensors"):
            file.unlink()
    assert run_the_example() == 2 * 60


def test_the_other_blocks(trained: Path) -> None:
    """Reading with other tools, saving without a loop, and the tutorial functions."""
    import safetensors.torch

    names = {**surroundings(), "safetensors": safetensors}
    assert len(BLOCKS) == 4
    exec(BLOCKS[1], names)
    assert list(names["weights"]) == ["weight", "bias"]
    exec(BLOCKS[2], names)
    assert list(names["tensors"]) == ["model"]
    assert names["checkpoint"].metrics == {"val_loss": 0.12}
    exec(BLOCKS[3], names)
    assert names["save_checkpoint"] is holdfast.classic.save_checkpoint


def test_what_it_refers_to_is_there() -> None:
    """Every file that the README names."""
    named = set(re.findall(r"`((?:tests|examples|docs)/[\w/.]+)`", README)) | set(
        re.findall(r"\]\(([\w/.]+)\)", README)
    )
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
