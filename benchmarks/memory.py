"""Peak memory beside the state, measured in a process of its own for each peer.

python -m benchmarks.memory (blocking | background) PEER WORKLOAD SCALE DIRECTORY
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from benchmarks.background import BACKGROUND_PEERS, BackgroundPeer
from benchmarks.files import remove
from benchmarks.measures import MEASURES, PEAK_BACKGROUND, PEAK_LOAD, PEAK_SAVE
from benchmarks.peers import PEERS, Peer
from benchmarks.rounds import Figures
from benchmarks.workloads import WORKLOADS, Workload

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_of(kind: Literal["blocking", "background"], peer: str, workload: str, scale: str, directory: Path) -> Figures:
    """Bytes by which the resident set rises during saves and loads; nothing where the system does not tell."""
    if not CLEAR.exists():
        return {}
    command = [sys.executable, "-m", "benchmarks.memory", kind, peer, workload, scale, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {peer} failed:\n{done.stderr}")
    return {MEASURES[name]: figure for name, figure in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    """Measure one peer."""
    kind, name, workload, scale, directory = sys.argv[1:]
    path = Path(directory) / "memory"
    # Imports and pools that are made once in a process are not what a save takes.
    tiny = WORKLOADS["many"]("small", 0)
    if kind == "blocking":
        (peer,) = (peer for peer in PEERS if peer.name == name)
        _peaks_blocking(peer, tiny, path)
        peaks = _peaks_blocking(peer, WORKLOADS[workload](scale, 1), path)
    else:
        (background,) = (peer for peer in BACKGROUND_PEERS if peer.name == name)
        _peaks_background(background, tiny, path)
        peaks = _peaks_background(background, WORKLOADS[workload](scale, 1), path)
    print(json.dumps({measure.name: figure for measure, figure in peaks.items()}))


def _peaks_blocking(peer: Peer, state: Workload, path: Path) -> Figures:
    try:
        return {
            PEAK_SAVE: _peak(lambda: peer.save(state, path)),
            PEAK_LOAD: _peak(lambda: peer.load(state, path)),
        }
    finally:
        remove(path)


def _peaks_background(peer: BackgroundPeer, state: Workload, path: Path) -> Figures:
    def save_twice() -> None:
        with peer.open(state, path) as session:
            for _ in range(2):
                state.change()
                session.stepped()
                session.save()()

    try:
        return {PEAK_BACKGROUND: _peak(save_twice)}
    finally:
        remove(path)


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
