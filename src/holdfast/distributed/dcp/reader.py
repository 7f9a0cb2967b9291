"""DCP's StorageReader on format 1."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from holdfast.checkpoint import Checkpoint
from holdfast.checkpoint import open as open_checkpoint
from holdfast.distributed.dcp.catalogue import Catalogue
from holdfast.distributed.dcp.values import in_memory
from holdfast.errors import HoldfastError, UsageError
from holdfast.format import tree
from holdfast.state.cuda import pinned_buffer, synchronize
from holdfast.state.leaves import CodecLeaves
from holdfast.state.tensors import tensor_sink
from holdfast.storage import memory
from holdfast.storage.reading import Read


class HoldfastReader(StorageReader):
    """Lets ``torch.distributed.checkpoint`` load what Holdfast, or DCP with :class:`HoldfastWriter`, saved.

        dcp.load(state_dict, storage_reader=HoldfastReader("checkpoints/1000"))

    Only what the plan asks for is read, each chunk is verified before its bytes are used, and they go straight into the
    tensors. It does not matter how many processes saved it, or how its tensors were cut. Nothing that is on the disk is
    unpickled. Damage and missing checkpoints raise DCP's ``CheckpointException`` on every rank, which holds the error.

    Args:
        path: the directory of one checkpoint. ``checkpoint_id`` of ``dcp.load`` takes its place.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._checkpoint: Checkpoint | None = None
        self._catalogue: Catalogue | None = None
        self._error: HoldfastError | None = None

    @property
    def checkpoint_id(self) -> str:
        """The directory that is read from."""
        return self._path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load, from ``checkpoint_id`` if one is given."""
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._checkpoint = self._catalogue = self._error = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds. Blocks: the manifest is read, and the sizes of the files are compared.

        Raises:
            CheckpointNotFoundError: there is none.
            CorruptCheckpointError: what is there is not whole.
        """
        if self._error is not None and "rank" in kwargs:
            # DCP asks again, for metadata of this rank alone, and would put an AssertionError in the place of ours.
            return Metadata({})
        self._error = None
        try:
            self._checkpoint = open_checkpoint(self._path)
            self._catalogue = Catalogue(self._checkpoint)
            metadata = self._catalogue.metadata
        except HoldfastError as error:
            self._error = error
            raise
        metadata.storage_meta = StorageMeta(checkpoint_id=self._path)
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises what kept the metadata from being read."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """``plan`` as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """``plans`` as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` asks for. Blocks.

        Raises:
            CorruptCheckpointError: the bytes are not those that were written; tensors may hold a mixture now.
            CheckpointNotFoundError: the checkpoint was removed meanwhile.
            UsageError: the planner gives tensors of another shape than it planned.
        """
        tensors = [(item, planner.resolve_tensor(item)) for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        self._fill(tensors)
        for item, tensor in tensors:
            planner.commit_tensor(item, tensor)
        values = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        for item, value in zip(values, self._decoded(values), strict=True):
            planner.load_bytes(item, in_memory(value))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether ``checkpoint_id`` may be a path."""
        return "://" not in os.fspath(checkpoint_id)

    def _opened(self) -> tuple[Checkpoint, Catalogue]:
        if self._checkpoint is None or self._catalogue is None:
            self.read_metadata()
        assert self._checkpoint is not None
        assert self._catalogue is not None
        return self._checkpoint, self._catalogue

    def _fill(self, tensors: list[tuple[ReadItem, torch.Tensor]]) -> None:
        """Read into each tensor the box that its item asks for."""
        checkpoint, catalogue = self._opened()
        wanted: dict[str, list[Read]] = {}
        for item, tensor in tensors:
            if tuple(tensor.shape) != tuple(item.lengths):
                raise UsageError(
                    f"{item.dest_index.fqn}: the plan reads {tuple(item.lengths)}, and the planner gave a tensor of "
                    f"shape {tuple(tensor.shape)}.",
                    key=item.dest_index.fqn,
                )
            key, record = catalogue.tensor(item.storage_index.fqn)
            chunk = item.storage_index.offset or (0,) * len(record.shape)
            offset = tuple(begin + at for begin, at in zip(chunk, item.storage_offsets, strict=True))
            for piece in checkpoint.pieces(key, record, (offset, tuple(tensor.shape))):
                found = tensor_sink(tensor.detach(), record, piece, offset)
                if found is not None:
                    begin, nbytes, sink = found
                    wanted.setdefault(piece.file, []).append(Read(piece.begin + begin, nbytes, sink))
        on_cuda = synchronize(tensor for _, tensor in tensors)
        checkpoint.read_files(wanted, allocate=pinned_buffer if on_cuda else memory.allocate)

    def _decoded(self, items: list[ReadItem]) -> list[Any]:
        """The values that are no tensors, those within them filled."""
        checkpoint, catalogue = self._opened()
        leaves: dict[str, CodecLeaves] = {}
        values = []
        for item in items:
            value = catalogue.values[item.storage_index.fqn]
            known = leaves.setdefault(value.entry, CodecLeaves(checkpoint, value.entry, "cpu"))
            try:
                values.append(tree.decode(value.node, known))
            except HoldfastError:
                raise
            except (ValueError, KeyError) as error:
                raise catalogue.damaged(f"state of {value.entry}: {item.storage_index.fqn}: {error}") from error
        for known in leaves.values():
            known.fill()
        return values
