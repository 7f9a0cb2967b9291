"""DCP in one process, without a process group."""

from __future__ import annotations

import dataclasses
import datetime
import io
import pickle
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import holdfast
from holdfast.distributed import HoldfastReader, HoldfastWriter
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedValueError,
    UsageError,
)
from holdfast.format import manifest as manifests

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(state: dict[str, Any], path: Path, planner: DefaultSavePlanner | None = None, **about: Any) -> None:
    """Save with DCP."""
    dcp.save(state, storage_writer=HoldfastWriter(path, **about), planner=planner)


def load(state: dict[str, Any], path: Path, planner: DefaultLoadPlanner | None = None) -> dict[str, Any]:
    """Load with DCP."""
    dcp.load(state, storage_reader=HoldfastReader(path), planner=planner)
    return state


def loaded_whole(path: Path) -> dict[str, Any]:
    """Everything, without a state dict to load into."""
    state: dict[str, Any] = {}
    reader = HoldfastReader(path)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def cause(caught: pytest.ExceptionInfo[CheckpointException], rank: int = 0) -> BaseException:
    """What a rank raised."""
    return caught.value.failures[rank][0]


def trained(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A module and its optimizer after a step."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1 + seed)
    module(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal bit for bit, in type too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.detach(), other.detach())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.float8_e4m3fn],
    ids=str,
)
def test_tensors_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, of each kind of element, in the shape that they had."""
    values = {"a": torch.arange(24).reshape(2, 3, 4).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    save({"x": values}, tmp_path / "c")
    found = load({"x": {name: torch.zeros_like(value) for name, value in values.items()}}, tmp_path / "c")["x"]

    assert found["a"].dtype == found["scalar"].dtype == dtype
    assert all(torch.equal(bits(found[name]), bits(value)) for name, value in values.items())


def test_tensors_without_elements_come_back(tmp_path: Path) -> None:
    """They have a shape all the same."""
    save({"x": {"none": torch.ones(0, 3)}}, tmp_path / "c")

    assert loaded_whole(tmp_path / "c")["x"]["none"].shape == (0, 3)


@pytest.mark.parametrize("order", ["saved", "loaded"])
def test_tensors_in_another_order_come_back(order: str, tmp_path: Path) -> None:
    """Transposed ones, saved or loaded into."""
    value = torch.arange(12.0).reshape(3, 4)
    saved, room = value, torch.zeros(4, 3).t()
    if order == "saved":
        saved, room = value.t().contiguous().t(), torch.zeros(3, 4)
    save({"x": {"a": saved}}, tmp_path / "c")

    assert torch.equal(load({"x": {"a": room}}, tmp_path / "c")["x"]["a"], value)
    assert not room.is_contiguous() or order == "saved"


VALUES = {
    "step": 7,
    "big": 2**80,
    "lr": 0.1,
    "nan": float("inf"),
    "text": "ü",
    "none": None,
    "tuple": (1, (2.5, "x")),
    "list": [1, "a", None],
    "empty": [],
    "set": {1, 2},
    "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "array": np.arange(5, dtype=np.int16),
    "dtype": torch.bfloat16,
    "within": (torch.arange(3), {"a": torch.ones(2)}),
    "nested": {"a": {"b": [1, 2]}, "groups": [{"lr": 1e-3}, {"lr": 2e-3}]},
}


def test_values_come_back(tmp_path: Path) -> None:
    """Exactly, in value and type, with the tensors that are within them."""
    save(dict(VALUES), tmp_path / "c")
    blank = {**dict.fromkeys(VALUES), "nested": {"a": {"b": 0}, "groups": [{"lr": 0}, {"lr": 0}]}}

    assert same(load(blank, tmp_path / "c"), dict(VALUES))


def test_everything_is_loaded_without_a_state_dict(tmp_path: Path) -> None:
    """As dcp_to_torch_save and other tools of PyTorch do."""
    module, optimizer = trained()
    state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, optimizer), "n": 3}
    save(state, tmp_path / "c")
    found = loaded_whole(tmp_path / "c")

    assert found["n"] == 3
    assert same(found["optimizer"], state["optimizer"])
    assert same(found["model"], dict(state["model"]))


def test_names_and_planner_data_are_those_of_the_save(tmp_path: Path) -> None:
    """What DCP planned with when it saved is what it plans with when it loads."""
    state = {"model": {"w": torch.ones(2)}, "loose": torch.ones(1), "a/b": {"c": (1,)}, "l": [torch.ones(1), {"x": 1}]}
    planner = DefaultSavePlanner()
    save(state, tmp_path / "c", planner)
    metadata = HoldfastReader(tmp_path / "c").read_metadata()

    assert metadata.planner_data == planner.metadata.planner_data
    assert metadata.state_dict_metadata == planner.metadata.state_dict_metadata


def test_a_planner_may_leave_dictionaries_as_they_are(tmp_path: Path) -> None:
    """Without flattening each is a value of its own, whatever is in it."""
    state = {"model": {"w": torch.arange(3.0)}, "n": {"a": [{"b": 1}]}, "t": torch.ones(2)}
    save(state, tmp_path / "c", DefaultSavePlanner(flatten_state_dict=False))
    blank: dict[str, Any] = {"model": None, "n": None, "t": torch.zeros(2)}

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    assert same(load(blank, tmp_path / "c", planner), state)
    assert HoldfastReader(tmp_path / "c").read_metadata().planner_data is None


def test_the_rest_of_a_state_dict_may_be_left(tmp_path: Path) -> None:
    """A partial load reads what it asks for."""
    save({"model": {"a": torch.ones(2), "b": torch.ones(3)}, "n": 1}, tmp_path / "c")

    assert torch.equal(load({"model": {"b": torch.zeros(3)}}, tmp_path / "c")["model"]["b"], torch.ones(3))


class _Renaming(DefaultSavePlanner):
    """PyTorch's example of a planner that renames."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(
            {f"foo_{name}": value for name, value in state_dict.items()}, storage_meta, is_coordinator
        )


