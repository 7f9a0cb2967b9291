"""One training run that nobody kills, and the same run killed again and again: both end with the same bits.

    python examples/demo.py

Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parent
console = Console(highlight=False)


def main() -> int:
    """Show it; returns the exit code."""
    options = parse()
    rng = random.Random(options.seed)
    with working_directory(options.directory) as directory:
        whole, killed = directory / "whole", directory / "killed"

        console.rule("[bold]1. A run that nobody kills")
        status, expected = train(whole, options.epochs)
        if status != 0:
            return fail(f"the uninterrupted run ended with exit status {status}")

        console.rule(f"[bold]2. The same run, killed with SIGKILL {options.kills} times")
        console.print(
            f"At random moments (--seed {options.seed} repeats them), by kill_at.py. Every start is the same command.",
            style="dim",
        )
        for _ in range(options.kills):
            # The batches before all kills together are fewer than the run has, so that each finds something to kill.
            batch = rng.randint(1, expected["steps"] // options.kills)
            status, _ = train(killed, options.epochs, kill_at=batch)
            if status != -signal.SIGKILL:
                return fail(f"expected a kill in batch {batch} after the start, found exit status {status}")
            console.print(f"  [bold red]SIGKILL[/] in batch {batch} after this start")
        status, actual = train(killed, options.epochs)
        if status != 0:
            return fail(f"the resumed run ended with exit status {status}")

        console.rule("[bold]3. What came of it")
        console.print(comparison(expected, actual, options.kills))
        console.print(f"\nWhat lies on disk:\n\n[bold]$ holdfast ls {killed} --best val_loss:min[/]", soft_wrap=True)
        listing = [sys.executable, "-m", "holdfast", "ls", str(killed), "--best", "val_loss:min"]
        listed = subprocess.run(listing, check=False)
        if listed.returncode != 0:
            return fail(f"holdfast ls ended with exit status {listed.returncode}")

    if actual != expected:
        return fail("the killed run is not the run that nobody killed")
    console.print("\n[bold green]Identical, bit for bit.[/]")
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="keep the runs here (default: a temporary directory)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the kills")
    options = parser.parse_args()
    if options.epochs < 1 or options.kills < 1:
        parser.error("--epochs and --kills must be at least 1")
    if options.directory and options.directory.exists() and any(options.directory.iterdir()):
        parser.error(f"--directory {options.directory} is not empty: the demo begins with new runs")
    return options


@contextmanager
def working_directory(directory: Path | None) -> Iterator[Path]:
    """The directory that was asked for, or one that is removed afterwards."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as temporary:
        yield Path(temporary)


def train(run: Path, epochs: int, kill_at: int | None = None) -> tuple[int, dict[str, Any]]:
    """Start the training, show what it prints; its exit status and, if it came to its end, its report."""
    report = run.with_suffix(".json")
    command = ["examples/digits.py", "--run", str(run), "--epochs", str(epochs), "--report", str(report)]
    console.print(f"\n[bold]$ python {' '.join(command[:3])}[/]", soft_wrap=True)
    command[0] = str(EXAMPLES / "digits.py")
    if kill_at is not None:
        command = [str(EXAMPLES / "kill_at.py"), str(kill_at), *command]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            console.print(f"  {line.rstrip()}", markup=False, soft_wrap=True)
    return process.returncode, json.loads(report.read_text()) if process.returncode == 0 else {}


def comparison(expected: dict[str, Any], actual: dict[str, Any], kills: int) -> Table:
    """Both runs side by side."""
    table = Table("", "uninterrupted", f"killed {kills} times", "")

    def row(name: str, one: object, other: object, shown: str = "{}") -> None:
        verdict = "[green]same[/]" if one == other else "[bold red]different[/]"
        table.add_row(name, shown.format(one), shown.format(other), verdict)

    row("optimizer steps", expected["steps"], actual["steps"])
    for name in expected["history"]:
        row(f"final {name}", expected["history"][name][-1], actual["history"][name][-1], "{:.17g}")
    table.add_section()
    for name in expected["digests"]:
        title = "everything" if name == "all" else name
        row(f"digest of {title}", expected["digests"][name], actual["digests"][name], "{:.16}")
    return table


def fail(message: str) -> int:
    """Say what went wrong; returns the exit code."""
    console.print(f"\n[bold red]Failed:[/] {message}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
