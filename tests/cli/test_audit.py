"""``holdfast audit``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast.audit
from holdfast.audit import Auditor

Command = Callable[..., Any]

SOUND = """
import torch

def training():
    torch.manual_seed(0)
    total = torch.zeros(2)

    def step():
        print("[red]a training that prints")
        return total.add_(torch.rand(2)).sum()

    return {"total": total}, step
"""
UNSOUND = """
import torch

def training():
    total = torch.zeros(2)
    count = 0

    def step():
        nonlocal count
        count += 1
        return total.add_(count).sum()

    return {"total": total}, step
"""


@pytest.fixture(scope="module")
def auditor() -> Iterator[Auditor]:
    """Audits for all commands of this module."""
    with Auditor() as made:
        yield made


@pytest.fixture
def audit_cli(
    auditor: Auditor, holdfast_cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs ``holdfast audit`` on a source, in its directory: ``audit_cli(SOUND, "train.py:training")``."""
    monkeypatch.setattr(holdfast.audit, "audit", auditor.audit)
    monkeypatch.chdir(tmp_path)

    def run(source: str, *arguments: object) -> Any:
        (tmp_path / "train.py").write_text(source)
        return holdfast_cli("audit", *arguments)

    return run


def test_a_training_that_resumes_exactly(audit_cli: Command) -> None:
    """Exit code 0: the verdict, what was run, what was compared, and nothing that the training printed."""
    answer = audit_cli(SOUND, "train.py:training", "--steps-before", "2", "--steps-after", "1")

    assert (answer.code, answer.err) == (0, "")
    title, run, compared, took = (line.rstrip() for line in answer.out.splitlines())
    assert title == "train.py:training resumes exactly"
    assert run == "run       3 steps without interruption; 2 steps, save, new process, restore, 1 step"
    assert compared == (
        "compared  1 values of the state, 3 generators and the loss, at 2 moments: 16 bytes, bit by bit"
    )
    assert took.startswith("took      ")


def test_a_training_that_does_not(audit_cli: Command) -> None:
    """Exit code 1: the first difference as a table, then causes with evidence and advice."""
    answer = audit_cli(UNSOUND, "train:training", "--steps-before", "2", "--steps-after", "1")

    assert (answer.code, answer.err) == (1, "")
    lines = [line.strip() for line in answer.out.splitlines()]
    assert lines[0] == "train:training does not resume exactly"
    assert [" ".join(line.split()) for line in lines if line.startswith(("when", "step 3"))] == [
        "when what uninterrupted resumed",
        "step 3 loss 12.0 (0x1.8000000000000p+3) 8.0 (0x1.0000000000000p+3)",
    ]
    assert "differs as well: total" in lines
    assert lines[-4:] == [
        "cause: `count` (int) is used by step() and is not in the state",
        "- after step 2 it was 2; in the resumed process it is 0",
        "- with this saved and restored as well, the resumed run is exact",
        "what to do: Keep it in a dictionary or an object with state_dict() that is in the state.",
    ]


def test_json(audit_cli: Command) -> None:
    """One object, whatever the training prints."""
    exact = audit_cli(SOUND, "train.py:training", "--json", "--steps-before", "1", "--steps-after", "1")
    assert (exact.code, exact.json["exact"], exact.json["divergence"], exact.json["causes"]) == (0, True, None, [])

    differs = audit_cli(UNSOUND, "train.py:training", "--json", "--steps-before", "2", "--steps-after", "1")
    assert differs.code == 1
    assert list(differs.json) == (
        "target exact repeatable before after leaves bytes moments generators seconds divergence causes notes".split()
    )
    divergence = differs.json["divergence"]
    assert (divergence["at"], divergence["step"]) == ("step", 3)
    assert [item["name"] for item in divergence["differences"]] == ["loss", "total"]
    assert divergence["differences"][1]["expected"]["value"] == "[6.0, 6.0]"
    assert [(cause["kind"], cause["certain"]) for cause in differs.json["causes"]] == [("variable", True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
        (["other.py:training"], "other.py is no file"),
        (["nowhere:training"], "there is no module nowhere"),
        (["train.py:other"], "the module has no other"),
        (["train.py:training", "--steps-before", "0"], "before: expected a number of steps of at least 1, found 0"),
        (["train.py:training", "--steps-after", "-1"], "after: expected a number of steps of at least 1, found -1"),
    ],
)
def test_used_wrongly(audit_cli: Command, arguments: list[str], message: str) -> None:
    """Exit code 2, a message on standard error, and no traceback."""
    answer = audit_cli(SOUND, *arguments)

    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("holdfast: ")
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_a_training_that_fails(audit_cli: Command) -> None:
    """Exit code 2, with the user's own traceback."""
    answer = audit_cli("def training():\n    return {}, lambda: 1 / 0", "train.py:training")

    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("holdfast: step 1 failed: ZeroDivisionError: division by zero\n")
    assert "return {}, lambda: 1 / 0" in answer.err


def test_it_ends_with_its_exit_code_as_a_program(tmp_path: Path) -> None:
    """Without torch in its own process: those that it starts import it."""
    (tmp_path / "train.py").write_text(SOUND)
    command = [sys.executable, "-m", "holdfast", "audit", "train.py:training", "--steps-before", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("train.py:training resumes exactly\n")
