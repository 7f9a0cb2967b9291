"""Peak memory beside the state, measured in a process of its own for each peer.

python -m benchmarks.memory PEER WORKLOAD SCALE DIRECTORY
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import PEERS, Peer, remove
from benchmarks.workloads import WORKLOADS

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAVE, LOAD = "peak memory of a save", "peak memory of a load"


def peaks_of(peer: Peer, workload: str, scale: str, directory: Path) -> dict[str, int] | None:
    """Bytes by which the resident set rises during a save and a load; None where the system does not tell."""
    if not CLEAR.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", peer.name, workload, scale, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {peer.name} failed:\n{done.stderr}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure one peer."""
    name, workload, scale, directory = sys.argv[1:]
    (peer,) = (peer for peer in PEERS if peer.name == name)
    path = Path(directory) / "memory"
    # Imports and pools that are made once in a process are not what a save takes.
    tiny = WORKLOADS["many"]("small", 0)
    peer.save(tiny, path)
    peer.load(tiny, path)
    remove(path)
    state = WORKLOADS[workload](scale, 1)
    try:
        peaks = {SAVE: _peak(lambda: peer.save(state, path)), LOAD: _peak(lambda: peer.load(state, path))}
    finally:
        remove(path)
    print(json.dumps(peaks))


def _peak(work: Callable[[], None]) -> int:
    before = _field("VmRSS")
    CLEAR.write_text("5")  # the peak counts from here
    work()
    return _field("VmHWM") - before


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


if __name__ == "__main__":
    main()
