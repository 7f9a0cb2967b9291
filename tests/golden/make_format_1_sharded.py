"""Makes the golden checkpoint of format 1 as four processes save it, next to this file. Run once.

    python tests/golden/make_format_1_sharded.py

What it wrote stays as it is for ever; see ``make_format_1.py``. It is written from the definition of the format, by
``lab.sharded``: cells, one of them in another order of processes, pieces, whole tensors, a tied one, and ``_ranks``.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "torture"))

from lab.sharded import Cells, Pieces, write_sharded  # noqa: E402 - found by the line above

MODEL = {
    "rows": np.arange(14, dtype=np.float32).reshape(7, 2) / 8,
    "grid": np.arange(15, dtype=np.int16).reshape(3, 5),
    "few": np.array([0.5, -0.5]),
    "anyhow": np.arange(24, dtype=np.float32).reshape(4, 6),
    "bits": np.arange(8, dtype=np.uint16).reshape(4, 2),  # of bfloat16
    "whole": np.array([1, 2, 3]),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
OPTIMIZER = {"state.model.rows.exp_avg": np.arange(14, dtype=np.float32).reshape(7, 2) - 7}
CUTS = {
    "model/rows": Cells((2, 2)),
    "model/grid": Cells((2, 3), (2, 0, 3, 1)),
    "model/few": Cells((1,)),
    "model/anyhow": Pieces((((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4)))),
    "model/bits": Cells((1, 2)),
    "optimizer/state.model.rows.exp_avg": Cells((2, 2)),
}
RANKS = [{"_rng": {"python": rank}, "loader": {"position": 10 * rank}} for rank in range(4)]


def main(path: pathlib.Path) -> None:
    """Write it."""
    write_sharded(
        path / "step-000000000007",
        {"model": MODEL, "optimizer": OPTIMIZER},
        CUTS,
        ranks=RANKS,
        aliases={"model": {"tied": "rows"}},
        dtypes={"model/bits": "bfloat16"},
        step=7,
    )


if __name__ == "__main__":
    main(HERE / "format-1-sharded")
