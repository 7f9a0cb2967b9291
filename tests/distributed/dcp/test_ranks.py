"""DCP on several ranks: what each writes, how it is cut, and that it comes back however it is cut then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import holdfast
from holdfast.distributed import HoldfastReader, HoldfastWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Net(nn.Module):
    """Rows that do not divide evenly, a scalar, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 5)
        self.register_buffer("seen", torch.tensor(seed + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        return self.down(self.up(x).relu())


def wrapped(kind: str, world_size: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A module as it is trained on many ranks, and its optimizer."""
    module: nn.Module = Net(seed)
    if kind == "fsdp2":
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (world_size,))
        parallelize_module(module, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif kind == "fsdp2 and tp":
        mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(module, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(module, mesh=mesh["dp"])
    elif kind == "ddp":
        module = DistributedDataParallel(module)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train a step on numbers that all ranks share."""
    torch.manual_seed(5)
    module(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def full(value: Any) -> Any:
    """Nested values, their tensors whole."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: full(item) for key, item in value.items()}
    return value


def equal(one: Any, other: Any) -> bool:
    """Whether nested values are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def save(path: Path, kind: str, world_size: int, planner: DefaultSavePlanner | None = None) -> Any:
    """Train a step, save, and return the whole state."""
    module, optimizer = wrapped(kind, world_size)
    step(module, optimizer)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "epoch": 3}
    dcp.save(state, storage_writer=HoldfastWriter(path), planner=planner)
    return full(state)


def load(path: Path, kind: str, world_size: int) -> Any:
    """Load into a training with other values, and return the whole state of the module and the optimizer then."""
    module, optimizer = wrapped(kind, world_size, seed=1)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "epoch": 0}
    dcp.load(state, storage_reader=HoldfastReader(path))
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    model_state, optimizer_state = get_state_dict(module, optimizer)
    return full({"model": model_state, "optimizer": optimizer_state, "epoch": state["epoch"]})


# ------------------------------------------------------------------------------------------------------- resharding

JOURNEYS = {
    "fsdp2, 4 to 2 to 1": [("fsdp2", 4), ("fsdp2", 2), ("plain", 1)],
    "1 to fsdp2, 4": [("plain", 1), ("fsdp2", 4)],
    "ddp, 2 to fsdp2, 4": [("ddp", 2), ("fsdp2", 4)],
    "tp, 2 to fsdp2, 2 to ddp": [("tp", 2), ("fsdp2", 2), ("ddp", 2)],
    "both, 4 to tp, 4 to 1": [("fsdp2 and tp", 4), ("tp", 4), ("plain", 1)],
}


@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS.keys())
def test_a_training_moves_between_numbers_of_processes(
    journey: list[tuple[str, int]], on_ranks: Any, tmp_path: Path
) -> None:
    """Bit for bit, module and optimizer, whatever cuts them."""
    (first, size), *others = journey
    before = on_ranks(size, lambda rank: save(tmp_path / "c", first, size))
    holdfast.open(tmp_path / "c").verify()

    for kind, count in others:
        after = on_ranks(count, lambda rank, kind=kind, count=count: load(tmp_path / "c", kind, count))
        assert all(equal(before[0], found) for found in after)


@pytest.mark.parametrize(("kind", "size"), [("fsdp2", 2), ("ddp", 2), ("plain", 1)])
def test_more_tensors_than_a_file_may_hold(
    kind: str, size: int, on_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank writes as many files as it takes."""
    monkeypatch.setattr("holdfast.state.plan.MAX_TENSORS_A_FILE", 3)
    [before, *_] = on_ranks(size, lambda rank: save(tmp_path / "c", kind, size))
    checkpoint = holdfast.open(tmp_path / "c")
    checkpoint.verify()
    data = [name for name in checkpoint.files if name.endswith(".safetensors")]
    assert len(data) > 2 * size
    assert max(len(load_file(tmp_path / "c" / name)) for name in data) <= 3
    [after] = on_ranks(1, lambda rank: load(tmp_path / "c", "plain", 1))
    assert equal(after, before)


def test_the_training_goes_on_in_one_process(on_ranks: Any, tmp_path: Path) -> None:
    """Without DCP: what was saved in pieces is loaded and restored like any checkpoint."""
    [before, _] = on_ranks(2, lambda rank: save(tmp_path / "c", "fsdp2", 2))
    module = Net(1)
    holdfast.restore(tmp_path / "c", {"model": module})
    loaded = holdfast.load(tmp_path / "c")

    assert equal(dict(module.state_dict()), before["model"])
    assert equal(loaded, before)


def test_it_is_what_one_process_writes(on_ranks: Any, tmp_path: Path) -> None:
    """A checkpoint of four ranks and one of a single process say the same of the same training."""
    on_ranks(4, lambda rank: save(tmp_path / "four", "ddp", 4))
    on_ranks(1, lambda rank: save(tmp_path / "one", "ddp", 1))
    four, one = holdfast.open(tmp_path / "four"), holdfast.open(tmp_path / "one")

    assert four.tensors == one.tensors
    assert four.manifest.state == one.manifest.state
    assert all((four.read(name) == one.read(name)).all() for name in one.tensors)
    assert four.environment["world_size"] == 4


@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_a_run_of_one_process_is_taken_up_by_many(kind: str, on_ranks: Any, tmp_path: Path) -> None:
    """From what holdfast.save wrote, by torch's names."""
    module, optimizer = wrapped("plain", 1)
    step(module, optimizer)
    holdfast.save(tmp_path / "c", {"model": module, "optimizer": optimizer, "epoch": 3})
    state = {
        "model": get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, optimizer),
        "epoch": 3,
    }
    after = on_ranks(2, lambda rank: load(tmp_path / "c", kind, 2))

    assert all(equal(full(state), found) for found in after)


# ------------------------------------------------------------------------------------------------- who writes what


def files_of(path: Path, entry: str) -> list[str]:
    """The names of the files of an entry."""
    return sorted(file.name for file in path.iterdir() if file.name.startswith(entry))


def test_every_rank_writes_its_own_files(on_ranks: Any, tmp_path: Path) -> None:
    """Numbered by rank; what is cut has no index that other tools could be misled by."""
    on_ranks(2, lambda rank: save(tmp_path / "c", "fsdp2", 2))

    assert files_of(tmp_path / "c", "model") == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_whole_tensors_in_several_files_have_an_index(on_ranks: Any, tmp_path: Path) -> None:
    """As transformers writes it: replicated tensors are spread over the ranks."""
    [before, _] = on_ranks(2, lambda rank: save(tmp_path / "c", "ddp", 2))

    assert files_of(tmp_path / "c", "model") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert {name.removeprefix("model/") for name in holdfast.open(tmp_path / "c").tensors if "model/" in name} == (
        before["model"].keys()
    )


def test_one_rank_may_write_all(on_ranks: Any, tmp_path: Path) -> None:
    """Then an entry is one plain file."""
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    on_ranks(2, lambda rank: save(tmp_path / "c", "ddp", 2, planner))

    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


def test_ranks_with_nothing_to_write_take_part(on_ranks: Any, tmp_path: Path) -> None:
    """A tensor with fewer rows than ranks."""

    def work(rank: int) -> bool:
        mesh = init_device_mesh("cpu", (4,))
        value = torch.arange(6.0).reshape(2, 3)
        dcp.save(
            {"x": {"a": distribute_tensor(value, mesh, [Shard(0)])}}, storage_writer=HoldfastWriter(tmp_path / "c")
        )
        room = distribute_tensor(torch.zeros(2, 3), mesh, [Shard(1)])
        dcp.load({"x": {"a": room}}, storage_reader=HoldfastReader(tmp_path / "c"))
        return torch.equal(room.full_tensor(), value)

    assert on_ranks(4, work) == [True] * 4
    assert len(files_of(tmp_path / "c", "x")) == 2


def test_ranks_may_have_different_values(on_ranks: Any, tmp_path: Path) -> None:
    """Each saves what it alone has, as pipelines do; each finds all of it."""

    def work(rank: int) -> Any:
        own = {
            "model": {f"layer{rank}.w": torch.full((2,), float(rank))},
            f"only{rank}": {"n": (rank, torch.ones(rank))},
        }
        dcp.save(own, storage_writer=HoldfastWriter(tmp_path / "c"))
        other = {"model": {f"layer{1 - rank}.w": torch.zeros(2)}, f"only{1 - rank}": {"n": None}}
        dcp.load(other, storage_reader=HoldfastReader(tmp_path / "c"))
        return other["model"][f"layer{1 - rank}.w"].tolist(), other[f"only{1 - rank}"]["n"][0]

    assert on_ranks(2, work) == [([1.0, 1.0], 1), ([0.0, 0.0], 0)]


def test_a_part_of_the_ranks_may_save(on_ranks: Any, tmp_path: Path) -> None:
    """A process group of their own, whose coordinator is not rank 0; beside it, each rank for itself."""

    def work(rank: int) -> list[Any]:
        group = dist.new_group([1, 2])
        if rank:
            state = {"x": {"a": distribute_tensor(torch.arange(4.0), init_mesh(group), [Shard(0)])}}
            dcp.save(state, storage_writer=HoldfastWriter(tmp_path / "group"), process_group=group)
        dcp.save({"n": rank}, storage_writer=HoldfastWriter(tmp_path / f"own{rank}"), no_dist=True)
        return [holdfast.load(tmp_path / f"own{rank}")["n"]]

    def init_mesh(group: Any) -> Any:
        return dist.DeviceMesh.from_group(group, "cpu")

    assert on_ranks(3, work) == [[0], [1], [2]]
    assert holdfast.load(tmp_path / "group")["x"]["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


# --------------------------------------------------------------------------------------------------- DCP's own ways


def test_plans_are_kept_over_saves(on_ranks: Any, tmp_path: Path) -> None:
    """A planner that keeps its plans: each save has its own path and its own values, and a change is noticed."""

    def work(rank: int) -> list[Any]:
        mesh = init_device_mesh("cpu", (2,))
        for number in range(5):
            state: dict[str, Any] = {
                "x": {"a": distribute_tensor(torch.arange(4.0) + number, mesh, [Shard(0)]), "n": number},
                "y": {"b": torch.full((3,), float(number))},
            }
            if number >= 3:
                state["z"] = {"c": torch.ones(2), "d": distribute_tensor(torch.ones(4), mesh, [Replicate()])}
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(state, storage_writer=HoldfastWriter(tmp_path / f"c{number}"), planner=planner)
        return []

    on_ranks(2, work)
    loaded = [holdfast.load(tmp_path / f"c{number}") for number in range(5)]

    assert [(found["x"]["a"][0].item(), found["x"]["n"], found["y"]["b"][0].item()) for found in loaded] == [
        (number, number, number) for number in range(5)
    ]
    assert ["z" in found for found in loaded] == [False, False, False, True, True]


def test_plans_are_kept_when_one_rank_alone_changes(on_ranks: Any, tmp_path: Path) -> None:
    """The files of those that did not change stay theirs."""

    def work(rank: int) -> None:
        for number in range(3):
            own = {f"{rank}": torch.full((2,), float(number))} if number < 2 or not rank else {"n": torch.ones(3)}
            state = {"x": own if rank == 0 or number else {}, "only": {f"{rank}": 1}}
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(state, storage_writer=HoldfastWriter(tmp_path / f"c{number}"), planner=planner)

    on_ranks(2, work)

    assert [sorted(holdfast.load(tmp_path / f"c{number}")["x"]) for number in range(3)] == [
        ["0"],
        ["0", "1"],
        ["0", "n"],
    ]


def test_plans_that_were_kept_for_other_files_serve(on_ranks: Any, tmp_path: Path) -> None:
    """A planner that keeps its plans does so whoever writes: each rank still writes files of its own."""

    def work(rank: int) -> None:
        state = {"x": {"a": distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])}}
        for writer in (dcp.FileSystemWriter(tmp_path / "other"), HoldfastWriter(tmp_path / "c")):
            dcp.save(state, storage_writer=writer, planner=DefaultSavePlanner(enable_plan_caching=True))

    on_ranks(2, work)

    assert holdfast.load(tmp_path / "c")["x"]["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_optimizer_may_be_flat(on_ranks: Any, tmp_path: Path) -> None:
    """PyTorch's option for optimizers that are cut by pipelines: other names, the same tensors."""

    def work(rank: int) -> bool:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        module, optimizer = wrapped("fsdp2", 2)
        step(module, optimizer)
        state = {"optimizer": get_optimizer_state_dict(module, optimizer, options=options)}
        dcp.save(state, storage_writer=HoldfastWriter(tmp_path / "c"))
        other, its = wrapped("fsdp2", 2, seed=1)
        step(other, its)
        found = {"optimizer": get_optimizer_state_dict(other, its, options=options)}
        dcp.load(found, storage_reader=HoldfastReader(tmp_path / "c"))
        return equal(full(found), full(state))

    assert on_ranks(2, work) == [True, True]
