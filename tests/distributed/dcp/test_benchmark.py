"""The benchmark of DCP's storage: everybody's saves come back, and the table says what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ranks import HOLDFAST, MEASURES, PEERS, RAW, _check, measure, table


def test_everybody_is_measured_on_two_ranks(on_ranks: Any, tmp_path: Path) -> None:
    """Each once a round, what was saved compared with what was loaded; and nothing is left on the disk."""
    directory = tmp_path / "disk"
    directory.mkdir()
    [samples, _] = on_ranks(2, lambda rank: measure(1, 2, directory))

    raw = [len(found.pop(RAW, [0, 0])) for found in samples.values()]  # not every file system takes such writes
    assert {what: {name: len(figures) for name, figures in found.items()} for what, found in samples.items()} == {
        what: dict.fromkeys(PEERS, 2) for what in MEASURES
    }
    assert raw == [2] * len(MEASURES)
    assert list(directory.iterdir()) == []


def test_the_table_compares_within_rounds() -> None:
    """The median of the ratios, not the ratio of the medians."""
    figures = {HOLDFAST: [1.0, 4.0, 1.0], "other": [3.0, 4.0, 2.0]}

    assert table({2: {"hot load": figures}}, 8).splitlines()[2:] == [
        "| 2 | hot load | holdfast | 1.00 (1.00 to 4.00) | 1.00 |",
        "| 2 | hot load | other | 3.00 (2.00 to 4.00) | 2.00 |",
    ]


def test_who_loads_something_else_does_not_compete() -> None:
    """A peer that loads nothing at all is found out."""
    with pytest.raises(AssertionError, match="w is not what was saved"):
        _check({"model": {"w": torch.ones(2)}}, {"model": {"w": torch.zeros(2)}})
