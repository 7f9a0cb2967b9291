"""A checkpoint of any number of ranks and any way to share a model is restored into every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import TORTURE
from lab.ranks import Launch, Outcome
from lab.ranks_model import WORLD_SIZES, Small
from lab.ranks_training import digest
from safetensors.torch import load_file

import holdfast
from holdfast import Run

EVERY = [(layout, size) for layout, sizes in WORLD_SIZES.items() for size in sizes]
SAMPLE = [
    (("ddp", 2), ("tp", 4)),
    (("fsdp", 4), ("ddp", 2)),
    (("fsdp", 4), ("fsdp", 2)),
    (("fsdp+tp", 4), ("hsdp", 4)),
    (("fsdp+tp", 4), ("alone", 1)),
    (("alone", 1), ("fsdp+tp", 4)),
]
"""Each way to share at least once; all pairs in `make torture`."""
PAIRS = list(itertools.product(EVERY, EVERY)) if TORTURE else SAMPLE


@pytest.fixture(scope="module")
def saved(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """A training that stopped after five steps: where it lies, and what it was when it stopped. Made once each."""
    found: dict[Any, tuple[Path, Outcome]] = {}

    def make(layout: str, world_size: int) -> tuple[Path, Outcome]:
        if (layout, world_size) not in found:
            directory = tmp_path_factory.mktemp("saved")
            outcome = launch("train", directory, world_size, layout=layout, stop=5)
            assert outcome.results
            found[layout, world_size] = directory, outcome
        return found[layout, world_size]

    return make


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda one: f"{one[0]} on {one[1]}".replace("+", " and "))
def test_saved_in_one_layout_and_restored_in_another(
    source: tuple[str, int], target: tuple[str, int], launch: Launch, saved: Callable[..., tuple[Path, Outcome]]
) -> None:
    """Model and optimizer, gathered, are those that were saved, to the bit."""
    directory, at_save = saved(*source)
    per_rank = "error" if source == target else "reassign"

    restored = launch("resume", directory, target[1], layout=target[0], per_rank=per_rank)

    assert [result["resumed"] for result in restored.results] == [5] * target[1]
    assert [result["gathered"] for result in restored.results] == [at_save.results[0]["gathered"]] * target[1]
    if source == target:
        assert [result["own"] for result in restored.results] == [result["own"] for result in at_save.results]


@pytest.mark.parametrize("source", [("ddp", 2), ("fsdp", 4), ("tp", 2), ("fsdp+tp", 4)], ids=str)
def test_one_process_loads_what_many_saved(source: tuple[str, int], saved: Callable[..., tuple[Path, Outcome]]) -> None:
    """Without a process group: ``holdfast.load`` gives whole tensors."""
    directory, at_save = saved(*source)
    newest = Run(directory / "run").latest()
    assert newest is not None

    loaded = holdfast.load(newest.path, only=["model"])

    expected = {
        name.removeprefix("model."): value
        for name, value in at_save.results[0]["gathered"].items()
        if name.startswith("model.")
    }
    assert {name: digest(tensor) for name, tensor in loaded["model"].items()} == expected


def test_a_replicated_model_is_a_plain_file(saved: Callable[..., tuple[Path, Outcome]]) -> None:
    """``model.safetensors`` under parameter names, which any tool loads."""
    directory, at_save = saved("ddp", 2)
    newest = Run(directory / "run").latest()
    assert newest is not None

    found = load_file(Path(newest.path) / "model.safetensors")

    assert set(found) <= set(Small().state_dict())
    gathered = at_save.results[0]["gathered"]
    assert {name: digest(tensor) for name, tensor in found.items()} == {
        name: gathered[f"model.{name}"] for name in found
    }


def test_everybody_writes_its_part(saved: Callable[..., tuple[Path, Outcome]]) -> None:
    """A sharded model lies in as many files as there are ranks, and nothing of it lies there twice."""
    directory, at_save = saved("fsdp", 4)
    newest = Run(directory / "run").latest()
    assert newest is not None
    files = sorted(Path(newest.path).glob("model*.safetensors"))

    stored = sum(tensor.numel() for file in files for tensor in load_file(file).values())

    assert len(files) >= 4
    whole = dict(Small().named_parameters())
    assert stored == sum(parameter.numel() for parameter in whole.values()) + 1  # and the buffer that counts
    assert at_save.statuses == [0] * 4


@pytest.mark.parametrize("target", [("ddp", 2), ("fsdp", 2)], ids=str)
def test_what_all_hold_whole_may_be_read_once(
    target: tuple[str, int], launch: Launch, saved: Callable[..., tuple[Path, Outcome]]
) -> None:
    """Read by one rank and sent to the others, it is what was saved; what is cut, each reads for itself."""
    directory, at_save = saved("ddp", 2)

    restored = launch("resume", directory, target[1], layout=target[0], read_once=True)

    assert [result["gathered"] for result in restored.results] == [at_save.results[0]["gathered"]] * target[1]
    if target == ("ddp", 2):
        assert [result["own"] for result in restored.results] == [result["own"] for result in at_save.results]
