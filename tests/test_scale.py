"""How opening a checkpoint grows with what it holds: as much as its manifest does, no more."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab.terabyte import terabyte_manifest, write_sparse

import holdfast
from holdfast.format import manifest as manifests
from holdfast.format.manifest import MAX_MANIFEST_BYTES, MAX_STATE_MARKS
from holdfast.format.strict_json import marks

ATTEMPTS = 5


def opened(path: Path) -> Callable[[], object]:
    """What is measured."""
    return lambda: holdfast.open(path).tensors


def calls(function: Callable[[], object]) -> int:
    """How many functions are called meanwhile, Python's own too."""
    made = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return made


def cpu_s(function: Callable[[], object]) -> float:
    """The least of a few."""
    found = []
    for _ in range(3):
        begin_s = time.process_time()
        function()
        found.append(time.process_time() - begin_s)
    return min(found)


def test_opening_grows_with_files_and_tensors(tmp_path: Path) -> None:
    """Twice as many processes and twice as many tensors, which are four times as many cells, take twice as long."""
    for name, factor in (("one", 1), ("two", 2)):
        write_sparse(terabyte_manifest(64 * factor, 500 * factor), tmp_path / name)
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert calls(two) < 2.5 * calls(one)
    ratios = []
    for _ in range(ATTEMPTS):  # a machine may become busy in the middle of one
        ratios.append(cpu_s(two) / cpu_s(one))
        if ratios[-1] < 3:
            break
    assert min(ratios) < 3, ratios


def test_a_manifest_does_not_grow_with_cells(tmp_path: Path) -> None:
    """Sixteen times the processes: what is said of tensors that are cut is as long as before."""
    few, many = (terabyte_manifest(ranks, 200).tensors["optimizer"] for ranks in (64, 1024))
    cells = {name for name, record in many.items() if record.layout}
    assert len(cells) == 400
    assert [len(str(few[name])) >= len(str(many[name])) for name in cells] == [True] * 400


def test_a_terabyte_of_a_thousand_processes_is_within_the_limits() -> None:
    """With 20,000 parameters and AdamW: encoding refuses what a reader would."""
    manifest = terabyte_manifest()
    data = manifests.encode(manifest)
    assert sum(record.bytes for record in manifest.files.values()) > 10**12
    assert len(data) < MAX_MANIFEST_BYTES * 2 / 3
    head = manifests.decode_head(data, "")
    assert marks(memoryview(head.state)) < MAX_STATE_MARKS
    assert manifests.decode(data, "", head).layouts == manifest.layouts
