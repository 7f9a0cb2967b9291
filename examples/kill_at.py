"""Runs a training script, and kills it in the middle of a batch: after so many optimizer steps of this process.

    python examples/kill_at.py 37 examples/digits.py --run runs/digits

SIGKILL cannot be caught: nothing of the script runs after it, no handler, no cleaning up, no flushing of files.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    """Run the script that the command line names, up to the batch that it names."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} BATCH SCRIPT [ARGUMENT ...]")
    remaining = int(sys.argv[1])

    def kill_at_last(*_: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(kill_at_last)
    del sys.argv[:2]
    sys.path[0] = str(Path(sys.argv[0]).absolute().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
