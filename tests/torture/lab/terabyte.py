"""The manifest of a checkpoint of a terabyte that a thousand processes saved, without its bytes.

A model and AdamW's two moments, cut by rows into a cell for each process; a ``step`` for each parameter; and of each
process what is its own. What checksums are is not looked at before bytes are read: these are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.format import manifest as manifests
from holdfast.format.dtypes import DTYPES
from holdfast.format.manifest import Manifest
from holdfast.format.names import RANKS_ENTRY, shard_name
from holdfast.format.records import CHUNK_BYTES, FileRecord, Piece, TensorRecord

RANKS = 1024
TENSORS = 20_000
SHAPE = (2048, 2048)
"""Of each parameter: 20,000 of them in float32, with two moments, are a terabyte."""
RANK_BYTES = 8192
"""What a process keeps of its own: the states of its generators."""
_HEADER_BYTES_A_TENSOR = 110
_ID = "0123456789abcdef" * 2


def terabyte_manifest(ranks: int = RANKS, tensors: int = TENSORS, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """Such a manifest, of so many processes and so many parameters of 16 MiB."""
    names = [f"model.layers.{number // 10}.block.{number % 10}.self_attention.weight" for number in range(tensors)]
    cell = (-(-SHAPE[0] // ranks), SHAPE[1])
    files = _Files(chunk_bytes)
    cell_bytes = cell[0] * cell[1] * DTYPES["float32"].itemsize
    # The whole tensors of an entry come first: the steps are in one file, before those of the cells.
    data = shard_name("optimizer", 1, ranks + 1)
    files.add([data], tensors, 4 * tensors)
    begin = files.header_bytes(tensors)
    steps = {
        f"state.{name}.step": TensorRecord("float32", (), (Piece(data, f"state.{name}.step", begin + 4 * number, ()),))
        for number, name in enumerate(names)
    }
    model = [shard_name("model", number, ranks) for number in range(1, ranks + 1)]
    optimizer = [shard_name("optimizer", number, ranks + 1) for number in range(2, ranks + 2)]
    own = [shard_name(RANKS_ENTRY, number, ranks) for number in range(1, ranks + 1)]
    files.add(model, tensors, tensors * cell_bytes)
    files.add(optimizer, 2 * tensors, 2 * tensors * cell_bytes)
    files.add(own, 1, RANK_BYTES)
    moments = [f"state.{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")]
    return Manifest(
        format=manifests.FORMAT,
        checkpoint_id=_ID,
        run_id=_ID,
        parent=None,
        step=1000,
        epoch=1,
        created_at="2026-01-02T03:04:05.000006+00:00",
        reason="every 1000 steps",
        metrics={"loss": 0.5},
        state={
            "model": {name: {"$tensor": name} for name in names},
            "optimizer": _adamw(names),
            RANKS_ENTRY: {"world_size": ranks, "entries": ["_rng"]},
        },
        tensors={
            "model": _cells(names, cell, "model"),
            "optimizer": {**steps, **_cells(moments, cell, "optimizer")},
            RANKS_ENTRY: {
                f"{rank:05d}": _whole(file, f"{rank:05d}", files.header_bytes(1)) for rank, file in enumerate(own)
            },
        },
        aliases={},
        files=files.records,
        environment={"world_size": ranks},
        layouts={"model": tuple(model), "optimizer": tuple(optimizer)},
    )


def write_sparse(manifest: Manifest, path: Path) -> None:
    """Make a directory of it: files of the right sizes that hold nothing, and take no space."""
    path.mkdir(parents=True)
    (path / "manifest.json").write_bytes(manifests.encode(manifest))
    for name, record in manifest.files.items():
        with (path / name).open("wb") as file:
            file.truncate(record.bytes)


class _Files:
    """The records of files by name; checksums are texts of 32 digits, no two of them alike."""

    def __init__(self, chunk_bytes: int) -> None:
        self.records: dict[str, FileRecord] = {}
        self._chunk_bytes = chunk_bytes
        self._made = 0

    @staticmethod
    def header_bytes(tensors: int) -> int:
        return -(-(_HEADER_BYTES_A_TENSOR * tensors + 100) // 4096) * 4096

    def add(self, names: Iterable[str], tensors: int, data_bytes: int) -> None:
        """Files with so many tensors of so many bytes in all."""
        nbytes = self.header_bytes(tensors) + data_bytes
        chunks = -(-nbytes // self._chunk_bytes)
        for name in names:
            sums = tuple(f"{number:032x}" for number in range(self._made, self._made + chunks))
            self._made += chunks
            self.records[name] = FileRecord(nbytes, self._chunk_bytes, sums)


def _cells(names: Iterable[str], cell: tuple[int, int], layout: str) -> dict[str, TensorRecord]:
    return {name: TensorRecord("float32", SHAPE, cell=cell, layout=layout) for name in names}


def _whole(file: str, name: str, begin: int) -> TensorRecord:
    return TensorRecord("uint8", (RANK_BYTES,), (Piece(file, name, begin, (RANK_BYTES,)),))


def _adamw(names: list[str]) -> dict[str, Any]:
    """The tree of the optimizer's state."""
    state = {
        name: {moment: {"$tensor": f"state.{name}.{moment}"} for moment in ("step", "exp_avg", "exp_avg_sq")}
        for name in names
    }
    group = {"lr": 1e-4, "betas": {"$tuple": [0.9, 0.95]}, "eps": 1e-8, "weight_decay": 0.1, "params": names}
    return {"state": state, "param_groups": [group]}
