"""The benchmarks run, and measure everybody whose package is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("workload", ["gpt2", "many"])
def test_every_measure_of_every_peer(tmp_path: Path, workload: str) -> None:
    """One round at the small scale: a figure for each, written as JSON, and nothing left on the disk."""
    command = [sys.executable, "-m", "benchmarks", "--scale", "small", "--rounds", "1", "--workload", workload]
    command += ["--directory", str(tmp_path / "disk"), "--json", str(tmp_path / "figures.json")]
    command += ["--only", "holdfast", "--only", "torch.save", "--only", "safetensors"]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["workloads"][workload]
    measured = {measure: set(rows) for measure, rows in figures["samples_s"].items()}
    peers = {"holdfast", "torch.save", "safetensors"}
    assert set(measured) == {"durable save", "hot load", "cold load"}
    assert all(peers <= names for names in measured.values())
    assert figures["summary"]["durable save"]["holdfast"]["ratio"] == 1.0
    assert all(seconds > 0 for rows in figures["samples_s"].values() for times in rows.values() for seconds in times)
    assert list((tmp_path / "disk").iterdir()) == []


def test_an_unknown_peer() -> None:
    """It says which there are."""
    command = [sys.executable, "-m", "benchmarks", "--only", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there are: holdfast, torch.save" in done.stderr
