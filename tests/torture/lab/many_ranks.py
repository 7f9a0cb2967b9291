"""A thousand ranks in one process: what one of them plans and sends, and what the coordinator makes of all reports.

Tensors have shapes and no memory of their own, files have records and no bytes: what is left is what many processes
cost beside writing. It says nothing of networks and disks.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import torch
import torch.distributed as dist

from holdfast.collector import collector_paused
from holdfast.distributed import share
from holdfast.distributed.group import Group
from holdfast.distributed.messages import KeyValueStore
from holdfast.distributed.saving import SharedSaves
from holdfast.format import manifest as manifests
from holdfast.format.names import RANKS_ENTRY
from holdfast.format.records import CHUNK_BYTES, FileRecord
from holdfast.part import About
from holdfast.state.capture import CapturedEntry, CapturedTensor
from holdfast.state.sharding import Placement, Sharding
from holdfast.storage.store import FileImage, Store

SHAPES = ((2048, 2048), (5504, 2048), (2048,), (2048, 2048))
_SUM = "0123456789abcdef" * 2


@dataclass(slots=True)
class Costs:
    """What a save took on the coordinator, beside writing.

    Attributes:
        seconds: by what was done.
        peak_bytes: of Python's memory at once, where it was measured.
        manifest: what was committed.
        sent_bytes: what each rank sends in all.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    manifest: bytes = b""
    sent_bytes: int = 0

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """The block does it."""
        begin_s = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - begin_s


class _Pending:
    """A save that writes nothing."""

    name = ".tmp-simulated"

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def write_files(self, images: Mapping[str, FileImage]) -> dict[str, FileRecord]:
        return {name: _record(image.nbytes) for name, image in images.items()}

    def commit(self, name: str, manifest: bytes) -> None:
        self._costs.manifest = manifest

    def abort(self) -> None:
        """There is nothing."""


class _Store:
    """A place for one."""

    path = "/simulated"

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def create(self, step: int) -> _Pending:
        return _Pending(self._costs)


class _Others:
    """The store, as if all other ranks had sent what rank 0 says of itself, and had written what it wrote."""

    def __init__(self, costs: Costs, ranks: int) -> None:
        self._store: Any = dist.HashStore()  # type: ignore[attr-defined]  # it is one of its names
        self._costs = costs
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def set(self, key: str, value: Any) -> None:
        """What rank 0 sends, all send; of files each has its own."""
        self._store.set(key, value)
        begin, _, rank = key.rpartition("/")
        if rank != "0":
            return
        self._costs.sent_bytes += len(value)
        for other in range(1, self._ranks):
            self._store.set(
                f"{begin}/{other}", _as_of(value, other, self._ranks) if begin.startswith("save") else value
            )


def _as_of(report: bytes, rank: int, ranks: int) -> bytes:
    """The report of rank 0 with names that would be those of another."""
    found = msgspec.json.decode(report)
    files = {}
    for name, record in found["files"].items():
        if name.endswith(f"-of-{ranks:05d}.safetensors"):
            files[f"{name[: -len('00001-of-00001.safetensors')]}{rank + 1:05d}-of-{ranks:05d}.safetensors"] = record
        elif "-of-" in name:  # whole tensors come first: one file, which rank 0 has
            count = ranks + 1
            stem = name[: -len("00001-of-00001.safetensors")]
            if name != f"{stem}00001-of-{count:05d}.safetensors":
                files[f"{stem}{rank + 2:05d}-of-{count:05d}.safetensors"] = record
    own = {f"{rank:05d}": _moved(record, rank, ranks) for record in found["own"].values()}
    return msgspec.json.encode({**found, "files": files, "own": own})


