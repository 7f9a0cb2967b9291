"""The three functions of every tutorial, by name and signature, and safe.

What differs from the tutorial: a checkpoint is a directory (``best_model.pt`` becomes a directory of that name), a
crash at any point leaves the old one or the new one, the random-number generators are saved and restored too, and
nothing is ever unpickled but the tutorial's own files, those with ``weights_only=True``.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch

from holdfast.checkpoint import Checkpoint, open  # noqa: A004 - the public name
from holdfast.errors import CheckpointExistsError, CheckpointNotFoundError, HoldfastError, UsageError
from holdfast.format.names import MANIFEST, CheckpointName
from holdfast.loading import load, restore
from holdfast.part import About
from holdfast.saving import write
from holdfast.state.capture import capture
from holdfast.storage.local import LocalStore

_SERIES = re.compile(r"(.*?)([0-9]+)(\.[A-Za-z]+)?", re.DOTALL)
_PARTS = ("model", "optimizer", "scheduler")
_LOSS_NAMES = ("best_val_loss", "best_loss", "val_loss", "loss")


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    epoch: int,
    best_val_loss: float,
    path: str | os.PathLike[str],
) -> Checkpoint:
    """Save a training to ``path``, in the place of what was saved there before. Blocks until it is durable.

    Args:
        model: the module.
        optimizer: its optimizer, or None.
        scheduler: its scheduler, or None.
        epoch: what :func:`load_checkpoint` will return first.
        best_val_loss: what :func:`load_checkpoint` will return second.
        path: becomes a directory; may end in ``.pt``.

    Raises:
        CheckpointExistsError: there is something at ``path`` that is not a Holdfast checkpoint; it is left as it is.
        UnsupportedValueError: a value cannot be written exactly.
        StorageError: the file system refused; what was saved before is still there.
    """
    given = zip(_PARTS, (model, optimizer, scheduler), strict=True)
    state = {name: value for name, value in given if value is not None}
    return _replace({**state, "progress": {"epoch": epoch, "best_val_loss": best_val_loss}}, path, epoch)


def load_checkpoint(
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    path: str | os.PathLike[str],
    device: str | torch.device,
) -> tuple[Any, Any]:
    """Restore a training from ``path``: model, optimizer, scheduler and random-number generators.

    Reads what :func:`save_checkpoint` and :func:`save_rotating_checkpoint` saved, and the tutorial's own ``.pt`` files.

    Args:
        model: the module, on the device where it shall be.
        optimizer: its optimizer, or None to leave it out.
        scheduler: its scheduler, or None to leave it out.
        path: what was saved.
        device: where a tutorial's file is read to, as ``map_location``; live objects stay on the device they are on.

    Returns:
        ``(epoch, best_val_loss)`` as they were saved; None for what the file does not hold.

    Raises:
        CheckpointNotFoundError: there is nothing at ``path``.
        CorruptCheckpointError: it is damaged.
        StateMismatchError: it does not fit the model; nothing was touched.
        UsageError: it is a file that only unsafe unpickling could read.
    """
    live = {name: value for name, value in zip(_PARTS, (model, optimizer, scheduler), strict=True) if value is not None}
    device = torch.device(device)
    if os.path.isfile(path):
        return _install_dictionaries(_read_tutorial_file(path, device), live, path)
    checkpoint = _open_replaced(path)
    if "progress" in checkpoint.manifest.state:
        progress: dict[str, Any] = {"epoch": None, "best_val_loss": None}
        restore(checkpoint, {**live, "progress": progress})
        return progress["epoch"], progress["best_val_loss"]
    result = _install_dictionaries(load(path, device=device), live, path)
    restore(checkpoint, {})  # the generators
    return result


def save_rotating_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str], keep_last: int = 3) -> Checkpoint:
    """Save the tutorial's dictionary to ``path``, then remove the oldest of its series. Blocks until it is durable.

    Args:
        state: such as ``{"epoch": 10, "model_state_dict": model.state_dict(), ...}``; live objects do as well.
        path: ends in a number, such as ``runs/a/checkpoint_epoch_10``, ``.pt`` or not. The series is what differs from
            it in that number only; the highest numbers are the newest. Nothing else is ever removed.
        keep_last: how many of the series stay, the one just saved among them.

    Raises:
        UsageError: the path has no number, or ``keep_last`` is not positive.
        CheckpointExistsError, UnsupportedValueError, StorageError: as for :func:`save_checkpoint`.
    """
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
        raise UsageError(f"keep_last: expected a whole number from 1, found {keep_last!r}.", key="keep_last")
    absolute = os.path.abspath(os.fspath(path))
    directory, name = os.path.split(absolute)
    series = _SERIES.fullmatch(name)
    if series is None:
        raise UsageError(
            f"{name}: a rotating checkpoint is one of a numbered series; expected a path such as checkpoint_epoch_10.",
            path=absolute,
        )
    epoch = state.get("epoch")
    saved = _replace(state, absolute, epoch if isinstance(epoch, int) else int(series[2]))
    _rotate(LocalStore(directory), name, series[1], series[3], keep_last)
    return saved


def _rotate(store: LocalStore, saved: str, prefix: str, suffix: str | None, keep_last: int) -> None:
    numbered = []
    for name in store.names():
        match = _SERIES.fullmatch(name)
        if match is not None and (match[1], match[3]) == (prefix, suffix) and name != saved:
            numbered.append((int(match[2]), name))
    others = [name for _, name in sorted(numbered) if _is_checkpoint(store, name)]
    for name in others[: len(others) - (keep_last - 1)] if len(others) >= keep_last else []:
        store.remove(name)


def _is_checkpoint(store: LocalStore, name: str) -> bool:
    """Only what can be read counts, and only what counts is removed: the tutorial's files and broken ones stay."""
    try:
        open(os.path.join(store.path, name))
    except HoldfastError:
        return False
    return True