class _Half(DefaultSavePlanner):
    """PyTorch's example of a planner that converts."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = super().resolve_data(write_item)
        return found if write_item.type == WriteItemType.BYTE_IO else found.to(torch.float16)


def test_a_planner_may_rename(tmp_path: Path) -> None:
    """The planner's names are the ones that count."""
    save({"a": {"w": torch.ones(1)}, "b": 2}, tmp_path / "c", _Renaming())

    assert same(loaded_whole(tmp_path / "c"), {"foo_a": {"w": torch.ones(1)}, "foo_b": 2})


def test_a_planner_may_convert(tmp_path: Path) -> None:
    """What it gives is what is written."""
    save({"a": {"w": torch.full((2,), 0.1)}}, tmp_path / "c", _Half())

    assert same(loaded_whole(tmp_path / "c"), {"a": {"w": torch.full((2,), 0.1).half()}})


class _Rebuilding(DefaultLoadPlanner):
    """PyTorch's example of a planner that loads into another type and converts at the commit."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.room = super().resolve_tensor(read_item).to(torch.float64)
        return self.room

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor is self.room
        super().resolve_tensor(read_item).copy_(tensor)


def test_a_planner_may_give_tensors_of_its_own(tmp_path: Path) -> None:
    """They are converted into, and committed."""
    save({"a": {"w": torch.arange(3)}}, tmp_path / "c")
    room = {"a": {"w": torch.zeros(3, dtype=torch.int64)}}

    assert torch.equal(load(room, tmp_path / "c", _Rebuilding())["a"]["w"], torch.arange(3))


# -------------------------------------------------------------------------------------- what it is to the rest of us


def test_it_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    """Nested as the state dict was, for whoever knows nothing of DCP; and it is whole."""
    state = {"model": {"fc.weight": torch.arange(4.0)}, "n": {"a": [1, (2,)]}, "epoch": 5}
    save(state, tmp_path / "c", step=30, epoch=2, metrics={"loss": 0.5})
    checkpoint = holdfast.open(tmp_path / "c")
    checkpoint.verify()

    assert (checkpoint.step, checkpoint.epoch, checkpoint.metrics) == (30, 2, {"loss": 0.5})
    assert same(holdfast.load(tmp_path / "c"), state)


def test_files_hold_plain_names(tmp_path: Path) -> None:
    """Any tool loads a module's file as it is."""
    module, _ = trained()
    save({"model": module.state_dict()}, tmp_path / "c")

    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["manifest.json", "model.safetensors"]
    module.load_state_dict(load_file(tmp_path / "c" / "model.safetensors"))


