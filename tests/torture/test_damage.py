"""Every bit of a small checkpoint flipped, every length of every file: found and named, and no value is ever wrong."""

from __future__ import annotations

import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import CorruptCheckpointError, Damage
from holdfast.format import manifest as manifests
from holdfast.run import Run

CHUNK_BYTES = 4096
FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors"]

Count = Callable[[int, int], int]
LayoutOf = Callable[[Path], Any]
RecordProperty = Callable[[str, object], None]


def make_state(seed: int = 0) -> dict[str, Any]:
    """Model and optimizer after a step; their files have a chunk of header and two of tensors, one across both."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(2, 24)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, rechunk: Callable[[Path, int], None]) -> Path:
    """A checkpoint of some 33 KB."""
    path = tmp_path_factory.mktemp("pristine") / "checkpoint"
    holdfast.save(path, make_state(), step=1)
    rechunk(path, CHUNK_BYTES)
    return path


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(pristine, tmp_path / "copy")


def picked(total: int, wanted: int) -> list[int]:
    """All numbers below ``total``, or ``wanted`` of them."""
    return sorted(random.Random(total).sample(range(total), min(wanted, total)))


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """One bit of a file is wrong within the block."""
    place, mask = bit // 8, 1 << bit % 8
    descriptor = os.open(file, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, place)
        os.pwrite(descriptor, bytes([byte ^ mask]), place)
        yield
        os.pwrite(descriptor, bytes([byte]), place)
    finally:
        os.close(descriptor)


def damage_found(use: Callable[[], object]) -> tuple[Damage, ...]:
    """What ``use`` says is damaged; nothing when it finds nothing."""
    try:
        use()
    except CorruptCheckpointError as error:
        return error.damage
    return ()


def names(damage: tuple[Damage, ...]) -> list[str]:
    """The files that are named."""
    return [item.file for item in damage]


def exact(value: Any) -> Any:
    """A loaded value so that equality compares every bit of it."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.shape, value.detach().numpy().tobytes())
    return value


def test_what_is_there(pristine: Path) -> None:
    """The files below are all of a checkpoint, and it is no smaller than 16 KiB."""
    assert sorted(path.name for path in pristine.iterdir()) == FILES
    assert sum(path.stat().st_size for path in pristine.iterdir()) >= 16 * 1024