def _moved(record: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    file = f"{RANKS_ENTRY}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    return {**record, "pieces": [{**piece, "file": file, "name": f"{rank:05d}"} for piece in record["pieces"]]}


def _record(nbytes: int) -> FileRecord:
    return FileRecord(nbytes, CHUNK_BYTES, (_SUM,) * -(-nbytes // CHUNK_BYTES))


def state_of(ranks: int, tensors: int, rank: int = 0) -> dict[str, CapturedEntry]:
    """A model of so many tensors under AdamW, cut over all ranks by their rows, as one rank captures it."""
    world = tuple(range(ranks))
    shardings = {shape: Sharding(shape, (ranks,), world, (Placement(0),)) for shape in SHAPES}
    model: dict[str, CapturedTensor] = {}
    moments: dict[str, CapturedTensor] = {}
    slots: dict[str, Any] = {}
    for index in range(tensors):
        name = f"layers.{index // 10}.part{index % 10}.weight"
        shape = SHAPES[index % len(SHAPES)]
        model[name] = _cut(name, shape, shardings[shape], rank)
        slots[f"model.{name}"] = {}
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            key = f"state.model.{name}.{slot}"
            moments[key] = _cut(
                key, () if slot == "step" else shape, None if slot == "step" else shardings[shape], rank
            )
            slots[f"model.{name}"][slot] = {"$tensor": key}
    groups = [{"lr": 1e-3, "betas": {"$tuple": [0.9, 0.95]}, "params": list(slots)}]
    return {
        "model": CapturedEntry({name: {"$tensor": name} for name in model}, model, {}),
        "optimizer": CapturedEntry({"state": slots, "param_groups": groups}, moments, {}),
    }


_ONE = torch.zeros(1)


def _cut(name: str, shape: tuple[int, ...], sharding: Sharding | None, rank: int) -> CapturedTensor:
    local = shape
    if sharding is not None:
        box = sharding.box(rank)
        assert box is not None
        local = box[1]
    return CapturedTensor(
        name=name,
        dtype="float32",
        shape=shape,
        memory_format="contiguous",
        device="cpu",
        value=_ONE.expand(local) if local else torch.zeros(()),
        address=_ONE.data_ptr(),
        flat=True,
        sharding=sharding,
    )


def save_as_coordinator(ranks: int, tensors: int, *, memory: bool = False) -> Costs:
    """One save of a state, but for writing it: what is planned, sent, gathered and committed by rank 0.

    Args:
        ranks: how many there are.
        tensors: of the model; the optimizer has three times as many.
        memory: measure Python's memory instead of the time.
    """
    costs = Costs()
    others = _Others(costs, ranks)
    group = Group(lambda: cast(KeyValueStore, others), 0, ranks, 60)
    state = state_of(ranks, tensors)
    saves = SharedSaves(group, range(ranks), cast(Store, _Store(costs)), {})
    module: Any = share
    reopen = module.reopen_checkpoint
    module.reopen_checkpoint = lambda store, name, manifest: _Named(name)
    if memory:
        tracemalloc.start()
    try:
        with collector_paused():
            with costs.of("plan, the first time"):
                first = saves.begin(lambda: state, About(step=1))
            first.finish(["step-000000000001"])
            with costs.of("plan"):
                second = saves.begin(lambda: state, About(step=2))
            with costs.of("gather and commit"):
                second.finish(["step-000000000002"])
        with costs.of("open"):
            decoded = manifests.decode(costs.manifest, "simulated")
    finally:
        module.reopen_checkpoint = reopen
        if memory:
            costs.peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert len(decoded.tensors["optimizer"]) == 3 * tensors
    assert len(decoded.tensors[RANKS_ENTRY]) == ranks
    return costs


@dataclass(frozen=True, slots=True)
class _Named:
    name: str


def main(ranks: int, tensors: int) -> str:
    """What a save takes, in one line."""
    found = save_as_coordinator(ranks, tensors)
    seconds = ", ".join(f"{name} {took_s:.2f} s" for name, took_s in found.seconds.items())
    return f"{ranks} ranks, {tensors} tensors: {seconds}, manifest {len(found.manifest)} bytes\n"


if __name__ == "__main__":
    sys.stdout.write(main(int(sys.argv[1]), int(sys.argv[2])))
