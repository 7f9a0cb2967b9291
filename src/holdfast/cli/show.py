"""``holdfast show``: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli import output

if TYPE_CHECKING:
    from rich.tree import Tree

    from holdfast.checkpoint import Checkpoint, TensorInfo

_LONGEST_VALUE = 60


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds: its state with shapes and types, its lineage, and what it was saved with."""
    with output.clear_errors():
        found = _open(checkpoint)
        if as_json:
            output.print_json(_as_json(found))
        else:
            _print(found)


def _open(path: Path) -> Checkpoint:
    from holdfast.checkpoint import open as open_checkpoint
    from holdfast.errors import CheckpointNotFoundError
    from holdfast.run import Run

    try:
        return open_checkpoint(path)
    except CheckpointNotFoundError:
        newest = Run(path).latest() if path.is_dir() else None
        if newest is None:
            raise
        return newest


def _as_json(found: Checkpoint) -> dict[str, Any]:
    return {
        **output.summary(found),
        "environment": found.environment,
        "config": found.config,
        "origin": found.loop.get("origin"),
        "files": {name: record.bytes for name, record in found.manifest.files.items()},
        "tensors": {
            name: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes, "alias_of": info.alias_of}
            for name, info in found.tensors.items()
        },
        "state": {entry: node for entry, node in found.manifest.state.items() if not entry.startswith("_")},
    }


def _print(found: Checkpoint) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.tree import Tree

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(found):
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    tree = Tree("[bold]state[/bold]")
    tensors = found.tensors
    for entry, value in found.state_tree().items():
        own = [info for name, info in tensors.items() if name.startswith(f"{entry}/") and info.alias_of is None]
        total = output.size(sum(info.nbytes for info in own))
        branch = tree.add(f"[bold]{escape(entry)}[/bold]" + (f"  {len(own)} tensors, {total}" if own else ""))
        _grow(branch, value, entry, tensors)
    if found.config is not None:
        _grow(tree.add("[bold]config[/bold]"), found.config, "config", {})
    console = output.console()
    console.print(facts)
    console.print(tree)


def _facts(found: Checkpoint) -> Iterator[tuple[str, str]]:
    yield "checkpoint", found.path
    yield "step, epoch", f"{found.step}, {found.epoch}"
    if found.metrics:
        yield "metrics", output.metrics(found.metrics)
    yield "saved", f"{found.created_at.isoformat(timespec='seconds')} ({output.age(found.created_at)} ago)"
    yield "reason", found.reason
    if found.pinned:
        yield "pinned", "yes"
    if found.tags:
        yield "tags", ", ".join(found.tags)
    yield "id", found.checkpoint_id
    yield "run", found.run_id
    yield "parent", _parent(found)
    origin = found.loop.get("origin")
    if origin is not None:
        yield "began with", f"{origin['checkpoint_id']} (step {origin['step']} of run {origin['run_id']})"
    yield "environment", "  ".join(f"{name}={value}" for name, value in found.environment.items() if value is not None)
    files = found.manifest.files
    yield "files", "  ".join(f"{name} ({output.size(record.bytes)})" for name, record in files.items())


def _parent(found: Checkpoint) -> str:
    """The parent's id, and where it stands if it stands in the same run."""
    from holdfast.run import Run

    if found.parent is None:
        return "none: saved by a process that started anew"
    for sibling in Run(Path(found.path).parent):
        if sibling.checkpoint_id == found.parent:
            return f"{found.parent} ({sibling.name})"
    return found.parent


def _grow(branch: Tree, value: Any, entry: str, tensors: Mapping[str, TensorInfo]) -> None:
    from rich.markup import escape

    if not _is_nested(value):
        branch.add(_leaf(value, entry, tensors))
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if _is_nested(item):
            _grow(branch.add(escape(str(key))), item, entry, tensors)
        else:
            branch.add(f"{escape(str(key))}: {_leaf(item, entry, tensors)}")


def _is_nested(value: Any) -> bool:
    """Whether a value takes more than one line: a list of numbers does not."""
    from holdfast.format.tree import Opaque

    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(isinstance(part, (Mapping, list, tuple, Opaque)) for part in value)


def _leaf(value: Any, entry: str, tensors: Mapping[str, TensorInfo]) -> str:
    from rich.markup import escape

    from holdfast.format.tree import Opaque

    if isinstance(value, Opaque) and value.tag in ("$tensor", "$ndarray"):
        name = value.body if isinstance(value.body, str) else value.body[0]
        info = tensors[f"{entry}/{name}"]
        tied = f" = {info.alias_of}" if info.alias_of else ""
        return f"[cyan]{info.dtype} {list(info.shape)}[/cyan]{escape(tied)}"
    text = repr(value)
    return escape(text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}...")
