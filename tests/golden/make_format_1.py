"""Makes the golden checkpoint of format 1, next to this file. Run once, when the format was fixed.

    python tests/golden/make_format_1.py

What it wrote stays as it is for ever: readers of every later version must give exactly the values in
``tests/test_golden.py``. A change of the format gets a new script and a new directory.
"""

from __future__ import annotations

import collections
import datetime
import enum
import math
import pathlib
import struct
import zoneinfo
from typing import Any

import numpy as np
import torch

import holdfast
from holdfast.format.dtypes import DTYPES
from holdfast.run import Run

HERE = pathlib.Path(__file__).parent


class Color(enum.Enum):
    """A registered type."""

    RED = 1


class Model(torch.nn.Module):
    """Tied weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.out = torch.nn.Linear(2, 4)
        self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))


def values() -> dict[str, Any]:
    """One value of every type in the typed tree."""
    return {
        "plain": [None, True, 1, -(2**63), 0.1, -0.0, "ä😀", {}, []],
        "$dollar": 1,
        "tuple": (1, (2,)),
        "keys": {1: "int", "1": "text", (1, 2): None},
        "sets": [{1, 2}, frozenset({"a"})],
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "counter": collections.Counter({30: 1, 80: 2}),
        "default": collections.defaultdict(list, {"a": [1]}),
        "deque": collections.deque([1, 2], 5),
        "floats": [math.inf, -math.inf, struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]],
        "ints": [2**128 - 1, -(10**4001)],
        "complex": complex(-0.0, 2.0),
        "bytes": [b"\x00\xff", bytearray(b"ab")],
        "scalars": [np.float16(0.5), np.int64(-1), np.str_("x"), np.datetime64("2026-01-02T03:04:05", "ns")],
        "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:\\a")],
        "times": [
            datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
            datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "X")),
            datetime.date(2026, 1, 2),
            datetime.time(1, 2, 3, 4),
            datetime.timedelta(-1, 2, 3),
        ],
        "torch": [torch.bfloat16, torch.Size([1, 2]), torch.device("cuda:1")],
        "codec": Color.RED,
    }


def state() -> dict[str, Any]:
    """Every kind of entry, with values that are the same on every machine."""
    model = Model()
    with torch.no_grad():
        model.embed.weight.copy_(torch.arange(8.0).reshape(4, 2) / 8)
        model.out.bias.copy_(torch.arange(4.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    raw = torch.arange(16, dtype=torch.uint8)
    tensors = {name: raw.clone().view(getattr(torch, name)) for name in DTYPES if name != "bool"}
    tensors["bool"] = torch.tensor([True, False])
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "tensors": {**tensors, "scalar": torch.tensor(3), "empty": torch.empty(0, 3)},
        "arrays": {
            "plain": np.arange(3, dtype=np.int16),
            "text": np.array(["a", "bc"]),
            "big": np.arange(2, dtype=">i4"),
        },
        "values": values(),
    }


if __name__ == "__main__":
    holdfast.register_codec(Color, name="golden.Color")
    run = Run(HERE / "format-1")
    checkpoint = run.save(state(), step=1200, epoch=3, metrics={"val_loss": 0.5, "best": math.inf}, reason="golden")
    run.add_metrics(run.pin(1200), {"later": math.nan})
