"""State on CUDA devices, saved in the background. Skipped where there is no device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Checkpointer, Every, KeepLast, Run
from holdfast.state.cuda import DeviceCopies, Pin, pinned_buffer
from holdfast.storage import memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model on the device whose optimizer has its state."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Linear(512, 8)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on ones."""
    optimizer.zero_grad()
    model(torch.ones(4, 512, device="cuda")).sum().backward()
    optimizer.step()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("options", [{"background": False}, {}, {"overlap": True}], ids=str)
def test_each_save_holds_what_was_there_at_its_call(tmp_path: Path, options: dict[str, Any]) -> None:
    """While the device goes on computing and changes it."""
    model, optimizer = training()
    state = {"model": model, "optimizer": optimizer}
    expected = []
    with Checkpointer(tmp_path, state, save=Every(steps=1), keep=KeepLast(9), **options) as ckpt:
        for _ in range(5):
            step(model, optimizer)
            expected.append({name: value.cpu().clone() for name, value in model.state_dict().items()})
            ckpt.step()
    for checkpoint, values in zip(Run(tmp_path), expected, strict=True):
        loaded = holdfast.load(checkpoint.path, device="cuda")["model"]
        assert {name for name in values if not torch.equal(loaded[name].cpu(), values[name])} == set()


@pytest.mark.cuda
@needs_cuda
def test_a_restore_through_pinned_memory(tmp_path: Path) -> None:
    """Tensors on the device are filled in place."""
    model, optimizer = training()
    step(model, optimizer)
    holdfast.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
    expected = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    step(model, optimizer)
    holdfast.restore(tmp_path / "x", {"model": model, "optimizer": optimizer})
    assert {name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), expected[name])} == set()
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.cuda
@needs_cuda
def test_copies_are_ordered_with_the_device(tmp_path: Path) -> None:
    """Later work on the device waits for the copy, of tensors in any order of memory."""
    tensor = torch.arange(2.0**20, device="cuda").view(1024, 1024).t()
    expected = tensor.cpu()
    room = memory.allocate(tensor.nbytes)
    pin = Pin()
    pin.hold(room)
    copies = DeviceCopies([(tensor, room)])
    tensor.zero_()
    copies.wait()
    assert torch.equal(torch.frombuffer(room, dtype=torch.float32).view(1024, 1024), expected)
    pin.release()


def test_without_a_device() -> None:
    """The same interface, with ordinary memory and nothing to wait for."""
    room = memory.allocate(4096)
    pin = Pin()
    pin.hold(room)
    pin.release()
    copies = DeviceCopies([])
    copies.hold_device()
    copies.wait()
    if not torch.cuda.is_available():
        buffer = pinned_buffer(4096)
        assert (len(buffer), memory.address_of(buffer) % 4096) == (4096, 0)
