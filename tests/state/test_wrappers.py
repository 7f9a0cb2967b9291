"""Wrappers leave no trace in a checkpoint: what was saved under one is restored bare, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

import holdfast
from holdfast import Checkpoint


class Block(nn.Module):
    """A submodule that is really called ``module``, and one called as compile calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self._orig_mod = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self._orig_mod(self.module(x))


class Net(nn.Module):
    """Blocks that are wrapped in different ways."""

    def __init__(self, inner: Callable[[nn.Module], nn.Module] = lambda block: block) -> None:
        super().__init__()
        self.first = inner(Block())
        self.module = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.module(self.first(x))


NAMES = [
    f"{block}.{name}"
    for block in ("first", "module")
    for name in (
        "module.weight",
        "module.bias",
        "_orig_mod.weight",
        "_orig_mod.bias",
        "_orig_mod.running_mean",
        "_orig_mod.running_var",
        "_orig_mod.num_batches_tracked",
    )
]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("dist") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> Any:
    """Under torch.compile; what it compiles to does not matter here."""
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[], Any]] = {
    "bare": Net,
    "compile": lambda: compiled(Net()),
    "DDP": lambda: DistributedDataParallel(Net()),
    "compiled DDP": lambda: compiled(DistributedDataParallel(Net())),
    "DDP of compiled": lambda: DistributedDataParallel(compiled(Net())),
    "DataParallel": lambda: DataParallel(Net()),
    "compiled part": lambda: Net(compiled),
    "activation checkpointing": lambda: Net(checkpoint_wrapper),
    "FSDP2": lambda: fully_shard(Net(), mesh=init_device_mesh("cpu", (1,))),
    "FSDP2 of a part": lambda: fully_shard(
        Net(lambda part: fully_shard(part, mesh=init_device_mesh("cpu", (1,)))), mesh=init_device_mesh("cpu", (1,))
    ),
}


def trained(make: Callable[[], Any], seed: int) -> dict[str, Any]:
    """A wrapped model with its optimizer after two steps."""
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    return {"model": model, "optimizer": optimizer}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps on the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def flat(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor by its name."""
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


@pytest.mark.parametrize("outer", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_saved_names_are_plain(tmp_path: Path, outer: str) -> None:
    """No wrapper's prefix is in the names, and no name of the user's is taken for one."""
    checkpoint = holdfast.save(tmp_path / "x", trained(WRAPPERS[outer], 0))
    assert [name for name in checkpoint.tensors if name.startswith("model/")] == [f"model/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("saved", "live"),
    [pair for name in list(WRAPPERS)[1:] for pair in ((name, "bare"), ("bare", name))] + [("DDP", "compile")],
)
@pytest.mark.usefixtures("process_group")
def test_saved_under_one_restored_under_another(tmp_path: Path, saved: str, live: str) -> None:
    """Model and optimizer, bit for bit; and both go on training alike."""
    source, target = trained(WRAPPERS[saved], 0), trained(WRAPPERS[live], 1)
    before = flat(holdfast.save(tmp_path / "a", source))
    report = holdfast.restore(tmp_path / "a", target)
    assert (report.missing, report.unexpected, report.fresh, report.dropped) == ((), (), (), ())
    assert flat(holdfast.save(tmp_path / "b", target)) == before
    if "activation checkpointing" in (saved, live):
        return  # runs each forward pass twice, so that running means differ from the bare model's by nature
    for state in (source, target):
        train(state["model"], state["optimizer"], 2)
    after = flat(holdfast.save(tmp_path / "c", source))
    assert after != before
    assert flat(holdfast.save(tmp_path / "d", target)) == after


@pytest.mark.usefixtures("process_group")
def test_other_tools_read_it_into_the_bare_model(tmp_path: Path) -> None:
    """The file of a wrapped model is the bare model's state_dict."""
    from safetensors.torch import load_file

    state = trained(WRAPPERS["compiled DDP"], 0)
    holdfast.save(tmp_path / "x", state)
    bare = Net()
    bare.load_state_dict(load_file(tmp_path / "x" / "model.safetensors"), strict=True)
    wrapped = state["model"]._orig_mod.module
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True))


def test_a_compiled_function_stays_valid(tmp_path: Path) -> None:
    """The graph compiled before the restore computes with the restored values."""
    model = nn.Linear(2, 1, bias=False)
    run = compiled(model)
    holdfast.save(tmp_path / "x", {"model": run})
    x = torch.ones(1, 2)
    expected = run(x).item()
    with torch.no_grad():
        model.weight.zero_()
    assert run(x).item() == 0.0
    holdfast.restore(tmp_path / "x", {"model": run})
    assert run(x).item() == expected
