"""Files of two checkpoints mixed, and whole checkpoints under other names: told apart however much alike they are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import holdfast
from holdfast import KeepLast, Run, classic
from holdfast.cli import app
from holdfast.errors import CheckpointNotFoundError, CorruptCheckpointError, Damage, UsageError

CHUNK_BYTES = 4096

LayoutOf = Callable[[Path], Any]
Rechunk = Callable[[Path, int], None]


def make_state(seed: int) -> dict[str, Any]:
    """Two entries whose files have the same header and size, and nothing else in common."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"embed": (40, 30), "fc.weight": (30, 30), "fc.bias": (30,)}
    return {
        entry: {name: torch.rand(shape, generator=chance) for name, shape in shapes.items()}
        for entry in ("model", "ema")
    }


def nearly(seed: int) -> dict[str, Any]:
    """The same but for one element of the model."""
    state = make_state(seed)
    state["model"]["fc.weight"][15, 15] += 1
    return state


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, rechunk: Rechunk) -> Run:
    """Steps 100, 200, 200 again with one element changed, and 300; several chunks a file."""
    run = Run(tmp_path_factory.mktemp("pristine") / "run")
    for step, state in ((100, make_state(1)), (200, make_state(2)), (200, nearly(2)), (300, make_state(3))):
        rechunk(Path(run.save(state, step=step).path), CHUNK_BYTES)
    return run


@pytest.fixture
def run(pristine: Run, tmp_path: Path) -> Run:
    """A copy of it to damage."""
    return Run(shutil.copytree(pristine.path, tmp_path / "run"))


def at(run: Run, step: int, generation: int = 1) -> Path:
    """The directory of a checkpoint."""
    return Path(run.path, f"step-{step:012d}" + ("" if generation == 1 else f".g{generation}"))


def take(source: Path, target: Path, *files: str) -> None:
    """Put files of one checkpoint in the place of those of another."""
    for file in files:
        shutil.copyfile(source / file, target / file)


def swap(path: Path, one: str, other: str) -> None:
    """Have two files change places."""
    first, second = (path / one).read_bytes(), (path / other).read_bytes()
    (path / one).write_bytes(second)
    (path / other).write_bytes(first)


def differences(intact: Path, mixed: Path, layout: Any) -> tuple[Damage, ...]:
    """What is to be said: every chunk whose bytes are others, and every file that is not listed."""
    added = sorted({file.name for file in mixed.iterdir()} - {file.name for file in intact.iterdir()})
    found = [Damage(name, "is not part of the checkpoint") for name in added]
    for file in sorted(layout.manifest["files"]):
        was, now = (intact / file).read_bytes(), (mixed / file).read_bytes()
        assert len(was) == len(now)  # nothing would be easier to notice
        for chunk, begin in enumerate(range(0, len(was), CHUNK_BYTES)):
            if was[begin : begin + CHUNK_BYTES] != now[begin : begin + CHUNK_BYTES]:
                found.append(layout.damage_of(file, chunk))
    return tuple(found)


