"""The three functions of every tutorial."""

from __future__ import annotations

import inspect
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.classic import load_checkpoint, save_checkpoint, save_rotating_checkpoint
from holdfast.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
    StorageError,
    UsageError,
)
from holdfast.format.names import aside_name
from holdfast.storage.local_pending import LocalPending


def parts(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A trained model, its optimizer and scheduler."""
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(3, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def plain(*objects: Any) -> list[Any]:
    """Their states as text."""
    return [str(thing.state_dict()) for thing in objects]


def dictionary(model: nn.Module, optimizer: Any, scheduler: Any, epoch: int) -> dict[str, Any]:
    """What the tutorial saves."""
    return {
        "epoch": epoch,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "best_val_loss": 0.25,
    }


def names(path: Path) -> list[str]:
    """What is in a directory, but what is hidden."""
    return sorted(item.name for item in path.glob("[!.]*"))


def test_signatures() -> None:
    """Exactly the tutorial's."""
    assert [list(inspect.signature(f).parameters) for f in (save_checkpoint, load_checkpoint)] == [
        ["model", "optimizer", "scheduler", "epoch", "best_val_loss", "path"],
        ["model", "optimizer", "scheduler", "path", "device"],
    ]
    rotating = inspect.signature(save_rotating_checkpoint).parameters
    assert [(p.name, p.default) for p in rotating.values()][1:] == [("path", inspect.Parameter.empty), ("keep_last", 3)]
    assert next(iter(rotating)) == "state"


@pytest.mark.parametrize("name", ["best_model.pt", "best_model", "a.b.pth"])
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Model, optimizer, scheduler and the generators that the tutorial forgot."""
    saved = parts()
    expected = plain(*saved)
    save_checkpoint(*saved, 4, 0.5, tmp_path / name)
    draws = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    live = parts(seed=1, steps=0)
    assert load_checkpoint(*live, str(tmp_path / name), "cpu") == (4, 0.5)
    assert plain(*live) == expected
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == draws
    assert (tmp_path / name).is_dir()


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    """None for what there is not, when saving and when loading."""
    model, optimizer, scheduler = parts()
    save_checkpoint(model, None, None, 1, float("inf"), tmp_path / "a.pt")
    assert load_checkpoint(model, None, None, tmp_path / "a.pt", torch.device("cpu")) == (1, float("inf"))
    save_checkpoint(model, optimizer, scheduler, 2, 0.5, tmp_path / "b.pt")
    other = parts(seed=1, steps=0)[0]
    assert load_checkpoint(other, None, None, tmp_path / "b.pt", "cpu") == (2, 0.5)
    assert plain(other) == plain(model)


def test_the_directory_is_made(tmp_path: Path) -> None:
    """As deep as it is."""
    save_checkpoint(*parts(), 1, 0.5, tmp_path / "a" / "b" / "model.pt")
    assert holdfast.open(tmp_path / "a" / "b" / "model.pt").epoch == 1


def test_saving_again_replaces(tmp_path: Path) -> None:
    """The tutorial's best_model.pt: the old one is gone only when the new one is there, and nothing stays behind."""
    path = tmp_path / "best_model.pt"
    for epoch in range(3):
        saved = parts(seed=epoch)
        save_checkpoint(*saved, epoch, 1.0 / (epoch + 1), path)
    assert load_checkpoint(*parts(seed=9), path, "cpu") == (2, 1.0 / 3)
    assert names(tmp_path) == ["best_model.pt"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: what was saved before is whole."""
    save_checkpoint(*parts(), 1, 0.5, tmp_path / "best.pt")

    def fail(*arguments: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(LocalPending, "replace", fail)
    with pytest.raises(StorageError, match="no space"):
        save_checkpoint(*parts(), 2, 0.4, tmp_path / "best.pt")
    assert load_checkpoint(*parts(), tmp_path / "best.pt", "cpu") == (1, 0.5)


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """The tutorial's own file and a stranger's directory stay as they are."""
    (tmp_path / "best.pt").write_bytes(b"mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("mine")
    for name in ("best.pt", "data"):
        with pytest.raises(CheckpointExistsError, match="was left as it is"):
            save_checkpoint(*parts(), 1, 0.5, tmp_path / name)
    assert (tmp_path / "best.pt").read_bytes() == b"mine"
    assert names(tmp_path / "data") == ["file"]


def test_nothing_there(tmp_path: Path) -> None:
    """A clear error."""
    with pytest.raises(CheckpointNotFoundError, match=r"best\.pt"):
        load_checkpoint(*parts(), tmp_path / "best.pt", "cpu")


def test_another_model(tmp_path: Path) -> None:
    """Refused before anything is touched."""
    save_checkpoint(*parts(), 1, 0.5, tmp_path / "best.pt")
    model = nn.Linear(2, 3)
    before = plain(model)
    with pytest.raises(StateMismatchError):
        load_checkpoint(model, None, None, tmp_path / "best.pt", "cpu")
    assert plain(model) == before


def test_damage(tmp_path: Path) -> None:
    """Refused, and named."""
    save_checkpoint(*parts(), 1, 0.5, tmp_path / "best.pt")
    file = tmp_path / "best.pt" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        load_checkpoint(*parts(), tmp_path / "best.pt", "cpu")


# ----------------------------------------------------------------------------------------------------------- rotating


@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_rotation(tmp_path: Path, suffix: str) -> None:
    """The last three, by number: 9 comes before 10."""
    for epoch in (8, 9, 10, 11, 12):
        save_rotating_checkpoint(dictionary(*parts(), epoch), tmp_path / f"checkpoint_epoch_{epoch}{suffix}")
    assert names(tmp_path) == sorted(f"checkpoint_epoch_{epoch}{suffix}" for epoch in (10, 11, 12))
    live = parts(seed=1, steps=0)
    assert load_checkpoint(*live, tmp_path / f"checkpoint_epoch_12{suffix}", "cpu") == (12, 0.25)
    assert plain(*live) == plain(*parts())


def test_rotation_touches_only_its_series(tmp_path: Path) -> None:
    """Other series, files, strangers, and broken checkpoints stay."""
    (tmp_path / "checkpoint_epoch_2").mkdir()
    (tmp_path / "checkpoint_epoch_2" / "weights").write_text("mine")
    torch.save({}, tmp_path / "checkpoint_epoch_3")
    for name in ("other_epoch_1", "checkpoint_epoch_1.pt", "checkpoint_epoch_1_best", "old_checkpoint_epoch_1"):
        holdfast.save(tmp_path / name, {"x": 1})
    holdfast.save(tmp_path / "checkpoint_epoch_0", {"x": torch.ones(3)})
    (tmp_path / "checkpoint_epoch_0" / "x.safetensors").unlink()
    before = names(tmp_path)
    for epoch in (4, 5, 6):
        save_rotating_checkpoint({"epoch": epoch, "x": 1}, tmp_path / f"checkpoint_epoch_{epoch}", keep_last=1)
    assert names(tmp_path) == sorted([*before, "checkpoint_epoch_6"])


def test_the_one_just_saved_stays(tmp_path: Path) -> None:
    """Even where the series has higher numbers, as after going back."""
    for number in (7, 8, 9, 3):
        save_rotating_checkpoint({"epoch": number}, tmp_path / f"c{number}", keep_last=2)
    assert names(tmp_path) == ["c3", "c9"]


def test_rotation_saves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the save fails, nothing is removed."""
    for number in (1, 2):
        save_rotating_checkpoint({"epoch": number}, tmp_path / f"c{number}", keep_last=2)

    def fail(*arguments: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(LocalPending, "commit", fail)
    with pytest.raises(StorageError):
        save_rotating_checkpoint({"epoch": 3}, tmp_path / "c3", keep_last=1)
    assert names(tmp_path) == ["c1", "c2"]


def test_live_objects_rotate_too(tmp_path: Path) -> None:
    """The dictionary may hold the objects themselves."""
    model, optimizer, scheduler = parts()
    state = {"epoch": 5, "model": model, "optimizer": optimizer, "scheduler": scheduler, "loss": 0.75}
    save_rotating_checkpoint(state, tmp_path / "c_5.pt")
    other = parts(seed=1, steps=0)[0]
    assert load_checkpoint(other, None, None, tmp_path / "c_5.pt", "cpu") == (5, 0.75)
    assert plain(other) == plain(model)


@pytest.mark.parametrize(
    ("path", "keep_last", "message"),
    [
        ("checkpoint", 3, "expected a path such as checkpoint_epoch_10"),
        ("epoch_1_final", 3, "expected a path such as"),
        ("c1", 0, "keep_last: expected a whole number from 1, found 0"),
        ("c1", True, "keep_last"),
        ("c1", "3", "keep_last"),
    ],
)
def test_wrong_rotations(tmp_path: Path, path: str, keep_last: Any, message: str) -> None:
    """Refused before anything is written."""
    with pytest.raises(UsageError, match=message):
        save_rotating_checkpoint({"epoch": 1}, tmp_path / path, keep_last)
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- tutorial's files


def test_the_tutorials_own_file(tmp_path: Path) -> None:
    """A file of torch.save is read, safely."""
    saved = parts()
    torch.save(dictionary(*saved, 7), tmp_path / "old.pt")
    live = parts(seed=1, steps=0)
    assert load_checkpoint(*live, tmp_path / "old.pt", "cpu") == (7, 0.25)
    assert plain(*live) == plain(*saved)


def test_a_file_without_a_part(tmp_path: Path) -> None:
    """What it has is listed, and nothing was touched."""
    torch.save({"epoch": 1, "model_state_dict": parts()[0].state_dict()}, tmp_path / "old.pt")
    live = parts(seed=1)
    before = plain(*live)
    with pytest.raises(UsageError, match="holds nothing for the optimizer"):
        load_checkpoint(*live, tmp_path / "old.pt", "cpu")
    assert plain(*live) == before
    assert load_checkpoint(live[0], None, None, tmp_path / "old.pt", "cpu") == (1, None)


RAN = []


class Evil:
    """What a pickle can do."""

    def __reduce__(self) -> Any:
        """Call a function at loading."""
        return RAN.append, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_an_unsafe_file(tmp_path: Path, how: str) -> None:
    """Refused with an explanation; its code does not run."""
    if how == "torch":
        torch.save({"model_state_dict": Evil()}, tmp_path / "old.pt")
    else:
        (tmp_path / "old.pt").write_bytes(pickle.dumps({"model_state_dict": Evil()}))
    with pytest.raises(UsageError, match=r"(can run any\s+code|neither a directory of Holdfast)"):
        load_checkpoint(*parts(), tmp_path / "old.pt", "cpu")
    assert RAN == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04rest"])
def test_another_file(tmp_path: Path, content: bytes) -> None:
    """Refused, and left as it is."""
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(UsageError):
        load_checkpoint(*parts(), tmp_path / "old.pt", "cpu")
    assert (tmp_path / "old.pt").read_bytes() == content


# ------------------------------------------------------------------------------------------------------------- crashes


def test_a_crash_between_old_and_new(tmp_path: Path) -> None:
    """Where a file system cannot exchange two names, the old one steps aside first: loading brings it back."""
    path = tmp_path / "best.pt"
    save_checkpoint(*parts(), 1, 0.5, path)
    path.rename(tmp_path / aside_name("best.pt", "0" * 16))
    assert load_checkpoint(*parts(), path, "cpu") == (1, 0.5)
    assert names(tmp_path) == ["best.pt"]
