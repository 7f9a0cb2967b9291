"""Checkpoints as several processes leave them, made by hand: of arrays, and of how each is cut.

Nothing of what saves is used, so that what reads can be tested without it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from holdfast.format import manifest as manifests
from holdfast.format import safetensors
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Manifest
from holdfast.format.names import RANKS_ENTRY, data_file_name, shard_name
from holdfast.format.records import FileRecord, Piece, TensorRecord

ID = "0123456789abcdef" * 2
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cells:
    """A tensor cut evenly.

    Attributes:
        cell: the shape of a cell.
        order: which of the processes holds each cell; one after the other by default.
    """

    cell: tuple[int, ...]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """A tensor cut anyhow: offset and shape of each box, one for each process."""

    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass
class _Files:
    """What goes into each file of an entry: the whole tensors, then for each process what it holds."""

    entry: str
    whole: dict[str, Array] = field(default_factory=dict)
    held: dict[int, dict[str, Array]] = field(default_factory=dict)

    def names(self) -> tuple[str | None, dict[int, str]]:
        """The file of the whole tensors, if there are some, and that of each process."""
        count = bool(self.whole or not self.held) + len(self.held)
        names = (
            [data_file_name(self.entry)] if count == 1 else [shard_name(self.entry, n + 1, count) for n in range(count)]
        )
        whole = names.pop(0) if self.whole or not self.held else None
        return whole, dict(zip(sorted(self.held), names, strict=True))


def write_sharded(
    path: Path,
    entries: Mapping[str, Mapping[str, Array]],
    cuts: Mapping[str, Cells | Pieces] | None = None,
    *,
    ranks: Sequence[Mapping[str, Any]] = (),
    aliases: Mapping[str, Mapping[str, str]] | None = None,
    dtypes: Mapping[str, str] | None = None,
    step: int = 1,
    chunk_bytes: int = 4096,
) -> Path:
    """Write a checkpoint, and return its path.

    Args:
        path: where to; it must not exist.
        entries: arrays by entry and name. In the state they are tensors.
        cuts: by ``entry/name``, how they are cut; others are whole, in the first file of their entry.
        ranks: of each process, its own entries: ``{"_rng": ...}``, as JSON can say them.
        aliases: by entry, names of tied tensors, and the name under which each is stored.
        dtypes: by ``entry/name``, the element type where it is not that of the array, which has the same bytes.
        step: of the checkpoint.
        chunk_bytes: of its files.
    """
    cuts, aliases, dtypes = cuts or {}, aliases or {}, dtypes or {}
    path.mkdir(parents=True)
    tensors: dict[str, dict[str, TensorRecord]] = {}
    layouts: dict[str, tuple[str, ...]] = {}
    records: dict[str, FileRecord] = {}
    state: dict[str, Any] = {}
    for entry, arrays in entries.items():
        files = _sorted_out(entry, arrays, cuts)
        begins = _write(path, files, dtypes, aliases.get(entry, {}), chunk_bytes, records)
        tensors[entry] = {}
        for name, array in arrays.items():
            dtype = dtypes.get(f"{entry}/{name}", array.dtype.name)
            cut = cuts.get(f"{entry}/{name}")
            tensors[entry][name] = _record(name, dtype, array.shape, cut, entry, files, begins, layouts)
        state[entry] = {name: {"$tensor": name} for name in (*arrays, *aliases.get(entry, {}))}
    if ranks:
        own = {f"{rank:05d}": np.frombuffer(json.dumps(values).encode(), np.uint8) for rank, values in enumerate(ranks)}
        tensors[RANKS_ENTRY] = {}
        for rank, (name, array) in enumerate(own.items()):
            file = shard_name(RANKS_ENTRY, rank + 1, len(own))
            begin = _write_file(path, file, {name: array}, RANKS_ENTRY, {}, {}, chunk_bytes, records)[name]
            tensors[RANKS_ENTRY][name] = TensorRecord("uint8", array.shape, (Piece(file, name, begin, array.shape),))
        state[RANKS_ENTRY] = {"world_size": len(ranks), "entries": sorted({name for one in ranks for name in one})}
    manifest = Manifest(
        format=manifests.FORMAT,
        checkpoint_id=ID,
        run_id=ID,
        parent=None,
        step=step,
        epoch=0,
        created_at="2026-01-02T03:04:05.000006+00:00",
        reason="by hand",
        metrics={},
        state=state,
        tensors=tensors,
        aliases={entry: dict(names) for entry, names in aliases.items()},
        files=records,
        environment={"world_size": max(len(ranks), 1)},
        layouts=layouts,
    )
    (path / "manifest.json").write_bytes(manifests.encode(manifest))
    return path


def grid(shape: tuple[int, ...], cell: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and shape of each cell, by the definition of cells."""
    edges = [range(0, whole, size) for whole, size in zip(shape, cell, strict=True)]
    return [
        (at, tuple(min(size, whole - here) for size, whole, here in zip(cell, shape, at, strict=True)))
        for at in itertools.product(*edges)
    ]


