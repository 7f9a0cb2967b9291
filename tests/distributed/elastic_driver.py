"""One rank of a training that torchrun starts; in the first attempt one of them is killed.

    python -m torch.distributed.run --nproc-per-node=2 --max-restarts=2 tests/distributed/elastic_driver.py ORDER

ORDER is a JSON object: the ``directory``, the ``rank`` to kill and its ``kill``, and the ``arguments`` of the training.
What came of it lies in ``rank-0.json`` and so on beside the run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "torture"))

import torch
import torch.distributed as dist
from lab.ranks_moments import Kill, Moments
from lab.ranks_works import train


def main() -> None:
    """Train, or continue to train."""
    order = json.loads(sys.argv[1])
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    moments = Moments()
    moments.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    moments.begin(Kill(**order["kill"]) if attempt == 0 and rank == order["rank"] else None)
    directory = Path(order["directory"])
    told = {"result": train(directory, **order["arguments"]), "attempt": attempt}
    (directory / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
