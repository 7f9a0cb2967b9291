"""Saves and restores a large state and tells how far the memory's peak rose above what was there, as JSON.

python tests/memory_driver.py <megabytes> <directory>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import holdfast

sys.path.insert(0, str(Path(__file__).parent / "torture"))
from lab.sharded import Cells, write_sharded


def field(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def peak(function: Callable[[], object]) -> int:
    """How far the resident set rises during a call."""
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    function()
    return field("VmHWM") - before


def make_state(nbytes: int, value: float) -> dict[str, Any]:
    """A third in one tensor, a third in one that lies the other way, the rest in many, and a transposed array."""
    side = int((nbytes // 3 // 4) ** 0.5)
    small = [torch.full((100, 100), value) for _ in range(nbytes // 6 // 40_000)]
    return {
        "plain": torch.full((side, side), value),
        "transposed": torch.full((side, side), value).t(),
        "small": small,
        "array": np.full((side // 2, side), value, np.float32).T,
    }


def save(path: Path, state: dict[str, Any]) -> int:
    """The peak of a save; the state is gone when this returns, which makes room for the next."""
    return peak(lambda: holdfast.save(path, state))


def save_twice(path: Path, state: dict[str, Any]) -> int:
    """The peak of two saves in the background, the second while the memory of the first is there."""

    def saves() -> None:
        with holdfast.Checkpointer(path, state, keep=holdfast.KeepLast(1)) as ckpt:
            for _ in range(2):
                state["plain"].add_(1)
                ckpt.step()
                ckpt.save().result()

    return peak(saves)


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    nbytes, directory = int(float(sys.argv[1]) * 1e6), Path(sys.argv[2])
    # What is made once in a process, such as imports and pools, is not what a save takes.
    tiny = make_state(10**6, 1.0)
    holdfast.save(directory / "warm", tiny)
    holdfast.restore(directory / "warm", tiny)
    peaks = {"save": save(directory / "x", make_state(nbytes, 1.0))}
    live = make_state(nbytes, 2.0)
    peaks["restore"] = peak(lambda: holdfast.restore(directory / "x", live))
    peaks["background"] = save_twice(directory / "run", live)
    live["plain"].fill_(1.0)
    side = live["plain"].shape[0]
    cuts = {"cut/rows": Cells((-(-side // 4), side)), "cut/columns": Cells((side, -(-side // 4)))}
    arrays = {name.partition("/")[2]: live["plain"].numpy() for name in cuts}
    write_sharded(directory / "sharded", {"cut": arrays}, cuts, chunk_bytes=2**21)
    for entry, path in (("plain", "x"), ("small", "x"), ("cut", "sharded")):
        checkpoint = holdfast.open(directory / path)
        peaks[f"export {entry}"] = peak(lambda: checkpoint.export(entry, directory / entry))  # noqa: B023 - called at once
        (directory / entry).unlink()
    peaks["verify"] = peak(lambda: holdfast.open(directory / "x").verify())
    assert float(live["transposed"].sum(dtype=torch.float64)) == live["plain"].numel()
    assert float(live["array"].min()) == 1.0
    print(json.dumps({"files": holdfast.open(directory / "x").nbytes, **peaks}))


if __name__ == "__main__":
    main()
