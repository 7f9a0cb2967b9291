"""The command line as a whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main

import holdfast
from holdfast import Run
from holdfast.cli import app
from holdfast.format import envelope
from holdfast.format.names import CheckpointName

Command = Callable[..., Any]

WITHOUT_TORCH = """
import sys
from holdfast.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print(sorted({"torch", "numpy", "rich.table", "rich.tree"} & set(sys.modules)), file=sys.stderr)
"""


def modules_after(*arguments: object) -> list[str]:
    """Which heavy modules a command loads, in a fresh process."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = msgspec.json.decode(done.stderr.splitlines()[-1].replace("'", '"'))
    return found


@pytest.mark.parametrize(
    "arguments", [["ls"], ["ls", "--json"], ["show"], ["show", "--json"], ["verify"], ["prune", "--keep-last", "3"]]
)
def test_no_command_needs_torch(run: Run, arguments: list[str]) -> None:
    """Looking at checkpoints leaves torch unimported."""
    assert "torch" not in modules_after(arguments[0], run.path, *arguments[1:])


def test_help_needs_next_to_nothing() -> None:
    """Neither torch nor numpy: it answers at once."""
    assert not {"torch", "numpy"} & set(modules_after("--version"))
    help_text = subprocess.run([sys.executable, "-m", "holdfast", "--help"], capture_output=True, text=True, check=True)
    assert all(name in help_text.stdout for name in ("ls", "show", "verify", "prune"))


def test_version(holdfast_cli: Command) -> None:
    """Of the package."""
    assert holdfast_cli("--version").out == f"holdfast {holdfast.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["ls"], ["ls", "--nonsense", "x"]])
def test_used_wrongly(holdfast_cli: Command, arguments: list[str]) -> None:
    """Exit code 2, and how it is used."""
    answer = holdfast_cli(*arguments)
    assert answer.code == 2
    assert "Usage" in answer.out + answer.err


def test_exit_codes_of_the_program(run: Run) -> None:
    """0 done, 1 found what it looks for, 2 used wrongly: also as a program, without a traceback."""
    file = Path(run[30].path, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    codes = {}
    for name, arguments in {
        "done": ["ls", run.path],
        "found": ["verify", run.path],
        "used wrongly": ["ls", run.path + "x"],
    }.items():
        command = [sys.executable, "-m", "holdfast", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        codes[name] = done.returncode
        assert "Traceback" not in done.stderr
    assert codes == {"done": 0, "found": 1, "used wrongly": 2}


def test_a_long_run(tmp_path: Path, holdfast_cli: Command) -> None:
    """A thousand checkpoints are listed in their order, none twice and none left out."""
    first = Run(tmp_path).save({"x": 1}, step=0)
    manifest = msgspec.json.decode(envelope.unseal("manifest", Path(first.path, "manifest.json").read_bytes()))
    for step in range(1, 1000):
        copy = tmp_path / str(CheckpointName(step))
        shutil.copytree(first.path, copy)
        changed = {**manifest, "step": step, "checkpoint_id": f"{step:032x}"}
        (copy / "manifest.json").write_bytes(envelope.seal("manifest", msgspec.json.encode(changed)))
    listed = holdfast_cli("ls", tmp_path, "--json").json["checkpoints"]
    assert [(item["step"], item["broken"]) for item in listed] == [(step, None) for step in range(1000)]


def test_the_documentation_names_every_command_and_option() -> None:
    """docs/cli.md has all of them."""
    page = Path(__file__).parents[2].joinpath("docs", "cli.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    missing = []
    for name, command in group.commands.items():
        missing += [name] if f"## holdfast {name}" not in page else []
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        missing += [f"{name} {option}" for option in options if f"`{option}" not in page]
    assert missing == []