# Each makes something else of step 300 of a run.
MIXTURES: dict[str, Callable[[Run, Path], object]] = {
    "two of its files swapped": lambda run, path: swap(path, "model.safetensors", "ema.safetensors"),
    "one file twice": lambda run, path: shutil.copy(path / "model.safetensors", path / "ema.safetensors"),
    "a file of another": lambda run, path: take(at(run, 200), path, "model.safetensors"),
    "all data files of another": lambda run, path: take(at(run, 200), path, "model.safetensors", "ema.safetensors"),
    "a copy under another name": lambda run, path: shutil.copy(path / "ema.safetensors", path / "ema2.safetensors"),
    "another's beside its own": lambda run, path: shutil.copy(
        at(run, 200) / "ema.safetensors", path / "ema-00002-of-00002.safetensors"
    ),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_is_found_and_named(
    pristine: Run, run: Run, mixture: str, layout_of: LayoutOf, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file, chunk and tensor is named; load and restore refuse; the run goes on from the step before."""
    intact, path = at(pristine, 300), at(run, 300)
    checkpoint = holdfast.open(path)
    MIXTURES[mixture](run, path)
    expected = differences(intact, path, layout_of(intact))
    with pytest.raises(CorruptCheckpointError) as caught:
        checkpoint.verify()
    assert caught.value.damage == expected
    for use in (holdfast.load, lambda path: holdfast.restore(path, make_state(0))):
        with pytest.raises(CorruptCheckpointError) as caught:
            use(path)
        assert set(caught.value.damage) <= set(expected)
    live = make_state(0)
    with caplog.at_level(logging.WARNING), holdfast.Checkpointer(run.path, live) as checkpointer:
        assert checkpointer.global_step == 200
    assert live["model"]["fc.weight"].equal(nearly(2)["model"]["fc.weight"])
    named = {item.file for item in expected if item.file in "".join(m for m in caplog.messages if str(path) in m)}
    assert named != set()


def test_a_file_with_one_other_element_is_found(pristine: Run, run: Run, layout_of: LayoutOf) -> None:
    """By the checkpoint's id in its header, and by the chunk in which the element lies."""
    intact, path = at(pristine, 200), at(run, 200)
    take(at(run, 200, 2), path, "model.safetensors")
    expected = differences(intact, path, layout_of(intact))
    assert [(item.chunk, item.tensors) for item in expected] == [(0, ()), (2, ("model/embed", "model/fc.weight"))]
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(path).verify()
    assert caught.value.damage == expected


def test_a_file_with_other_values_and_nothing_else_is_found(
    tmp_path: Path, layout_of: LayoutOf, rechunk: Rechunk
) -> None:
    """Files of frozen weights do not say whose they are; by its values alone one is known to be another's."""
    model = nn.Sequential(nn.Embedding(600, 512).requires_grad_(False), nn.Linear(2, 2))
    first = Path(Run(tmp_path / "one").save({"model": model}, step=1).path)
    with torch.no_grad():
        model[0].weight[300, 100] += 1
    second = Path(Run(tmp_path / "another").save({"model": model}, step=1).path)
    rechunk(second, CHUNK_BYTES)
    layout = layout_of(second)
    (frozen,) = (file for file in layout.manifest["files"] if layout.tensors(file) == ("model/0.weight",))
    take(first, second, frozen)
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(second).verify()
    assert caught.value.damage == (layout.damage_at(frozen, 4096 + 4 * (300 * 512 + 100)),)


def test_a_file_that_is_the_same_is_no_damage(run: Run) -> None:
    """A file may come from a backup or from a hard link: what counts is its bytes."""
    path = at(run, 300)
    (path / "x").write_bytes((path / "model.safetensors").read_bytes())
    (path / "x").replace(path / "model.safetensors")
    holdfast.open(path).verify()


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_in_the_place_of_a_file_is_refused(run: Run, tmp_path: Path, target: str, layout_of: LayoutOf) -> None:
    """Even to the very bytes: what it leads to may change or go, and is not copied with the checkpoint."""
    path = at(run, 300)
    layout = layout_of(path)
    shutil.move(path / "model.safetensors", tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is not a plain file") as caught:
        holdfast.open(path)
    assert [(item.file, item.tensors) for item in caught.value.damage] == [
        ("model.safetensors", layout.tensors("model.safetensors"))
    ]


def test_a_manifest_of_another_save_of_the_step_is_found(pristine: Run, run: Run, layout_of: LayoutOf) -> None:
    """It lists files of the same names and sizes; their bytes are not those that it speaks of."""
    path = at(run, 200)
    take(at(run, 200, 2), path, "manifest.json")
    expected = differences(at(pristine, 200, 2), path, layout_of(at(pristine, 200, 2)))
    with pytest.raises(CorruptCheckpointError) as caught:
        holdfast.open(path).verify()
    assert caught.value.damage == expected
    assert {item.file for item in expected} == {"model.safetensors", "ema.safetensors"}


def test_annotations_of_another_are_named_and_passed_over(run: Run) -> None:
    """They say whose they are; no value, no pin and no metric comes of them."""
    run.pin(100)
    run.add_metrics(run[100], {"loss": 0.5})
    take(at(run, 100), at(run, 300), "annotations.json")
    with pytest.warns(UserWarning, match="annotations.json: belongs to the checkpoint"):
        checkpoint = holdfast.open(at(run, 300))
    assert (checkpoint.pinned, checkpoint.metrics) == (False, {})
    with pytest.raises(CorruptCheckpointError, match=f"annotations.json: belongs to .*{checkpoint.checkpoint_id}"):
        checkpoint.verify()
    with pytest.warns(UserWarning, match="annotations.json: belongs to the checkpoint"):
        loaded = holdfast.load(at(run, 300))
    expected = make_state(3)
    assert all(loaded[entry][name].equal(value) for entry in expected for name, value in expected[entry].items())


# --------------------------------------------------------------------------------- a checkpoint under another's name

MISNAMED = "is that of step 300, in a directory named for step {}"


def misnamed(run: Run, how: str) -> Path:
    """Step 300 under the name of step 400, or its manifest in step 200."""
    if how == "copied":
        return shutil.copytree(at(run, 300), at(run, 400))
    if how == "renamed":
        return at(run, 300).rename(at(run, 400))
    take(at(run, 300), at(run, 200, 2), "manifest.json")
    return at(run, 200, 2)


@pytest.mark.parametrize("how", ["copied", "renamed", "its manifest in another"])
def test_the_name_of_another_step_is_refused(run: Run, how: str) -> None:
    """A run orders by names: what is not of the step that its name says would be taken for newer or older."""
    path = misnamed(run, how)
    step = int(path.name[5:17])
    for use in (holdfast.open, holdfast.load, lambda path: holdfast.restore(path, make_state(0))):
        with pytest.raises(CorruptCheckpointError, match=r"copied or renamed, name it step-000000000300") as caught:
            use(path)
        assert caught.value.damage == (Damage("manifest.json", MISNAMED.format(step)),)
        assert (caught.value.path, caught.value.step) == (str(path), 300)
    (broken,) = run.broken()
    assert (broken.path, str(broken.error)) == (str(path), str(caught.value))
    answer = CliRunner().invoke(app, ["verify", str(path)])
    assert (answer.exit_code, MISNAMED.format(step) in " ".join(answer.output.split())) == (1, True)


def test_a_run_goes_on_past_a_checkpoint_under_another_steps_name(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """It is never the newest, never chosen by its step, never pruned; and the step can still be saved."""
    path = misnamed(run, "copied")
    live = make_state(0)
    with caplog.at_level(logging.WARNING), holdfast.Checkpointer(run.path, live) as checkpointer:
        assert checkpointer.global_step == 300
    assert any(str(path) in message and "left as it is" in message for message in caplog.messages)
    with pytest.raises(CheckpointNotFoundError, match="no intact checkpoint of step 400"):
        run[400]
    assert run.prune(KeepLast(1)).kept == {at(run, 300).name: "last 1"}
    assert path.is_dir()
    assert run.save(live, step=400).name == "step-000000000400.g2"


def test_a_checkpoint_copied_to_another_generation_or_a_name_of_the_users_is_whole(run: Run, tmp_path: Path) -> None:
    """Its manifest says nothing against it: so one brings back an earlier save of a step, or keeps one elsewhere."""
    shutil.copytree(at(run, 200), at(run, 200, 3))
    assert run[200].generation == 3
    assert run[200].checkpoint_id == holdfast.open(at(run, 200)).checkpoint_id
    run[200].verify()
    shutil.copytree(at(run, 300), tmp_path / "best")
    assert holdfast.open(tmp_path / "best").step == 300


def test_saving_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """Before anything is written: it could not be opened."""
    path = tmp_path / "step-000000000007"
    with pytest.raises(UsageError, match=r"is what a run calls a checkpoint of step 7; found step=0\. Give step=7"):
        holdfast.save(path, make_state(0))
    assert list(tmp_path.iterdir()) == []
    assert holdfast.save(path, make_state(0), step=7).step == 7


def test_the_tutorials_functions_save_under_any_steps_name(tmp_path: Path) -> None:
    """They know no step but the one in the name."""
    for number in (7, 8):
        classic.save_rotating_checkpoint({"epoch": 1, "w": torch.ones(1)}, tmp_path / f"step-{number:012d}", 2)
    assert [checkpoint.step for checkpoint in Run(tmp_path)] == [7, 8]
