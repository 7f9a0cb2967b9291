"""What a checkpoint says of itself: its manifest and its annotations, in Python's terms. No file is touched here."""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from holdfast.collector import collector_paused
from holdfast.errors import CorruptCheckpointError, Damage, HoldfastError
from holdfast.format import manifest as manifests
from holdfast.format import tree
from holdfast.format.cells import count
from holdfast.format.manifest import Annotations, Head, Manifest
from holdfast.format.names import CONFIG_ENTRY, LOOP_ENTRY, MANIFEST, CheckpointName
from holdfast.format.records import FileRecord, TensorRecord
from holdfast.format.strict_json import shown


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor.

    Attributes:
        dtype: PyTorch's name of the element type, such as ``bfloat16``.
        shape: the global shape.
        nbytes: bytes of the whole tensor.
        alias_of: the tensor it is tied to, as ``entry/name``; None when it is stored itself.
        parts: in how many parts it is stored: one unless several processes held some of it each.
        files: in how many files these lie.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    alias_of: str | None = None
    parts: int = 1
    files: int = 1


class Description:
    """What a checkpoint said of itself when it was opened.

    Args:
        path: its directory.
        head: what its manifest says first.
        annotations: what was learned after the save.
        data: the manifest's bytes, whose long parts are decoded when somebody asks for them.
    """

    def __init__(self, path: str, head: Head, annotations: Annotations, data: bytes) -> None:
        self._path = path
        self.name = os.path.basename(path)
        self._head = head
        self._annotations = annotations
        self._data = data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, step={self.step}, epoch={self.epoch})"

    @property
    def path(self) -> str:
        """The directory of the checkpoint."""
        return self._path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self._head.step

    @property
    def epoch(self) -> int:
        """The epoch in which training continues from here."""
        return self._head.epoch

    @property
    def generation(self) -> int:
        """1, or higher when its run had a checkpoint of the same step before."""
        parsed = CheckpointName.parse(self.name)
        return 1 if parsed is None else parsed.generation

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured of this state, at the save or later."""
        decoded = tree.decode({**self._head.metrics, **self._annotations.metrics}, tree.OpaqueLeaves())
        return dict(decoded)

    @property
    def created_at(self) -> datetime.datetime:
        """When it was saved, in UTC."""
        return datetime.datetime.fromisoformat(self._head.created_at)

    @property
    def reason(self) -> str:
        """Why it was saved, in words."""
        return self._head.reason

    @property
    def checkpoint_id(self) -> str:
        """Its own id, 32 hex digits."""
        return self._head.checkpoint_id

    @property
    def run_id(self) -> str:
        """The id of the run that it belongs to."""
        return self._head.run_id

    @property
    def parent(self) -> str | None:
        """The id of the checkpoint from which the process that saved it had resumed; None when it started anew."""
        return self._head.parent

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and world size at the save."""
        return dict(self._head.environment)

    @property
    def pinned(self) -> bool:
        """Whether it is kept whatever the retention policy says."""
        return self._annotations.pinned

    @property
    def tags(self) -> tuple[str, ...]:
        """Labels given to it."""
        return self._annotations.tags

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """By name, the size and the checksums of each of its data files."""
        return self._head.files

    @property
    def nbytes(self) -> int:
        """Bytes of its data files."""
        return sum(record.bytes for record in self._head.files.values())

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The whole manifest; CorruptCheckpointError when it is not what a manifest has to be."""
        with self._decoding(), collector_paused():
            return manifests.decode(self._data, os.path.join(self.path, MANIFEST), self._head)

    @property
    def annotations(self) -> Annotations:
        """What was learned after the save."""
        return self._annotations

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by ``entry/name``, tied ones included."""
        found = {}
        for entry, records in self.manifest.tensors.items():
            for name, record in records.items():
                found[f"{entry}/{name}"] = self._info(record)
            for alias, name in self.manifest.aliases.get(entry, {}).items():
                found[f"{entry}/{alias}"] = self._info(records[name], f"{entry}/{name}")
        return found

    def _info(self, record: TensorRecord, alias_of: str | None = None) -> TensorInfo:
        parts = files = 1
        if record.layout:
            parts = files = count(record)
        elif len(record.pieces) > 1:
            parts, files = len(record.pieces), len({piece.file for piece in record.pieces})
        return TensorInfo(record.dtype, record.shape, record.nbytes, alias_of, parts, files)

    def state_tree(self) -> dict[str, Any]:
        """The saved state with everything but torch's own values decoded; tensors stand as ``Opaque`` leaves."""
        with self._decoding():
            return {
                entry: tree.decode(node, _ListedLeaves(self.manifest, entry))
                for entry, node in self.manifest.state.items()
                if not entry.startswith("_")
            }

    @property
    def config(self) -> Any:
        """What the user recorded as ``config=``; None when that was nothing."""
        return self._own_entry(CONFIG_ENTRY)

    @property
    def loop(self) -> dict[str, Any]:
        """Where in its epoch the training was: ``steps_in_epoch``, ``accumulated``, and where the run comes from."""
        loop = self._own_entry(LOOP_ENTRY)
        return loop if isinstance(loop, dict) else {}

    def _own_entry(self, entry: str) -> Any:
        with self._decoding():
            return tree.decode(self.manifest.state.get(entry), _ListedLeaves(self.manifest, entry))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except HoldfastError:  # a time zone that is not known here is no damage
            raise
        except ValueError as error:
            raise CorruptCheckpointError.at(self.path, [Damage(MANIFEST, str(error))], self.step) from error


class _ListedLeaves(tree.OpaqueLeaves):
    """Leaves for looking at an entry; a tensor among them is one that the manifest lists."""

    def __init__(self, manifest: Manifest, entry: str) -> None:
        self._known = (manifest.tensors.get(entry, {}), manifest.aliases.get(entry, {}))

    def decode(self, tag: str, body: Any) -> Any:
        """An :class:`Opaque` leaf."""
        if tag in tree.IN_FILES:
            name = body[0] if tag == "$ndarray" and isinstance(body, list) and body else body
            if not isinstance(name, str) or not any(name in names for names in self._known):
                raise ValueError(f"the tree refers to {shown(name)}, which the manifest does not list")
        return super().decode(tag, body)
