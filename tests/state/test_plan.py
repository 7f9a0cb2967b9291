"""Plans: which file each tensor goes to, made once for a structure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import UsageError
from holdfast.format import safetensors
from holdfast.state import plan as plans
from holdfast.state.capture import capture
from holdfast.state.plan import Plan, Planner

ID = "0123456789abcdef" * 2


def captured(state: dict[str, Any]) -> dict[str, Any]:
    """What a planner is given."""
    return capture(state, generators=False)


def some() -> dict[str, Any]:
    """A small structure."""
    image = torch.zeros(1, 2, 2, 2)
    return {"m": {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64), "image": image}, "x": 1}


def layouts(plan: Plan) -> dict[str, list[str]]:
    """The names in each file, in order."""
    return {file.name: [tensor.name for tensor in file.layout.tensors] for file in plan.files}


def test_one_file_an_entry() -> None:
    """Wider elements first; an entry without tensors has no file."""
    plan = Planner().plan(captured(some()))
    assert layouts(plan) == {"m.safetensors": ["b", "a", "image"]}
    assert plan.indexes == {}
    assert {name: record.pieces[0].file for name, record in plan.records["m"].items()} == {
        "a": "m.safetensors",
        "b": "m.safetensors",
        "image": "m.safetensors",
    }


def test_groups_get_files_of_their_own() -> None:
    """In the order given, the rest last; with an index where there are several."""
    state = {"m": {name: torch.zeros(1) for name in "abcd"}}
    plan = Planner().plan(captured(state), {"m": [frozenset("c"), frozenset("ad")]})
    assert layouts(plan) == {
        "m-00001-of-00003.safetensors": ["c"],
        "m-00002-of-00003.safetensors": ["a", "d"],
        "m-00003-of-00003.safetensors": ["b"],
    }
    assert [file.still for file in plan.files] == [True, True, False]
    assert list(plan.indexes) == ["m.safetensors.index.json"]


def test_many_tensors_get_several_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A header has room for so many names: the standard sharded layout, those that stay what they are apart."""
    monkeypatch.setattr("holdfast.state.plan.MAX_TENSORS_A_FILE", 2)
    state = {"model": {name: torch.full((2,), float(number)) for number, name in enumerate("abcde")}}
    assert layouts(Planner().plan(captured(state), {"model": [frozenset("abd")]})) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["d"],
        "model-00003-of-00003.safetensors": ["c", "e"],
    }
    holdfast.save(tmp_path / "x", state)
    restored = {"model": {name: torch.zeros(2) for name in "abcde"}}
    holdfast.restore(tmp_path / "x", restored)
    assert [restored["model"][name].tolist() for name in "abcde"] == [[n, n] for n in range(5)]
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: f"model-0000{n // 2 + 1}-of-00003.safetensors" for n, name in enumerate("abcde")
    }


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a" * 8, "b" * 8, "c" * 8], [2, 1]),
        (["ä" * 2, "b" * 2, "c"], [1, 2]),
        (["\n" * 2, "b" * 2, "c"], [1, 2]),
        (["a" * 50, "b"], [1, 1]),
        ([], []),
    ],
    ids=["long", "wide", "escaped", "too long", "none"],
)
def test_long_names_get_several_files(names: list[str], files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many names as fit; those that take more memory than bytes count three times."""
    monkeypatch.setattr(plans, "MAX_NAMES_BYTES", 20)
    assert list(map(len, plans.in_files(names))) == files


def test_as_much_as_a_header_may_have() -> None:
    """A file that is full by either measure has a header that readers take."""
    long = [f"{'x' * 170}{number:06d}" for number in range(plans.MAX_TENSORS_A_FILE)]
    wide = [f"{'ä' * 40}{number:06d}" for number in range(plans.MAX_TENSORS_A_FILE)]
    for names in (long, wide):
        first, *_ = plans.in_files(names)
        layout = safetensors.plan(((name, "F32", (1024, 1024, 1024)) for name in names if name in first), {})
        assert len(layout.prefix) <= safetensors.MAX_HEADER_BYTES


def test_a_group_that_is_the_whole_entry() -> None:
    """Keeps the plain name, and needs no index."""
    plan = Planner().plan(captured({"m": {"a": torch.zeros(1)}}), {"m": [frozenset("a")]})
    assert (layouts(plan), plan.indexes, plan.files[0].still) == ({"m.safetensors": ["a"]}, {}, True)


def test_the_id_of_the_checkpoint() -> None:
    """It stands in the header of what belongs to one checkpoint, and not in what others may link."""
    plan = Planner().plan(captured({"m": {"a": torch.zeros(1), "b": torch.zeros(1)}}), {"m": [frozenset("a")]})
    headers = [file.stamped(ID) for file in plan.files]
    parsed = [safetensors.parse(header.prefix, header.nbytes).metadata for header in headers]
    assert parsed == [{"format": "pt"}, {"format": "pt", "holdfast_checkpoint_id": ID}]
    assert [header.nbytes for header in headers] == [file.layout.nbytes for file in plan.files]


def test_names_that_look_like_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied names are the user's: none of them can take the place of the id or of the format."""
    weight = torch.zeros(1)
    state = {"m": {"a": weight, "holdfast_checkpoint_id": weight, "format": weight, "0" * 32: torch.zeros(1)}}
    (file,) = Planner().plan(captured(state)).files
    header = file.stamped(ID)
    assert safetensors.parse(header.prefix, header.nbytes).metadata == {"format": "pt", "holdfast_checkpoint_id": ID}


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name": lambda state: state["m"].update(c=torch.zeros(1)),
    "a shape": lambda state: state["m"].update(a=torch.zeros(1, 2)),
    "a dtype": lambda state: state["m"].update(a=torch.zeros(2, dtype=torch.int32)),
    "a memory format": lambda state: state["m"].update(
        image=state["m"]["image"].contiguous(memory_format=torch.channels_last)
    ),
    "an order": lambda state: state.update(m=dict(reversed(state["m"].items()))),
    "a tie": lambda state: state["m"].update(c=state["m"]["a"]),
    "an entry": lambda state: state.update(y=torch.zeros(1)),
    "an entry without tensors": lambda state: state.update(y=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_plan_is_made_anew_when_the_structure_changes(change: Callable[[dict[str, Any]], object]) -> None:
    """And equals the one that a fresh planner makes; so it does when the structure changes back."""
    planner = Planner()
    before = planner.plan(captured(some()))
    changed = some()
    change(changed)
    after = planner.plan(captured(changed))
    assert after is not before
    assert after == Planner().plan(captured(changed))
    assert planner.plan(captured(some())) == before


def test_a_plan_is_kept_while_the_structure_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values, in other tensors, are the same plan: nothing is laid out again."""
    made: list[str] = []
    make = plans._make
    monkeypatch.setattr(plans, "_make", lambda *args: (made.append("plan"), make(*args))[1])
    planner = Planner()
    found = [planner.plan(captured({"m": {"a": torch.rand(2)}, "x": x})) for x in (1, 2.5, "text")]
    assert (made, found[1] is found[0], found[2] is found[0]) == (["plan"], True, True)


def test_groups_are_part_of_the_structure() -> None:
    """The same tensors in other groups are another plan."""
    planner = Planner()
    state = captured({"m": {"a": torch.zeros(1), "b": torch.zeros(1)}})
    assert layouts(planner.plan(state)) != layouts(planner.plan(state, {"m": [frozenset("a")]}))


def test_an_entry_cannot_have_the_name_of_a_part() -> None:
    """It could be taken for a file of another entry."""
    with pytest.raises(UsageError, match=r"model-00001-of-00002.*one of several files"):
        captured({"model-00001-of-00002": torch.zeros(1)})