def test_tensors_at_the_top_are_one_entry(tmp_path: Path) -> None:
    """A state dict that is not nested is one file, which restores the module."""
    module, other = trained(0)[0], trained(1)[0]
    save(module.state_dict(), tmp_path / "c")
    holdfast.restore(tmp_path / "c", {"state_dict": other})

    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["manifest.json", "state_dict.safetensors"]
    assert same(dict(module.state_dict()), dict(other.state_dict()))


def test_a_module_is_restored_from_it(tmp_path: Path) -> None:
    """With holdfast.restore, from what DCP saved."""
    module, other = trained(0)[0], trained(1)[0]
    save({"model": get_model_state_dict(module)}, tmp_path / "c")
    holdfast.restore(tmp_path / "c", {"model": other})

    assert same(dict(module.state_dict()), dict(other.state_dict()))


def test_a_training_goes_on_from_it(tmp_path: Path) -> None:
    """Model and optimizer that DCP saved are restored by Holdfast, though DCP calls parameters by shorter names."""

    def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
        for _ in range(3):
            model(torch.randn(5, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained(0)
    whole = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    save(whole, tmp_path / "saved", step=3)
    other, others = trained(1)

    report = holdfast.restore(tmp_path / "saved", {"model": other, "optimizer": others}, generators=False)

    assert (report.missing, report.unexpected, report.fresh) == ((), (), ())
    assert others.param_groups[0]["lr"] == 0.1
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)
        assert {name: slot.tolist() for name, slot in optimizer.state[one].items()} == {
            name: slot.tolist() for name, slot in others.state[another].items()
        }


def test_it_may_be_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    """Under the name that a run gives it, which says the step."""
    save({"x": {"a": torch.ones(1)}}, tmp_path / "run" / "step-000000000040")

    assert [checkpoint.step for checkpoint in holdfast.Run(tmp_path / "run")] == [40]


def test_what_holdfast_saved_is_loaded(tmp_path: Path) -> None:
    """A module and an optimizer by torch's names, though ours have the entry's name before them."""
    module, optimizer = trained(0)
    holdfast.save(tmp_path / "c", {"model": module, "optimizer": optimizer, "n": [1, {"a": 2}]})
    other, its_optimizer = trained(1)
    state = {
        "model": get_model_state_dict(other),
        "optimizer": get_optimizer_state_dict(other, its_optimizer),
        "n": [0, {"a": 0}],
    }
    load(state, tmp_path / "c")
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, its_optimizer, state["optimizer"])

    assert state["n"] == [1, {"a": 2}]
    assert same(dict(module.state_dict()), dict(other.state_dict()))
    assert same(optimizer.state_dict(), its_optimizer.state_dict())


def test_tied_tensors_are_loaded(tmp_path: Path) -> None:
    """Each under its own name, though they are stored once."""
    weight = torch.arange(6.0)
    holdfast.save(tmp_path / "c", {"x": {"a": weight, "b": weight}})
    found = loaded_whole(tmp_path / "c")["x"]

    assert same(found, {"a": weight, "b": weight})


