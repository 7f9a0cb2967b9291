"""One rank of a group that restores checkpoints of one process into every layout, and captures each.

Usage: python layouts_driver.py RANK WORLD_SIZE DIRECTORY

What a check did on this rank is written to ``DIRECTORY/RANK.json``: its name, and "ok" or what went wrong.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # torch's own, of backends that are not here

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import holdfast  # noqa: E402
from holdfast.errors import StateMismatchError, UnsupportedValueError  # noqa: E402
from holdfast.saving import About, write  # noqa: E402
from holdfast.state.capture import CapturedTensor, capture  # noqa: E402
from holdfast.state.forgotten import forgotten  # noqa: E402
from holdfast.state.kinds import estimated_nbytes  # noqa: E402
from holdfast.state.per_rank import fold, per_rank_entries  # noqa: E402
from holdfast.state.sharding import local_box, merged_owners, sharding_of  # noqa: E402
from holdfast.storage.local import LocalStore  # noqa: E402


class Net(nn.Module):
    """Sizes that four ranks share unevenly, or of which some get nothing; one weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 3)
        self.tied = self.down
        self.register_buffer("mean", torch.arange(5.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Three numbers for each input."""
        return self.down(self.norm(self.up(inputs).relu()))  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Some steps on the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


def prepare(directory: Path) -> None:
    """Save what the checks restore, as one process does."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    holdfast.save(directory / "young", {"model": model, "optimizer": optimizer})
    train(model, optimizer)
    holdfast.save(directory / "trained", {"model": model, "optimizer": optimizer})
    model(torch.ones(1, 6)).sum().backward()
    about = About(step=2, epoch=0, metrics={}, reason="test", run_id="0" * 32)
    captured = capture({"model": model, "optimizer": optimizer}, gradients=True)
    write(LocalStore(str(directory)), captured, about, ["accumulating"])
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    holdfast.save(directory / "gradients", {"gradients": grads})
    holdfast.save(directory / "tensor", {"tensor": torch.randn(5, 3)})
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Adafactor([weight])
    weight.square().sum().backward()
    optimizer.step()
    holdfast.save(directory / "adafactor", {"weight": weight, "optimizer": optimizer})


# ------------------------------------------------------------------------------------------------------------- layouts


def mesh_of(*sizes: int) -> DeviceMesh:
    """A mesh of the CPUs of all ranks."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b", "c")[: len(sizes)])


def fsdp() -> nn.Module:
    """FSDP2 over four ranks."""
    model, mesh = Net(), mesh_of(4)
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel() -> nn.Module:
    """Two layers cut over four ranks, the rest whole on each."""
    return parallelize_module(Net(), mesh_of(4), {"up": ColwiseParallel(output_layouts=Replicate()), "down": Rows()})


def fsdp_and_tensor_parallel() -> nn.Module:
    """Both, on a mesh of two by two."""
    mesh = mesh_of(2, 2)
    plan = {"up": ColwiseParallel(output_layouts=Replicate()), "down": Rows()}
    return fully_shard(parallelize_module(Net(), mesh["b"], plan), mesh=mesh["a"])


def hybrid() -> nn.Module:
    """Two replicas, each cut over two ranks."""
    return fully_shard(Net(), mesh=mesh_of(2, 2))


def ddp() -> nn.Module:
    """Whole on each rank."""
    return DistributedDataParallel(Net())


def Rows() -> RowwiseParallel:  # noqa: N802 - stands for the class, with what this model gives to it
    """A layer cut by its inputs, which come whole."""
    return RowwiseParallel(input_layouts=Replicate())


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "fsdp": fsdp,
    "tp": tensor_parallel,
    "fsdp+tp": fsdp_and_tensor_parallel,
    "hsdp": hybrid,
    "ddp": ddp,
}


def live(layout: str, seed: int = 7) -> dict[str, Any]:
    """A model in a layout with its optimizer, both of other values than those that were saved."""
    torch.manual_seed(seed)
    model = LAYOUTS[layout]()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.5)}


# -------------------------------------------------------------------------------------------------------------- checks


def whole(value: Any) -> Any:
    """All of a tensor; a collective."""
    return value.detach().full_tensor() if isinstance(value, DTensor) else value


def assert_equal(live_value: Any, saved: Any, name: str) -> None:
    """Bit for bit."""
    found = whole(live_value)
    assert found.dtype == saved.dtype, f"{name}: {found.dtype}"
    assert torch.equal(found, saved), f"{name}: {found} is not {saved}"


def restores(directory: Path, layout: str, kind: str) -> None:
    """Model and optimizer have what was saved, cut as the layout has it, and go on."""
    saved = holdfast.load(directory / kind)
    state = live(layout)
    if kind == "young":
        train(state["model"], state["optimizer"], 1)  # so that there is state to be removed
    placements = {name: getattr(p, "placements", None) for name, p in state["model"].named_parameters()}
    report = holdfast.restore(directory / kind, state, generators=False)
    assert not report.differs, str(report)
    values = {name.removeprefix("module."): value for name, value in state["model"].state_dict().items()}
    assert set(values) == set(saved["model"])
    for name, value in values.items():
        assert_equal(value, saved["model"][name], name)
    after = {name: getattr(p, "placements", None) for name, p in state["model"].named_parameters()}
    assert after == placements
    check_slots(state, saved["optimizer"])
    assert state["optimizer"].param_groups[0]["lr"] == saved["optimizer"]["param_groups"][0]["lr"]
    train(state["model"], state["optimizer"], 1)


def check_slots(state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Each state tensor is what was saved, and cut as its parameter is."""
    optimizer = state["optimizer"]
    for name, parameter in state["model"].named_parameters():
        slots = saved["state"].get("model." + name.removeprefix("module."), {})
        assert set(optimizer.state.get(parameter, {})) == set(slots), name
        for slot, value in slots.items():
            mine = optimizer.state[parameter][slot]
            if slot == "step":
                assert not isinstance(mine, DTensor)
            else:
                assert isinstance(mine, DTensor) == isinstance(parameter, DTensor), (name, slot)
                assert getattr(mine, "placements", None) == getattr(parameter, "placements", None), (name, slot)
                assert local_box(mine)[0].shape == local_box(parameter)[0].shape
            assert_equal(mine, value, f"{name}.{slot}")


def captures(directory: Path, layout: str) -> None:
    """What the ranks hold makes up each tensor, each element with its value; all say the same of who holds what."""
    state = live(layout)
    train(state["model"], state["optimizer"])
    expected = {
        "model": {n.removeprefix("module."): whole(v) for n, v in state["model"].state_dict().items()},
    }
    captured = capture(state, generators=False)
    for entry, content in captured.items():
        everywhere: list[Any] = [None] * dist.get_world_size()
        mine = {name: part(tensor) for name, tensor in content.tensors.items()}
        dist.all_gather_object(everywhere, (mine, content.aliases, content.tree))
        assert all(aliases == content.aliases and node == content.tree for _, aliases, node in everywhere)
        assert all(list(parts) == list(mine) for parts, _, _ in everywhere)
        for name, tensor in content.tensors.items():
            parts = [parts[name] for parts, _, _ in everywhere]
            made = painted(tensor, parts)
            if entry == "model":
                np.testing.assert_array_equal(made, expected["model"][name].numpy())
    assert captured["model"].aliases == {"tied.weight": "down.weight", "tied.bias": "down.bias"}


def part(tensor: CapturedTensor) -> Any:
    """What this rank holds, and how it says that all is cut."""
    assert isinstance(tensor.value, torch.Tensor)
    return tensor.shape, tensor.dtype, tensor.memory_format, tensor.sharding, tensor.value.detach().numpy()


def painted(tensor: CapturedTensor, parts: list[Any]) -> np.ndarray[Any, Any]:
    """The whole, of what each rank holds; every element is painted, and replicas agree."""
    assert all(found[:3] == parts[0][:3] for found in parts)
    made = np.full(tensor.shape, np.nan, np.float32)
    if tensor.sharding is None:
        for found in parts:
            np.testing.assert_array_equal(found[4], parts[0][4])
        return np.asarray(parts[0][4])
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, found in enumerate(parts):
        box = found[3].box(rank)
        assert box is not None
        offset, shape = box
        assert found[4].shape == shape
        if 0 not in shape:
            holders.setdefault(offset, []).append(rank)
        room = made[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]
        fresh = np.isnan(room)
        assert fresh.all() or np.array_equal(room, found[4]), "two ranks hold different values of one element"
        room[...] = found[4]
    assert not np.isnan(made).any(), "an element that no rank holds"
    shardings = [found[3] for found in parts]
    if tensor.sharding.cells is not None:
        assert [list(ranks) for ranks in merged_owners(shardings)] == [holders[offset] for offset in sorted(holders)]
    return made


def after_a_forward(directory: Path) -> None:
    """Parameters that FSDP2 has whole since a forward are saved and restored as those that the optimizer holds."""
    state = live("fsdp")
    with torch.no_grad():
        state["model"](torch.ones(1, 6))
    assert not isinstance(state["model"].down.weight, DTensor), "this says nothing: nothing is whole"
    assert forgotten(state) == []
    captured = capture(state, generators=False)
    assert captured["model"].tensors["down.weight"].sharding is not None
    with torch.no_grad():
        state["model"](torch.ones(1, 6))
    holdfast.restore(directory / "trained", state, generators=False)
    check_slots(state, holdfast.load(directory / "trained")["optimizer"])


def local_sizes(directory: Path) -> None:
    """The estimate of a state counts what this rank holds."""
    mesh = mesh_of(4)
    tensor = distribute_tensor(torch.zeros(4, 1024, 1024), mesh, [Shard(0)])
    assert 2**22 <= estimated_nbytes({"tensor": tensor}) < 2**22 + 2**20


def another_shape(directory: Path) -> None:
    """A global shape that differs is refused by its name, and nothing is touched."""
    tensor = distribute_tensor(torch.zeros(7, 2), mesh_of(4), [Shard(0)])
    with pytest.raises(StateMismatchError) as raised:
        holdfast.restore(directory / "tensor", {"tensor": tensor}, generators=False)
    assert "tensor: live float32 [7, 2], saved float32 [5, 3]" in str(raised.value)
    assert not tensor.to_local().any()


def any_cut(directory: Path) -> None:
    """One tensor, whole in the checkpoint, is restored into every cut of it."""
    saved = holdfast.load(directory / "tensor")["tensor"]
    flat, square = mesh_of(4), mesh_of(2, 2)
    cuts: list[tuple[DeviceMesh, list[Any]]] = [
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (flat, [Replicate()]),
        (square, [Shard(0), Shard(1)]),
        (square, [Shard(1), Shard(0)]),
        (square, [Shard(0), Shard(0)]),
        (square, [Replicate(), Shard(1)]),
        (square, [Shard(0), Replicate()]),
    ]
    for mesh, placements in cuts:
        tensor = distribute_tensor(torch.zeros(5, 3), mesh, placements)
        report = holdfast.restore(directory / "tensor", {"tensor": tensor}, generators=False)
        assert report.restored == 1
        assert_equal(tensor, saved, str(placements))


def unreduced(directory: Path) -> None:
    """A tensor that waits for a reduction is refused, with the way out."""
    tensor = DTensor.from_local(torch.ones(2), mesh_of(4), [Partial()])
    with pytest.raises(UnsupportedValueError) as raised:
        capture({"sum": tensor})
    assert raised.value.key == "sum"
    assert "redistribute" in str(raised.value)


def tied_where_nothing_is(directory: Path) -> None:
    """Tensors are tied on all ranks alike, also on those that hold nothing of them."""
    mesh = mesh_of(4)
    one, other = (distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]) for _ in range(2))
    captured = capture({"s": {"a": one, "b": other, "c": one, "d": other.detach()}}, generators=False)
    assert captured["s"].aliases == {"c": "a", "d": "b"}


