"""Those who are compared: each saves durably, and loads into the tensors of a live state."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import holdfast
from benchmarks.files import sync
from benchmarks.workloads import Tensors, Workload


class Peer(Protocol):
    """A way to save and load. ``path`` may become a file or a directory."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def package(self) -> str:
        """The package whose version matters."""

    def save(self, workload: Workload, path: Path) -> None:
        """Return when everything is durable."""

    def load(self, workload: Workload, path: Path) -> None:
        """Fill the live tensors with what was saved."""


@dataclass(frozen=True)
class Holdfast:
    """This library: objects in, objects out; every byte is verified at loading."""

    name: str = "holdfast"
    package: str = "holdfast"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        holdfast.save(path, workload.objects)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        holdfast.restore(path, workload.objects)


@dataclass(frozen=True)
class TorchSave:
    """``torch.save``, with the fsync that it leaves to others."""

    name: str = "torch.save"
    package: str = "torch"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        torch.save(workload.tensors, path)
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        copy_into(torch.load(path, weights_only=True), workload.tensors)


@dataclass(frozen=True)
class Safetensors:
    """``safetensors.torch.save_file``, with an fsync; loading maps the file."""

    name: str = "safetensors"
    package: str = "safetensors"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from safetensors.torch import save_file

        save_file(workload.tensors, path)
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from safetensors.torch import load_file

        copy_into(load_file(path), workload.tensors)


@dataclass(frozen=True)
class DCP:
    """``torch.distributed.checkpoint`` with its file system writer, which syncs its files itself."""

    threads: int
    package: str = "torch"

    @property
    def name(self) -> str:
        """With the number of threads."""
        return f"DCP, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = FileSystemWriter(path, thread_count=self.threads, sync_files=True)
        with alone():
            save(workload.tensors, storage_writer=writer, no_dist=True)
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with alone():
            load(workload.tensors, storage_reader=FileSystemReader(path), no_dist=True)


@dataclass(frozen=True)
class TorchCheckpointing:
    """``torch_checkpointing``, saving synchronously; it leaves the fsync to others."""

    name: str = "torch_checkpointing"
    package: str = "torch-checkpointing"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        manager = self._manager()
        manager.save(str(path), {"state": workload.tensors})
        manager.close()
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        manager = self._manager()
        loaded = manager.load(str(path), into={"state": workload.tensors})
        if loaded["state"] is not workload.tensors:
            copy_into(loaded["state"], workload.tensors)
        manager.close()

    @staticmethod
    def _manager() -> Any:
        from torch_checkpointing import CheckpointManager

        return CheckpointManager(torch_checkpointing_config(CheckpointManager.Config.with_sync_save()))


@dataclass(frozen=True)
class Torchsnapshot:
    """``torchsnapshot``, which leaves the fsync to others."""

    name: str = "torchsnapshot"
    package: str = "torchsnapshot"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        snapshots = torchsnapshot()
        snapshots.Snapshot.take(path=str(path), app_state={"state": snapshots.StateDict(**workload.tensors)})
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        snapshots = torchsnapshot()
        snapshots.Snapshot(str(path)).restore({"state": snapshots.StateDict(**workload.tensors)})


@dataclass(frozen=True)
class Orbax:
    """Orbax, JAX's checkpoints, with NumPy views of the tensors; it leaves the fsync to others."""

    name: str = "Orbax"
    package: str = "orbax-checkpoint"

    def save(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from orbax import checkpoint as orbax

        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path.resolve(), args=orbax.args.PyTreeSave(arrays(workload.tensors)))
        sync(path)

    def load(self, workload: Workload, path: Path) -> None:
        """See :class:`Peer`."""
        from orbax import checkpoint as orbax

        wanted = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in workload.tensors}
        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
            loaded = checkpointer.restore(path.resolve(), args=orbax.args.PyTreeRestore(restore_args=wanted))
        copy_into({name: torch.from_numpy(array) for name, array in loaded.items()}, workload.tensors)


PEERS: tuple[Peer, ...] = (
    Holdfast(),
    TorchSave(),
    Safetensors(),
    DCP(1),
    DCP(2),
    TorchCheckpointing(),
    Torchsnapshot(),
    Orbax(),
)


@contextmanager
def alone() -> Iterator[None]:
    """Without DCP's warning that there is no process group: one process is what is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def torch_checkpointing_config(config: Any) -> Any:
    """A configuration of torch_checkpointing that works on ext4 and XFS.

    They refuse its unaligned writes under O_DIRECT, which is its default.
    """
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return config


def torchsnapshot() -> Any:
    """The module; it was written for an older PyTorch, whose later warnings about that are not news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torchsnapshot")


def arrays(tensors: Tensors) -> dict[str, Any]:
    """NumPy views, which share memory with the tensors."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    if package == "holdfast":
        return holdfast.__version__  # also from a source tree that is not installed
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@torch.no_grad()
def copy_into(loaded: Tensors, live: Tensors) -> None:
    """Copy loaded tensors into live ones."""
    for name, tensor in live.items():
        tensor.copy_(loaded[name])