def test_random_number_generators_are_no_state_of_dcp(tmp_path: Path) -> None:
    """What Holdfast saves beside the user's entries has no name there."""
    holdfast.save(tmp_path / "c", {"n": 1})

    assert HoldfastReader(tmp_path / "c").read_metadata().state_dict_metadata == {"n": BytesStorageMetadata()}


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_is_there_is_left(tmp_path: Path) -> None:
    """A checkpoint is never overwritten."""
    save({"x": {"a": torch.ones(1)}}, tmp_path / "c")
    with pytest.raises(CheckpointException) as caught:
        save({"x": {"a": torch.zeros(1)}}, tmp_path / "c")

    assert isinstance(cause(caught), CheckpointExistsError)
    with pytest.raises(CheckpointExistsError):  # before anything is written
        HoldfastWriter(tmp_path / "c").prepare_global_plan([])
    assert torch.equal(holdfast.load(tmp_path / "c")["x"]["a"], torch.ones(1))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


REFUSED = {
    "a function": ({"scheduler": {"lambdas": [print]}}, r"scheduler\.lambdas\[0\]"),
    "in a tuple": ({"a": {"b": (1, print)}}, r"a\.b\[1\]"),
    "at the top": ({"f": print}, "f: "),
    "bytes of a pickle": ({"a": {"b": io.BytesIO(b"x")}}, r"a\.b: "),
    "a live object": ({"a": {"b": torch.nn.Linear(1, 1)}}, r"a\.b: .*top level"),
    "a live object in a tuple": ({"a": {"b": (1, {"c": torch.nn.Linear(1, 1)})}}, r"a\.b\[1\]\.c: .*top level"),
    "a sparse tensor": ({"a": {"b": torch.ones(2).to_sparse()}}, r"a\.b: "),
}


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_written_exactly_fails_at_the_save(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the path to it; and nothing is left."""
    with pytest.raises(CheckpointException) as caught:
        save({"ok": {"w": torch.ones(3)}, **state}, tmp_path / "c")

    assert isinstance(cause(caught), UnsupportedValueError)
    assert re.search(message, str(cause(caught)))
    assert list(tmp_path.iterdir()) == []


class _Mute(dcp.SavePlanner):
    """A planner without a way to look a value up: what DCP's interface asks for, and nothing else."""

    def __init__(self) -> None:
        self._inner = DefaultSavePlanner()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._inner.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> Any:
        return self._inner.create_local_plan()

    def create_global_plan(self, all_plans: Any) -> Any:
        return self._inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: Any) -> Any:
        return self._inner.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._inner.resolve_data(write_item)


def test_a_planner_that_gives_no_values_saves_tensors(tmp_path: Path) -> None:
    """They need nothing but what the interface says."""
    dcp.save({"x": {"a": torch.ones(2)}}, storage_writer=HoldfastWriter(tmp_path / "c"), planner=_Mute())

    assert same(holdfast.load(tmp_path / "c"), {"x": {"a": torch.ones(2)}})


def test_a_planner_that_gives_no_values_saves_no_values(tmp_path: Path) -> None:
    """It gives their pickles only."""
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"n": 1}, storage_writer=HoldfastWriter(tmp_path / "c"), planner=_Mute())

    assert isinstance(cause(caught), UsageError)
    assert "lookup_object" in str(cause(caught))


def test_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """A run orders its checkpoints by their names."""
    with pytest.raises(CheckpointException) as caught:
        save({"n": 1}, tmp_path / "step-000000000040", step=41)

    assert isinstance(cause(caught), UsageError)
    assert list(tmp_path.iterdir()) == []


def test_a_save_without_a_coordinator_is_refused(tmp_path: Path) -> None:
    """It would be a checkpoint a rank."""
    with pytest.raises(UsageError, match="use_collectives"):
        dcp.save({"n": 1}, storage_writer=HoldfastWriter(tmp_path / "c"), use_collectives=False)


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    """Through DCP, our error is the one within."""
    with pytest.raises(CheckpointException) as caught:
        load({"n": 1}, tmp_path / "c")

    assert isinstance(cause(caught), CheckpointNotFoundError)
    with pytest.raises(CheckpointNotFoundError):
        HoldfastReader(tmp_path / "c").read_metadata()


