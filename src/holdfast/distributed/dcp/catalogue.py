"""What a checkpoint holds, in DCP's words: flat names, planner data, and the metadata of each value."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from holdfast.checkpoint import Checkpoint
from holdfast.collector import collector_paused
from holdfast.distributed.dcp.names import (
    DCP_ENTRY,
    Path,
    flattened,
    is_tensor_node,
    node_at,
    root_of,
)
from holdfast.errors import CorruptCheckpointError, Damage, HoldfastError
from holdfast.format import tree
from holdfast.format.names import MANIFEST
from holdfast.format.records import TensorRecord
from holdfast.state.tensors import torch_dtype


class Value(NamedTuple):
    """A value of a state dict: the entry in which it is, its node of the entry's tree, and DCP's path to it."""

    entry: str
    node: Any
    path: Path


class Catalogue:
    """The values of one checkpoint by DCP's flat names.

    One that DCP wrote has the names and the planner data that it was written with. Of others the entries are the first
    level of the state dict, and their optimizers are as ``get_optimizer_state_dict`` has them: by the names of the
    parameters in their module, without that of the module's entry.

    Raises:
        CorruptCheckpointError: the manifest is not what it has to be.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._manifest = checkpoint.manifest
        self._has_paths = True
        self._planner_data: Any = None
        try:
            with collector_paused():
                self.values: dict[str, Value] = dict(self._values())
        except HoldfastError:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise self.damaged(f"the names that DCP knows: {error}") from error

    def tensor(self, fqn: str) -> tuple[str, TensorRecord]:
        """A tensor's ``entry/name``, and what the manifest says of it; CorruptCheckpointError where it says nothing."""
        value = self.values[fqn]
        name = value.node["$tensor"]
        canonical = self._manifest.aliases.get(value.entry, {}).get(name, name)
        record = self._manifest.tensors[value.entry].get(canonical)
        if record is None:
            raise self.damaged(f"state of {value.entry}: refers to {name!r}, which the manifest does not list")
        return f"{value.entry}/{canonical}", record

    def damaged(self, what: str) -> CorruptCheckpointError:
        """The error for a manifest with something wrong in it."""
        return CorruptCheckpointError.at(self._checkpoint.path, [Damage(MANIFEST, what)], self._checkpoint.step)

    @functools.cached_property
    def metadata(self) -> Metadata:
        """What DCP's planners plan with."""
        with collector_paused():
            stored = {fqn: self._stored(fqn, value) for fqn, value in self.values.items()}
        paths = {fqn: value.path for fqn, value in self.values.items()}
        return Metadata(stored, planner_data=paths if self._has_paths else self._planner_data)

    def _stored(self, fqn: str, value: Value) -> STORAGE_TYPES:
        if not is_tensor_node(value.node):
            return BytesStorageMetadata()
        _, record = self.tensor(fqn)
        # Where it is cut into cells, of which there may be thousands, they are no business of a planner.
        boxes = [(piece.offset, piece.shape) for piece in record.pieces] or [((), record.shape)]
        origin = (0,) * len(record.shape)
        return TensorStorageMetadata(
            TensorProperties(torch_dtype(record.dtype)),
            torch.Size(record.shape),
            [ChunkStorageMetadata(torch.Size(offset or origin), torch.Size(shape)) for offset, shape in boxes],
        )

    def _values(self) -> Iterator[tuple[str, Value]]:
        state = self._manifest.state
        own = tree.decode(state.get(DCP_ENTRY), tree.OpaqueLeaves())
        if own is not None and not own["flattened"]:
            self._has_paths = False
            self._planner_data = own["planner_data"]
            for fqn, (entry, *inner) in own["names"].items():
                yield fqn, Value(entry, node_at(state[entry], tuple(inner)), ())
            return
        for entry, node in state.items():
            if not entry.startswith("_"):
                known = node if own is not None else self._as_torch_has_it(entry, node)
                for path, found in flattened(known, root_of(entry, by_dcp=own is not None)):
                    yield ".".join(map(str, path)), Value(entry, found, path)

    def _as_torch_has_it(self, entry: str, node: Any) -> Any:
        """The tree of an optimizer without the name of the module's entry before those of its parameters."""
        if not isinstance(node, Mapping):
            return node
        slots, groups = node.get("state"), node.get("param_groups")
        if not isinstance(slots, Mapping) or not isinstance(groups, list) or not groups:
            return node
        if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
            return node
        names = [name for group in groups for name in group["params"]]
        prefix = self._common_entry(names)
        if prefix is None or entry == prefix:
            return node
        cut = len(prefix) + 1
        return {
            **node,
            "state": {name[cut:] if name.startswith(f"{prefix}.") else name: item for name, item in slots.items()},
            "param_groups": [{**group, "params": [name[cut:] for name in group["params"]]} for group in groups],
        }

    def _common_entry(self, names: list[Any]) -> str | None:
        """The entry in which all parameters are; None where there is not one."""
        if not names or not all(isinstance(name, str) for name in names):
            return None
        return next(
            (
                entry
                for entry in self._manifest.state
                if not entry.startswith("_") and all(name.startswith(f"{entry}.") for name in names)
            ),
            None,
        )