def local_beside_whole(directory: Path) -> None:
    """What a rank holds of a tensor is another tensor than the whole, though they lie at one place."""
    whole_tensor = distribute_tensor(torch.zeros(4, 2), mesh_of(4), [Shard(0)])
    captured = capture({"s": {"a": whole_tensor, "b": whole_tensor.to_local()}}, generators=False)
    assert captured["s"].aliases == {}
    assert [tensor.shape for tensor in captured["s"].tensors.values()] == [(4, 2), (1, 2)]


def gradients(directory: Path) -> None:
    """Gradients that are cut over ranks are an entry of all ranks, and come back as they are cut."""
    state = live("fsdp")
    holdfast.restore(directory / "accumulating", state, generators=False)
    saved = holdfast.load(directory / "gradients")["gradients"]
    for name, parameter in state["model"].named_parameters():
        assert parameter.grad.placements == parameter.placements
        assert_equal(parameter.grad, saved[name], name)
    names = per_rank_entries({"model": state["model"]})
    assert names == {"_rng"}
    captured = fold(capture(state, gradients=True), names, dist.get_rank(), dist.get_world_size())
    assert captured["_ranks"].tree == {"world_size": 4, "entries": ["_rng"]}
    assert all(tensor.sharding is not None for tensor in captured["_gradients"].tensors.values())