def test_a_reader_gets_over_a_missing_checkpoint(tmp_path: Path) -> None:
    """What went wrong once is not said again."""
    reader = HoldfastReader(tmp_path / "c")
    with pytest.raises(CheckpointNotFoundError):
        reader.read_metadata()
    save({"n": 1}, tmp_path / "c")
    state = {"n": 0}
    dcp.load(state, storage_reader=reader)

    assert state == {"n": 1}


def test_damage_says_where(tmp_path: Path) -> None:
    """A flipped bit names the tensor, and is not loaded."""
    save({"x": {"a": torch.ones(2)}}, tmp_path / "c")
    file = tmp_path / "c" / "x.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException) as caught:
        load({"x": {"a": torch.zeros(2)}}, tmp_path / "c")

    assert isinstance(cause(caught), CorruptCheckpointError)
    assert "x/a" in str(cause(caught))


def test_nothing_on_the_disk_is_a_pickle(tmp_path: Path) -> None:
    """Every file is JSON or safetensors, whatever the values are."""
    save({**VALUES, "model": {"w": torch.ones(3)}}, tmp_path / "c")

    assert {"".join(path.suffixes) for path in (tmp_path / "c").iterdir()} == {".json", ".safetensors"}


# ------------------------------------------------------------------------------------------------------- the writer


def test_a_writer_serves_several_saves(tmp_path: Path) -> None:
    """Each under the id that it is given."""
    writer = HoldfastWriter(tmp_path / "never")
    for number in (1, 2):
        dcp.save({"n": number}, storage_writer=writer, checkpoint_id=tmp_path / f"c{number}")

    assert [holdfast.load(tmp_path / f"c{number}")["n"] for number in (1, 2)] == [1, 2]


def test_a_writer_can_be_handed_to_another_process(tmp_path: Path) -> None:
    """As DCP does to save in one; also after a save."""
    writer = HoldfastWriter(tmp_path / "a", step=3)
    dcp.save({"n": 1}, storage_writer=writer)
    other = pickle.loads(pickle.dumps(writer))
    dcp.save({"n": 2}, storage_writer=other, checkpoint_id=tmp_path / "b")

    assert holdfast.open(tmp_path / "b").step == 3


def test_a_save_that_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    """DCP does not say when another rank failed: the next save, or the end of the writer, removes the rest."""
    writer = HoldfastWriter(tmp_path / "c")
    planner = DefaultSavePlanner()
    for end in ("reset", "set_up_storage_writer"):
        planner.set_up_planner({"x": {"a": torch.ones(1)}}, None, True)
        writer.set_up_storage_writer(True)
        plans, _ = planner.create_global_plan([planner.create_local_plan()])
        [plan] = writer.prepare_global_plan(plans)
        writer.write_data(plan, planner).wait()
        assert len(list(tmp_path.iterdir())) == 1
        getattr(writer, end)(*([True] if end == "set_up_storage_writer" else []))
        assert list(tmp_path.iterdir()) == []
    writer.prepare_global_plan(plans)
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert list(tmp_path.iterdir()) == []


def test_what_a_fork_forgets_is_still_under_way(tmp_path: Path, in_a_fork: Any) -> None:
    """A process that was forked during a save removes nothing of it."""
    holder = [HoldfastWriter(tmp_path / "c")]
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": {"a": torch.ones(1)}}, None, True)
    holder[0].set_up_storage_writer(True)
    plans, _ = planner.create_global_plan([planner.create_local_plan()])
    holder[0].prepare_global_plan(plans)

    assert in_a_fork(holder.clear) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_ids_that_are_no_paths_are_not_ours() -> None:
    """So that DCP looks for somebody else."""
    assert HoldfastWriter.validate_checkpoint_id("a/b")
    assert not HoldfastWriter.validate_checkpoint_id("s3://a/b")
    assert HoldfastReader.validate_checkpoint_id(Path("a"))
    assert not HoldfastReader.validate_checkpoint_id("s3://a/b")


