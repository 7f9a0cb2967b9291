"""What reads checkpoints, fuzzed: no input crashes it, hangs it, or has it take much memory."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("lab") / "fuzz.py"

# Of a thousand executions. The targets do 15, 20, 30 and half a thousand of them a second.
SHARES = {"manifest": 290, "tree": 347, "header": 360, "directory": 3}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed here")
@pytest.mark.parametrize("target", SHARES)
def test_fuzzing(
    target: str, count: Callable[[int, int], int], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As many inputs as were asked for, and only the documented exceptions; what decodes, encodes to an equal one."""
    runs = count(20_000, 10_000_000) * SHARES[target] // 1000
    command = [sys.executable, FUZZ, target, str(runs), f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(list(map(str, command)), capture_output=True, check=False)
    output = done.stderr.decode(errors="replace")
    found = re.search(r"^Done (\d+) runs", output, re.MULTILINE)
    assert (done.returncode, found is not None) == (0, True), output[-5000:]
    assert found is not None
    record_property("count: fuzz executions", int(found[1]))
    assert int(found[1]) >= runs