# ---------------------------------------------------------------------------------------------------------- every bit


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES[1:])
def test_any_flipped_bit_of_a_data_file_is_found_and_named(
    copy: Path, file: str, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """Nothing but the file, the chunk, and the tensors with bytes in it."""
    layout, checkpoint = layout_of(copy), holdfast.open(copy)
    total = 8 * (copy / file).stat().st_size
    bits = picked(total, count(2000, total))
    wrong = []
    for bit in bits:
        with flipped(copy / file, bit):
            found = damage_found(checkpoint.verify)
        if found != (layout.damage_at(file, bit // 8),):
            wrong.append((bit, found))
    checkpoint.verify()
    assert wrong == []
    record_property("count: bits flipped", len(bits))


@pytest.mark.slow
def test_any_flipped_bit_of_the_manifest_is_found(copy: Path, count: Count, record_property: RecordProperty) -> None:
    """It is refused before anything in it is believed."""
    file = copy / "manifest.json"
    total = 8 * file.stat().st_size
    bits = picked(total, count(14000, total))
    wrong = []
    for bit in bits:
        with flipped(file, bit):
            found = damage_found(lambda: holdfast.open(copy))
        if names(found) != ["manifest.json"]:
            wrong.append((bit, found))
    holdfast.open(copy).verify()
    assert wrong == []
    record_property("count: bits flipped", len(bits))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES[1:])
def test_a_flipped_bit_reaches_no_value(
    pristine: Path, copy: Path, file: str, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """Tensors with bytes in its chunk cannot be had, one by one or with their entry; all others are what they were."""
    layout, checkpoint = layout_of(copy), holdfast.open(copy)
    values = {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}
    entries = {entry: exact(holdfast.load(pristine, only=entry)) for entry in ("model", "optimizer")}
    total = 8 * (copy / file).stat().st_size
    bits = picked(total, count(40, 1500))
    for bit in bits:
        expected = layout.damage_at(file, bit // 8)
        with flipped(copy / file, bit):
            for name, value in values.items():
                if name in expected.tensors:
                    assert damage_found(lambda name=name: checkpoint.read(name)) == (expected,), bit
                else:
                    assert checkpoint.read(name).tobytes() == value, bit
            for entry, loaded in entries.items():
                if any(name.startswith(f"{entry}/") for name in expected.tensors):
                    found = damage_found(lambda entry=entry: holdfast.load(copy, only=entry))
                    assert found == (expected,), bit
                else:
                    assert exact(holdfast.load(copy, only=entry)) == loaded, bit
    record_property("count: bits flipped", len(bits))


# -------------------------------------------------------------------------------------------------------- every length


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_any_truncation_is_found_and_named(
    copy: Path, file: str, count: Count, layout_of: LayoutOf, record_property: RecordProperty
) -> None:
    """By opening the checkpoint, and by one that was opened before."""
    layout, checkpoint = layout_of(copy), holdfast.open(copy)
    target = copy / file
    total = target.stat().st_size
    lengths = picked(total, count(1000, total))
    wrong = []
    for length in reversed(lengths):
        os.truncate(target, length)
        what = f"has {length} bytes, expected {total}"
        for found in (damage_found(lambda: holdfast.open(copy)), damage_found(checkpoint.verify)):
            named = names(found) == [file]
            if not named or (file != FILES[0] and found != (Damage(file, what, tensors=layout.tensors(file)),)):
                wrong.append((length, found))
    assert wrong == []
    record_property("count: truncations", len(lengths))


@pytest.mark.parametrize("more", [b"\0", b" ", b"\n", b"}\n", bytes(CHUNK_BYTES)], ids=repr)
@pytest.mark.parametrize("file", FILES)
def test_any_addition_is_found_and_named(copy: Path, file: str, more: bytes) -> None:
    """A file that is longer than it was, by as little as a blank at its end."""
    checkpoint = holdfast.open(copy)
    with (copy / file).open("ab") as opened:
        opened.write(more)
    assert names(damage_found(lambda: holdfast.open(copy))) == [file]
    assert names(damage_found(checkpoint.verify)) == [file]


# --------------------------------------------------------------------------------------------------------- annotations


@pytest.fixture
def annotated(copy: Path) -> Path:
    """A checkpoint with annotations."""
    annotations = manifests.Annotations(metrics={"val_loss": 0.25}, pinned=True, tags=("good",))
    (copy / "annotations.json").write_bytes(manifests.encode_annotations(annotations))
    return copy


def opened_with_a_warning(path: Path) -> tuple[Any, bool]:
    """The checkpoint, and whether it says that its annotations are damaged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = holdfast.open(path)
    return checkpoint, len(caught) == 1 and "annotations.json" in str(caught[0].message)


@pytest.mark.slow
def test_any_flipped_bit_of_the_annotations_is_found_and_costs_no_state(
    annotated: Path, count: Count, record_property: RecordProperty
) -> None:
    """The file is named by verify; everything else goes on with a warning and without what was annotated."""
    file = annotated / "annotations.json"
    before = holdfast.open(annotated)
    total = 8 * file.stat().st_size
    bits = picked(total, count(200, total))
    for bit in bits:
        with flipped(file, bit):
            checkpoint, warned = opened_with_a_warning(annotated)
            assert (checkpoint.pinned, checkpoint.tags, checkpoint.metrics, warned) == (False, (), {}, True), bit
            assert names(damage_found(before.verify)) == ["annotations.json"], bit
    assert holdfast.open(annotated).metrics == {"val_loss": 0.25}
    record_property("count: bits flipped", len(bits))


def test_any_truncation_of_the_annotations_is_found_and_costs_no_state(
    pristine: Path, annotated: Path, record_property: RecordProperty
) -> None:
    """The values are those that were saved, whatever is left of the file."""
    file = annotated / "annotations.json"
    before, values = holdfast.open(annotated), exact(holdfast.load(pristine))
    total = file.stat().st_size
    for length in reversed(range(total)):
        os.truncate(file, length)
        checkpoint, warned = opened_with_a_warning(annotated)
        assert (checkpoint.pinned, checkpoint.tags, checkpoint.metrics, warned) == (False, (), {}, True), length
        assert names(damage_found(before.verify)) == ["annotations.json"], length
        if length % 16 == 0:
            with pytest.warns(UserWarning, match=r"annotations\.json"):
                assert exact(holdfast.load(annotated)) == values
    record_property("count: truncations", total)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two checkpoints of different values."""
    run = Run(tmp_path_factory.mktemp("run") / "run")
    run.save(make_state(1), step=1)
    run.save(make_state(2), step=2)
    return run


def contents(path: str) -> dict[str, bytes]:
    """The bytes of all files."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def values_of(live: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of live objects, by the names that a checkpoint gives them."""
    states = {f"model.{name}": live["optimizer"].state[value] for name, value in live["model"].named_parameters()}
    return dict(live["model"].state_dict()), states


@contextmanager
def damaged_somewhere(path: str, chance: random.Random) -> Iterator[tuple[str, bool]]:
    """A bit flipped, or a file cut, within the block; gives the file, and whether opening is enough to find it."""
    file = chance.choice(FILES)
    target = Path(path, file)
    data = target.read_bytes()
    if chance.random() < 0.6:
        with flipped(target, chance.randrange(8 * len(data))):
            yield file, file == "manifest.json"
    else:
        os.truncate(target, chance.randrange(len(data)))
        yield file, True
        target.write_bytes(data)


@pytest.mark.slow
def test_a_run_goes_on_from_before_whatever_is_damaged(
    run: Run, count: Count, caplog: pytest.LogCaptureFixture
) -> None:
    """Every value is the older checkpoint's, though some were read from the newest; which is left as it is."""
    older, newest = (checkpoint.path for checkpoint in run)
    loaded = holdfast.load(older)
    expected = exact((loaded["model"], loaded["optimizer"]["state"]))
    chance = random.Random(0)
    for _ in range(count(30, 500)):
        caplog.clear()
        live = make_state(3)
        with damaged_somewhere(newest, chance) as (file, opening_finds_it):
            before = contents(newest)
            with caplog.at_level(logging.WARNING), holdfast.Checkpointer(run.path, live) as checkpointer:
                assert checkpointer.global_step == 1
            assert any(newest in message and file in message for message in caplog.messages)
            assert contents(newest) == before
            latest = run.latest()
            assert latest is not None
            assert latest.step == (1 if opening_finds_it else 2)
        assert exact(values_of(live)) == expected
    with holdfast.Checkpointer(run.path, make_state(3)) as checkpointer:
        assert checkpointer.global_step == 2