def _replace(state: Mapping[str, Any], path: str | os.PathLike[str], epoch: object) -> Checkpoint:
    absolute = os.path.abspath(os.fspath(path))
    store = LocalStore(os.path.dirname(absolute))
    name = os.path.basename(absolute)
    occupied = os.path.lexists(absolute)
    if occupied and not os.path.lexists(os.path.join(absolute, MANIFEST)):
        raise CheckpointExistsError(
            f"{absolute} is not a Holdfast checkpoint and was left as it is; move it away or save under another name.",
            path=absolute,
        )
    captured = capture(state)
    named = CheckpointName.parse(name)  # what a run calls a step is the checkpoint of that step
    about = About(step=named.step if named else 0, epoch=epoch if isinstance(epoch, int) and epoch >= 0 else 0)
    saved = write(store, captured, about, [name], replace=occupied)
    store.clean()
    return saved


def _open_replaced(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at ``path``, or the one that stepped aside for a replacement which a crash prevented."""
    try:
        return open(path)
    except CheckpointNotFoundError:
        absolute = os.path.abspath(os.fspath(path))
        if not LocalStore(os.path.dirname(absolute)).recover(os.path.basename(absolute)):
            raise
        return open(path)


def _read_tutorial_file(path: str | os.PathLike[str], device: torch.device) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{os.fspath(path)} holds pickled objects beside tensors and plain values, and unpickling them can run any "
            "code. It was not read. Save it again as state dictionaries where you trust it, or convert it there with "
            f"torch.load(path, weights_only=False). The refusal was: {_first_line(error)}",
            path=path,
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UsageError(
            f"{os.fspath(path)} is not a checkpoint: neither a directory of Holdfast nor a file of torch.save "
            f"({_first_line(error)}).",
            path=path,
        ) from error
    if not isinstance(loaded, Mapping):
        raise UsageError(
            f"{os.fspath(path)}: expected the tutorial's dictionary, found {type(loaded).__qualname__}.", path=path
        )
    return loaded


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _install_dictionaries(
    loaded: Mapping[str, Any], live: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[Any, Any]:
    """Give each part of the tutorial's dictionary to its live object, after looking that none is missing."""
    found = {}
    for name in live:
        keys = [key for key in (f"{name}_state_dict", name, f"{name}_state") if key in loaded]
        if not keys:
            raise UsageError(
                f"{os.fspath(path)} holds nothing for the {name}: expected {name}_state_dict or {name}, "
                f"found {', '.join(map(str, loaded))}. Pass None to leave it out.",
                path=path,
                key=name,
            )
        found[name] = loaded[keys[0]]
    for name, values in found.items():
        live[name].load_state_dict(values)
    loss = next((loaded[key] for key in _LOSS_NAMES if key in loaded), None)
    return loaded.get("epoch"), loss