def plain_gradients(directory: Path) -> None:
    """Gradients of whole parameters, not reduced yet, are each rank's own; those that are cut stay with all."""
    state = live("tp")
    state["model"](torch.ones(1, 6)).sum().backward()
    names = per_rank_entries(state)
    assert names == {"_rng", "_gradients"}
    captured = fold(capture(state, gradients=True), names, dist.get_rank(), dist.get_world_size())
    assert captured["_ranks"].tree == {"world_size": 4, "entries": ["_gradients", "_rng"]}
    prefix = f"0000{dist.get_rank()}/_gradients/"
    own = {name for name in captured["_ranks"].tensors if name.startswith(prefix)}
    assert own == {prefix + f"model.{name}" for name in ("norm.weight", "norm.bias", "down.bias")}
    assert "model.up.weight" in captured["_gradients"].tensors


def gradients_that_wait(directory: Path) -> None:
    """Gradients that FSDP2 has not reduced yet are refused, rather than left out."""
    state = live("fsdp")
    state["model"].set_requires_gradient_sync(False)
    state["model"](torch.ones(1, 6)).sum().backward()
    with pytest.raises(UnsupportedValueError) as raised:
        capture(state, gradients=True)
    assert "set_requires_gradient_sync" in str(raised.value)


def other_world_size(directory: Path) -> None:
    """What one process saved of its generators is not taken by four without a word; seeded anew, ranks differ."""
    state = live("fsdp")
    before = torch.get_rng_state()
    with pytest.raises(StateMismatchError) as raised:
        holdfast.restore(directory / "trained", state)
    assert "generators" in str(raised.value)
    assert "per_rank=" in str(raised.value)
    assert torch.equal(torch.get_rng_state(), before)
    report = holdfast.restore(directory / "trained", state, per_rank="reseed")
    assert any("seeded anew" in note for note in report.notes)
    drawn: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(drawn, torch.rand(1).item())
    assert len(set(drawn)) == dist.get_world_size()


