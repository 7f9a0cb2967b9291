"""One checkpoint written: captured state to files, files to a commit."""

from __future__ import annotations

import datetime
import math
import os
import platform
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast._version import __version__
from holdfast.checkpoint import Checkpoint, open_checkpoint
from holdfast.errors import CheckpointExistsError, UnsupportedValueError, UsageError
from holdfast.format import manifest as manifests
from holdfast.format import safetensors, tree
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import FileRecord, Manifest, Piece, TensorRecord
from holdfast.format.names import check_step, data_file_name
from holdfast.state.capture import CapturedEntry, capture
from holdfast.storage.local import LocalStore
from holdfast.storage.store import PendingCheckpoint, Store


@dataclass(frozen=True, slots=True)
class About:
    """What a checkpoint says of itself beside the state. Raises UsageError for what cannot be said."""

    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reason: str = "save"
    run_id: str = field(default_factory=lambda: secrets.token_hex(16))
    parent: str | None = None

    def __post_init__(self) -> None:
        check_step(self.step)
        check_step(self.epoch)


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int = 0,
    epoch: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> Checkpoint:
    """Save ``state`` as one durable checkpoint at exactly ``path``. Blocks until it is committed.

    Tensors are read where they are, a few megabytes at a time: do not change them in another thread meanwhile. The
    random-number generators of Python, numpy and torch are saved without being named.

    Args:
        path: the directory to make; it must not exist.
        state: names to modules, optimizers, schedulers, tensors, arrays, generators, plain containers of such, or
            anything with ``state_dict`` and ``load_state_dict``. Each name becomes the name of a file.
        step: optimizer steps done.
        epoch: the epoch in which training continues from here.
        metrics: numbers measured of this state.

    Returns:
        The checkpoint, reopened under its name.

    Raises:
        CheckpointExistsError: there is something at ``path``.
        UnsupportedValueError: a value cannot be written exactly; nothing was written.
        UsageError: a name, step, epoch or metric is out of its range.
        StorageError, DiskFullError: the file system refused; nothing is left at ``path``.
    """
    absolute = os.path.abspath(os.fspath(path))
    if os.path.lexists(absolute):
        raise CheckpointExistsError(
            f"{absolute} exists already and was left as it is; save to another path, or keep a series with Run.",
            path=absolute,
        )
    about = About(step, epoch, encode_metrics(metrics))
    return write(LocalStore(os.path.dirname(absolute)), capture(state), about, [os.path.basename(absolute)])


def encode_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """``metrics`` as the manifest holds them: numbers and text; tensors and arrays of one element give theirs.

    Raises:
        UsageError: a name is not text, or a value is no number.
    """
    encoded = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or name.startswith("$"):
            raise UsageError(
                f"metrics: expected names as text that do not start with '$', found {name!r}.", key=str(name)
            )
        plain = value
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            plain = value.item()
        if not isinstance(plain, (bool, int, float, str)):
            raise UsageError(
                f"metrics[{name!r}]: expected a number or text, found {type(value).__qualname__}.", key=name
            )
        encoded[name] = tree.encode(plain, f"metrics.{name}", tree.OpaqueLeaves())
    return encoded


def write(
    store: Store,
    captured: Mapping[str, CapturedEntry],
    about: About,
    names: Iterable[str],
    *,
    replace: bool = False,
) -> Checkpoint:
    """Write and commit a captured state. Blocks.

    Args:
        store: where to.
        captured: what :func:`holdfast.state.capture.capture` returned.
        about: what the checkpoint says of itself; its metrics encoded.
        names: names to try, in order, until one is free.
        replace: take the first name even where it is taken, atomically.
    """
    pending = store.create(about.step)
    try:
        manifest = manifests.encode(_write_files(pending, captured, about))
        name = _commit(pending, manifest, names, replace)
    except BaseException:
        pending.abort()
        raise
    return open_checkpoint(store, name)


def _commit(pending: PendingCheckpoint, manifest: bytes, names: Iterable[str], replace: bool) -> str:
    taken: CheckpointExistsError | None = None
    for name in names:
        try:
            publish: Callable[[str, bytes], None] = pending.replace if replace else pending.commit
            publish(name, manifest)
        except CheckpointExistsError as error:
            taken = error
        else:
            return name
    assert taken is not None
    raise taken


def _write_files(pending: PendingCheckpoint, captured: Mapping[str, CapturedEntry], about: About) -> Manifest:
    checkpoint_id = secrets.token_hex(16)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, dict[str, TensorRecord]] = {}
    for entry, content in captured.items():
        layout = _layout(content, checkpoint_id)
        tensors[entry] = _records(entry, content, layout)
        if content.tensors:
            name = data_file_name(entry)
            files[name] = pending.write_file(name, _file_blocks(content, layout), layout.nbytes)
    return Manifest(
        format=manifests.FORMAT,
        checkpoint_id=checkpoint_id,
        run_id=about.run_id,
        parent=about.parent,
        step=about.step,
        epoch=about.epoch,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        reason=about.reason,
        metrics=dict(about.metrics),
        state={entry: content.tree for entry, content in captured.items()},
        tensors=tensors,
        aliases={entry: content.aliases for entry, content in captured.items() if content.aliases},
        files=files,
        environment=_environment(),
    )


def _layout(content: CapturedEntry, checkpoint_id: str) -> safetensors.Layout:
    stored = []
    for name, tensor in content.tensors.items():
        dtype = DTYPES[tensor.dtype]
        stored.append((name, dtype.code, dtype.stored_shape(tensor.shape)))
    # Tied names go into the metadata as safetensors.torch.save_model writes them, so that load_model ties them again.
    return safetensors.plan(stored, {**content.aliases, "format": "pt", "holdfast_checkpoint_id": checkpoint_id})


def _records(entry: str, content: CapturedEntry, layout: safetensors.Layout) -> dict[str, TensorRecord]:
    begins = {tensor.name: tensor.begin for tensor in layout.tensors}
    return {
        name: TensorRecord(
            dtype=tensor.dtype,
            shape=tensor.shape,
            pieces=(Piece(file=data_file_name(entry), name=name, begin=begins[name], shape=tensor.shape),),
            memory_format=tensor.memory_format,
            device=tensor.device,
        )
        for name, tensor in content.tensors.items()
    }


def _file_blocks(content: CapturedEntry, layout: safetensors.Layout) -> Iterable[memoryview | bytes]:
    yield layout.prefix
    for stored in layout.tensors:
        tensor = content.tensors[stored.name]
        written = 0
        for block in tensor.blocks():
            written += len(block)
            yield block
        if written != stored.nbytes:
            raise UnsupportedValueError(
                f"{stored.name}: {stored.nbytes} bytes were planned, {written} came; it was resized during the save.",
                key=stored.name,
            )


def _environment() -> dict[str, Any]:
    """Versions, and nothing that could tell on the user: no arguments, variables, paths or host names."""
    return {
        "holdfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "world_size": 1,
    }