def test_a_plan_that_was_not_carried_out_is_not_committed(tmp_path: Path) -> None:
    """A planner that leaves out a tensor which it listed."""

    class _Forgetful(DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            plan = super().finish_plan(new_plan)
            plan.items.pop()
            return plan

    with pytest.raises(CheckpointException) as caught:
        save({"x": {"a": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "c", _Forgetful())

    assert isinstance(cause(caught), UsageError)
    assert "x.b" in str(cause(caught))
    assert list(tmp_path.iterdir()) == []


class _Cutting(DefaultSavePlanner):
    """A planner that gives less than it planned."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item)[:1]


def test_a_tensor_of_another_shape_than_planned_is_not_saved(tmp_path: Path) -> None:
    """Its bytes would be taken for others."""
    with pytest.raises(CheckpointException) as caught:
        save({"x": {"a": torch.ones(2)}}, tmp_path / "c", _Cutting())

    assert isinstance(cause(caught), UsageError)
    assert "x.a: _Cutting planned a tensor of shape (2,), and gave (1,)" in str(cause(caught))


class _Halves(DefaultSavePlanner):
    """A planner that gives each tensor in two boxes."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            size = item.tensor_data.size[0] // 2
            for at in (0, size):
                chunk = ChunkStorageMetadata(torch.Size([at]), torch.Size([size]))
                data = dataclasses.replace(item.tensor_data, chunk=chunk)
                index = MetadataIndex(item.index.fqn, [at])
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return dataclasses.replace(plan, items=items)

    def resolve_data(self, write_item: WriteItem) -> Any:
        chunk = write_item.tensor_data.chunk
        return self.state_dict[write_item.index.fqn][chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]]


def test_one_rank_may_have_several_boxes_of_a_tensor(tmp_path: Path) -> None:
    """Each under a name of its own in the file."""
    save({"x": {"a": torch.arange(4), "a#2": torch.arange(6)}}, tmp_path / "c", _Halves())

    assert same(loaded_whole(tmp_path / "c"), {"x": {"a": torch.arange(4), "a#2": torch.arange(6)}})


class _Narrow(DefaultLoadPlanner):
    """A planner that gives less room than it planned to fill."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)[:1]


def test_a_tensor_of_another_shape_than_planned_is_not_loaded(tmp_path: Path) -> None:
    """Part of what was asked for would be lost."""
    save({"x": {"a": torch.ones(2)}}, tmp_path / "c")
    with pytest.raises(CheckpointException) as caught:
        load({"x": {"a": torch.zeros(2)}}, tmp_path / "c", _Narrow())

    assert isinstance(cause(caught), UsageError)


WRONG_TREES: dict[str, dict[str, Any]] = {
    "a tensor that is not there": {"x": {"a": {"$tensor": "b"}}},
    "ours is a number": {"_dcp": 5},
    "ours is empty": {"_dcp": {}},
    "names that are no paths": {"_dcp": {"flattened": False, "planner_data": None, "names": {"x": 5}}},
    "names that lead nowhere": {"_dcp": {"flattened": False, "planner_data": None, "names": {"x": ["y"]}}},
    "an unknown tag": {"_dcp": {"$what": 1}},
    "a dictionary of no pairs": {"x": {"$dict": 5}},
    "a dictionary without a factory": {"x": {"$defaultdict": []}},
}


@pytest.mark.parametrize("trees", WRONG_TREES.values(), ids=WRONG_TREES.keys())
def test_a_manifest_that_cannot_be_is_damage(trees: dict[str, Any], tmp_path: Path) -> None:
    """Whoever wrote it: an error of ours, and nothing else."""
    save({"x": {"a": torch.ones(2)}}, tmp_path / "c")
    manifest = holdfast.open(tmp_path / "c").manifest
    changed = msgspec.structs.replace(manifest, state={**manifest.state, **trees})
    (tmp_path / "c" / "manifest.json").write_bytes(manifests.encode(changed))

    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        HoldfastReader(tmp_path / "c").read_metadata()