def _sorted_out(entry: str, arrays: Mapping[str, Array], cuts: Mapping[str, Cells | Pieces]) -> _Files:
    files = _Files(entry)
    for name, array in arrays.items():
        cut = cuts.get(f"{entry}/{name}")
        if cut is None:
            files.whole[name] = array
            continue
        for process, (offset, shape) in zip(*_boxes(array.shape, cut), strict=False):
            window = tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))
            files.held.setdefault(process, {})[name] = array[window]
    return files


def _boxes(
    shape: tuple[int, ...], cut: Cells | Pieces
) -> tuple[Sequence[int], Sequence[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The process that holds each box, and the boxes."""
    boxes = grid(shape, cut.cell) if isinstance(cut, Cells) else cut.boxes
    order = (isinstance(cut, Cells) and cut.order) or range(len(boxes))
    return order, boxes


def _record(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    cut: Cells | Pieces | None,
    entry: str,
    files: _Files,
    begins: Mapping[str, Mapping[str, int]],
    layouts: dict[str, tuple[str, ...]],
) -> TensorRecord:
    whole, held = files.names()
    if cut is None:
        assert whole is not None
        return TensorRecord(dtype, shape, (Piece(whole, name, begins[whole][name], shape),))
    if isinstance(cut, Pieces):
        pieces = [
            Piece(held[process], name, begins[held[process]][name], size, offset if any(offset) else ())
            for process, (offset, size) in zip(*_boxes(shape, cut), strict=True)
        ]
        return TensorRecord(dtype, shape, tuple(pieces))
    order = cut.order or tuple(sorted(held))
    layout = entry if not cut.order else "-".join(map(str, (entry, *order)))
    layouts[layout] = tuple(held[process] for process in order)
    return TensorRecord(dtype, shape, cell=cut.cell, layout=layout)


def _write(
    path: Path,
    files: _Files,
    dtypes: Mapping[str, str],
    aliases: Mapping[str, str],
    chunk_bytes: int,
    records: dict[str, FileRecord],
) -> dict[str, dict[str, int]]:
    """By file, where each tensor in it begins."""
    whole, held = files.names()
    contents = {held[process]: arrays for process, arrays in files.held.items()}
    if whole is not None:
        contents[whole] = files.whole
    return {
        file: _write_file(path, file, contents[file], files.entry, dtypes, aliases, chunk_bytes, records)
        for file in sorted(contents)
    }


def _write_file(
    path: Path,
    file: str,
    arrays: Mapping[str, Array],
    entry: str,
    dtypes: Mapping[str, str],
    aliases: Mapping[str, str],
    chunk_bytes: int,
    records: dict[str, FileRecord],
) -> dict[str, int]:
    stored = []
    for name, array in arrays.items():
        dtype = DTYPES[dtypes.get(f"{entry}/{name}", array.dtype.name)]
        stored.append((name, dtype.code, dtype.stored_shape(array.shape)))
    tied = {alias: name for alias, name in aliases.items() if name in arrays}
    layout = safetensors.plan(stored, {"holdfast_checkpoint_id": ID, "format": "pt", **tied})
    data = layout.prefix + b"".join(np.ascontiguousarray(arrays[item.name]).tobytes() for item in layout.tensors)
    (path / file).write_bytes(data)
    sums = tuple(xxhash.xxh3_128_hexdigest(data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes))
    records[file] = FileRecord(len(data), chunk_bytes, sums)
    return {item.name: item.begin for item in layout.tensors}
