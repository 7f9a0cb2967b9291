"""What the tests of the commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from holdfast import Run
from holdfast.cli import app


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)

    def rows(self) -> list[list[str]]:
        """Its output as words, a list a line."""
        return [line.split() for line in self.out.splitlines()]


Command = Callable[..., Answer]


@pytest.fixture
def holdfast_cli() -> Command:
    """Runs a command: ``holdfast_cli("ls", path)``."""

    def run(*arguments: object) -> Answer:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of steps 2, 10 (twice) and 30 with losses; a model with a tied weight and an optimizer in each."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 2, bias=False)})
    model["second"].weight = model["first"].weight
    state = {"model": model, "data": {"history": [0.5, 0.25], "note": "[red]x"}}
    run = Run(tmp_path / "run")
    for step, epoch, loss in ((2, 0, 0.5), (10, 1, 0.125), (10, 2, 0.125), (30, 3, 0.25)):
        run.save(state, step=step, epoch=epoch, metrics={"loss": loss}, reason=f"[bold]step {step}")
    return run


@pytest.fixture
def damaged(run: Run) -> Run:
    """The same with the newest checkpoint truncated."""
    file = Path(run[30].path, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    return run
