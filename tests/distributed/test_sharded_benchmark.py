"""The benchmark of a sharded state: what was saved comes back, and there is a figure for every measure of everybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import measures
from benchmarks.sharded import RESHARDED, measure, table
from benchmarks.sharded_peers import PEERS


@pytest.mark.slow
def test_everybody_is_measured(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """One round on two ranks at the small scale, after a check of everybody; nothing is left on the disk."""
    if not count(0, 1):
        pytest.skip("in make torture")
    samples, nbytes = measure(2, "small", 1, tmp_path)

    names = {peer.name for peer in PEERS}
    expected = (measures.SAVE, measures.STALL, measures.DURABLE, measures.HOT, RESHARDED)
    assert {name: set(rows) for name, rows in samples.items()} == {kind.name: names for kind in expected}
    assert 25e6 < nbytes < 35e6
    assert list(tmp_path.iterdir()) == []


def test_the_table() -> None:
    """Holdfast first, and the others as multiples of it."""
    samples = {measures.SAVE.name: {"holdfast": [1.0], "DCP, 1 thread": [2.0]}, RESHARDED.name: {"holdfast": [0.5]}}

    found = table(2, samples, 29_000_000)

    assert (found.title, found.columns) == (
        "2 ranks, 29 MB",
        ("", "durable save, s", "hot load on half as many ranks, s"),
    )
    assert found.rows == (("**holdfast**", "1.000, 1.00x", "0.500, 1.00x"), ("DCP, 1 thread", "2.000, 2.00x", ""))
