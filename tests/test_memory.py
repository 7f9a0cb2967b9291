"""How much memory saving and restoring take beside the state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "memory_driver.py"
LIMIT = 64 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of the peak")
def test_peak_memory(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """Saving, restoring, verifying and exporting 1.5 GB add under 64 MB each, whichever way the tensors lie in memory.

    A save in the background adds one copy of the state.
    """
    megabytes = count(300, 1500)
    command = [sys.executable, str(DRIVER), str(megabytes), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert abs(peaks.pop("files") - megabytes * 1e6) < 0.05 * megabytes * 1e6
    assert 0.9 * megabytes * 1e6 < peaks.pop("background") < megabytes * 1e6 + LIMIT
    assert {name: peak for name, peak in peaks.items() if peak >= LIMIT} == {}
