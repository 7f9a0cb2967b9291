"""What the README shows works as it is shown, and so does the script of docs/distributed.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
A_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = A_BLOCK.findall(README)
SCRIPT, SHARDED, *_ = A_BLOCK.findall((ROOT / "docs/distributed.md").read_text(encoding="utf-8"))
BEFORE = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from holdfast import Checkpointer
from holdfast.data import ResumableDataLoader

torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
dataset = torch.utils.data.TensorDataset(torch.ones(256, 2))

def train(loader, ckpt):
    for epoch in range(ckpt.epoch, 2):
        for (x,) in loader:
            model(x).sum().backward()
            optimizer.step()
            ckpt.step()
        ckpt.end_epoch()
    if dist.get_rank() == 0:
        print(f"{ckpt.epoch} epochs, {ckpt.global_step} steps, on {dist.get_world_size()} ranks")
"""


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
    assert len(BLOCKS) == 5
    exec(BLOCKS[1], names)
    assert list(names["weights"]) == ["weight", "bias"]
    exec(BLOCKS[2], names)
    assert list(names["tensors"]) == ["model"]
    assert names["checkpoint"].metrics == {"val_loss": 0.12}
    exec(BLOCKS[3], names)
    assert names["save_checkpoint"] is holdfast.classic.save_checkpoint


def on_two_ranks(script: str, directory: Path) -> str:
    """What a script prints on two ranks; both end well."""
    (directory / "train.py").write_text(script, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    start += ["--rdzv-endpoint=localhost:0", "--monitor-interval=0.1"]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(holdfast.__file__).parents[1])}
    ended = subprocess.run(
        [*start, "train.py"],
        cwd=directory,
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_more_than_one_process(tmp_path: Path) -> None:
    """The lines that differ are all that is needed."""
    assert (
        on_two_ranks(BEFORE + BLOCKS[4] + "dist.destroy_process_group()\n", tmp_path)
        == "2 epochs, 8 steps, on 2 ranks\n"
    )


@pytest.mark.slow
def test_the_script_of_many_processes(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """It trains under DDP; when its last checkpoint is gone, the variant with FSDP2 makes what is missing."""
    if not count(0, 1):
        pytest.skip("in make torture")
    library, line = SHARDED.strip().split("\n\n")
    sharded = SCRIPT.replace("from torch.nn.parallel import DistributedDataParallel", library)
    sharded = sharded.replace("model = DistributedDataParallel(model)", line)
    assert sharded.count("fully_shard") == 2
    told = "5 epochs, 40 steps, on 2 ranks\n"
    assert on_two_ranks(SCRIPT, tmp_path) == told
    run = Run(tmp_path / "runs/many")
    assert [checkpoint.step for checkpoint in run] == [24, 32, 40]
    shutil.rmtree(run[40].path)

    assert on_two_ranks(sharded, tmp_path) == told

    assert run[40].parent == run[32].checkpoint_id
    assert len(list(Path(run[40].path).glob("model-*.safetensors"))) > 1


def test_what_it_refers_to_is_there() -> None:
    """Every file that the README names."""
    named = set(re.findall(r"`((?:tests|examples|docs)/[\w/.]+)`", README)) | set(
        re.findall(r"\]\(([\w/.]+)\)", README)
    )
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