def factored_slots(directory: Path) -> None:
    """State of an optimizer that has another shape than the parameter comes back as the optimizer makes it."""
    torch.manual_seed(1)
    parameter = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh_of(4), [Shard(0)]))
    optimizer = torch.optim.Adafactor([parameter])
    holdfast.restore(directory / "adafactor", {"weight": parameter, "optimizer": optimizer}, generators=False)
    saved = holdfast.load(directory / "adafactor")["optimizer"]["state"]["weight"]
    slots = optimizer.state[parameter]
    assert isinstance(slots["row_var"], DTensor)
    assert not isinstance(slots["step"], DTensor)
    for name, value in saved.items():
        assert_equal(slots[name], value, name)
    parameter.sum().backward()
    optimizer.step()


def part_of_a_mesh(directory: Path) -> None:
    """A tensor of a part of the ranks is held by those, and not by the others."""
    mesh = mesh_of(2, 2)["b"]
    tensor = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
    sharding = sharding_of(tensor)
    assert sharding is not None
    mine = sharding.box(dist.get_rank())
    other = (dist.get_rank() + 2) % 4
    assert mine is not None
    assert sharding.box(other) is None


CHECKS: dict[str, Callable[[Path], None]] = {
    **{
        f"restore {kind} {layout}": lambda directory, layout=layout, kind=kind: restores(directory, layout, kind)  # type: ignore[misc]
        for layout in LAYOUTS
        for kind in ("trained", "young")
    },
    **{f"capture {layout}": lambda directory, layout=layout: captures(directory, layout) for layout in LAYOUTS},  # type: ignore[misc]
    **{
        check.__name__: check
        for check in (
            after_a_forward,
            local_sizes,
            another_shape,
            any_cut,
            unreduced,
            tied_where_nothing_is,
            local_beside_whole,
            gradients,
            plain_gradients,
            gradients_that_wait,
            other_world_size,
            factored_slots,
            part_of_a_mesh,
        )
    },
}


def main(rank: int, world_size: int, directory: Path) -> None:
    """Run every check, one after the other, on all ranks."""
    if rank == 0:
        prepare(directory)
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    outcome = {}
    for name, check in CHECKS.items():
        try:
            check(directory)
            outcome[name] = "ok"
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - whatever it was, the test for this check shows it
            outcome[name] = traceback.format_exc()
        dist.barrier()
    (directory / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
