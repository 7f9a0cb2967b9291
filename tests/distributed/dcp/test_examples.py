"""PyTorch's published examples of DCP, with the two classes in the place of its own and nothing else changed.

They follow the recipes "Getting Started with Distributed Checkpoint" and "Asynchronous Saving with Distributed
Checkpoint", and the examples in the reference of ``dcp.save`` and ``dcp.load``; on CPUs, where those have GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import holdfast
from holdfast.distributed import HoldfastReader, HoldfastWriter

WORLD_SIZE = 2
CHECKPOINT = "checkpoint"


class Toy(nn.Module):
    """The module of the recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.net1 = nn.Linear(16, 16)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        return self.net2(self.relu(self.net1(x)))


class AppState(Stateful):
    """What the recipes wrap a module and its optimizer in, so that DCP asks for the state and gives it back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """By names that do not depend on the ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into both."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module, cut by FSDP2, and an optimizer."""
    model = fully_shard(Toy(), mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step."""
    optimizer.zero_grad()
    model(torch.rand(8, 16)).sum().backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, list[float]]:
    """Whole parameters, as numbers."""
    return {name: getattr(p, "full_tensor", lambda p=p: p)().tolist() for name, p in model.named_parameters()}


def save_fsdp(rank: int) -> dict[str, list[float]]:
    """The recipe's saving example."""
    torch.manual_seed(rank)
    model, optimizer = sharded()
    train(model, optimizer)
    dcp.save({"app": AppState(model, optimizer)}, storage_writer=HoldfastWriter(CHECKPOINT))
    return weights(model)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples save in the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_saving_and_loading_with_fsdp(here: Path, on_ranks: Any) -> None:
    """The recipe's saving example, then its loading example."""

    def load_fsdp(rank: int) -> dict[str, list[float]]:
        torch.manual_seed(10 + rank)
        model, optimizer = sharded()
        dcp.load(state_dict={"app": AppState(model, optimizer)}, storage_reader=HoldfastReader(CHECKPOINT))
        return weights(model)

    saved = on_ranks(WORLD_SIZE, save_fsdp)

    assert on_ranks(WORLD_SIZE, load_fsdp) == saved


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_loading_without_a_process_group(here: Path, on_ranks: Any) -> None:
    """The recipe's example of loading in one process, for inference."""
    saved = on_ranks(WORLD_SIZE, save_fsdp)
    model = Toy()
    state_dict = {"app": {"model": model.state_dict()}}
    dcp.load(state_dict=state_dict, storage_reader=HoldfastReader(CHECKPOINT))
    model.load_state_dict(state_dict["app"]["model"])

    assert weights(model) == saved[0]


def test_saving_in_the_background(here: Path, on_ranks: Any) -> None:
    """The recipe's loop: at most one save is under way.

    Its training talks through NCCL and DCP through gloo; where both talk through gloo, each needs a group of its own.
    """

    def loop(rank: int) -> list[dict[str, list[float]]]:
        model, optimizer = sharded()
        group = dist.new_group()
        checkpoint_future = None
        seen = []
        for step in range(3):
            train(model, optimizer)
            if checkpoint_future is not None:
                checkpoint_future.result()
            seen.append(weights(model))
            checkpoint_future = dcp.async_save(
                {"app": AppState(model, optimizer)},
                storage_writer=HoldfastWriter(f"{CHECKPOINT}_step{step}"),
                checkpoint_id=f"{CHECKPOINT}_step{step}",
                process_group=group,
            )
        assert checkpoint_future is not None
        checkpoint_future.result()
        return seen

    [seen, _] = on_ranks(WORLD_SIZE, loop)
    found = [holdfast.load(f"{CHECKPOINT}_step{step}")["app"]["model"] for step in range(3)]

    assert [{name: value.tolist() for name, value in model.items()} for model in found] == seen


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_examples_of_the_reference(here: Path) -> None:
    """A module is asked for its state; a state dict is loaded into, and given to the module."""
    my_model = Toy()
    dcp.save(state_dict={"model": my_model}, storage_writer=HoldfastWriter("checkpoints/1"))
    dcp.save(state_dict=my_model.state_dict(), storage_writer=HoldfastWriter("checkpoints/2"))
    other, third = Toy(), Toy()
    dcp.load(state_dict={"model": other}, storage_reader=HoldfastReader("checkpoints/1"))
    model_state_dict = third.state_dict()
    dcp.load(state_dict=model_state_dict, storage_reader=HoldfastReader("checkpoints/2"))
    third.load_state_dict(model_state_dict)

    assert weights(other) == weights(third) == weights(my_model)
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_objects_with_a_state_of_their_own(here: Path) -> None:
    """Modules, optimizers and schedulers as they are, which DCP asks for their state."""

    def objects() -> dict[str, Any]:
        model = Toy()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}

    saved, loaded = objects(), objects()
    for state in (saved, loaded):
        train(state["model"], state["optimizer"])
    for _ in range(5):
        saved["scheduler"].step()
    dcp.save(saved, storage_writer=HoldfastWriter(CHECKPOINT))
    dcp.load(loaded, storage_reader=HoldfastReader(CHECKPOINT))

    assert weights(loaded["model"]) == weights(saved["model"])
    assert loaded["scheduler"].state_dict() == saved["scheduler"].state_dict()
    one, other = loaded["optimizer"].state_dict(), saved["optimizer"].state_dict()
    assert all(
        torch.equal(one["state"][n][slot], value) for n in other["state"] for slot, value in other["state"][n].items()
    )
