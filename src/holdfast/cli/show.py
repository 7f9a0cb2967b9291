"""``holdfast show``: what a checkpoint holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli import output

if TYPE_CHECKING:
    from rich.tree import Tree

    from holdfast.checkpoint import Checkpoint, TensorInfo
    from holdfast.format.records import FileRecord

_LONGEST_VALUE = 60
_MOST_LINES = 2000
_MOST_FILES = 12
_SHARD_NUMBER = re.compile(r"-[0-9]{5}-(?=of-[0-9]{5}\.)", re.ASCII)


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds: its state with shapes and types, its lineage, and what it was saved with."""
    with output.clear_errors():
        found = output.one_checkpoint(checkpoint)
        if as_json:
            output.print_json(_as_json(found))
        else:
            _print(found)


def _as_json(found: Checkpoint) -> dict[str, Any]:
    return {
        **output.summary(found),
        "environment": output.AsItIs(found.environment),
        "config": found.config,
        "origin": found.loop.get("origin"),
        "files": {name: record.bytes for name, record in found.manifest.files.items()},
        "tensors": {
            name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "bytes": info.nbytes,
                "alias_of": info.alias_of,
                "parts": info.parts,
                "files": info.files,
            }
            for name, info in found.tensors.items()
        },
        "state": {
            entry: output.AsItIs(node) for entry, node in found.manifest.state.items() if not entry.startswith("_")
        },
    }


def _print(found: Checkpoint) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.tree import Tree

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(found):
        facts.add_row(f"[bold]{name}[/bold]", escape(output.plain(value)))
    tree = Tree("[bold]state[/bold]")
    grower = _Grower(found.tensors)
    for entry, value in found.state_tree().items():
        own = found.manifest.tensors[entry].values()
        total = output.size(sum(record.nbytes for record in own))
        label = f"[bold]{escape(output.plain(entry))}[/bold]" + (f"  {len(own)} tensors, {total}" if own else "")
        grower.grow(tree, label, value, entry)
    if found.config is not None:
        grower.grow(tree, "[bold]config[/bold]", found.config, "config")
    console = output.console()
    console.print(facts)
    console.print(tree)
    if grower.left <= 0:
        console.print(f"This is the beginning of it, {_MOST_LINES} lines; --json shows all.")


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
    if isinstance(origin, Mapping):
        yield "began with", "{} (step {} of run {})".format(*map(origin.get, ("checkpoint_id", "step", "run_id")))
    yield "environment", "  ".join(f"{name}={value}" for name, value in found.environment.items() if value is not None)
    yield "files", "  ".join(_files(found.files))


def _files(files: Mapping[str, FileRecord]) -> Iterator[str]:
    """The files with their sizes; those of an entry together where there are many."""
    if len(files) <= _MOST_FILES:
        yield from (f"{name} ({output.size(record.bytes)})" for name, record in files.items())
        return
    groups: dict[str, list[int]] = {}
    for name, record in files.items():
        groups.setdefault(_SHARD_NUMBER.sub("-*-", name), []).append(record.bytes)
    for name, sizes in groups.items():
        count = f"{len(sizes)} files, " if len(sizes) > 1 else ""
        yield f"{name} ({count}{output.size(sum(sizes))})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _parent(found: Checkpoint) -> str:
    """The parent's id, and where it stands if it stands in the same run."""
    from holdfast.run import Run

    if found.parent is None:
        return "none: saved by a process that started anew"
    for sibling in Run(Path(found.path).parent):
        if sibling.checkpoint_id == found.parent:
            return f"{found.parent} ({sibling.name})"
    return found.parent


class _Grower:
    """Draws values as a tree, up to a number of lines."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.left = _MOST_LINES
        self._tensors = tensors

    def grow(self, tree: Tree, label: str, value: Any, entry: str) -> None:
        """Add a value that stands under ``label``."""
        from rich.markup import escape

        self.left -= 1
        if self.left <= 0:
            return
        branch = tree.add(label)
        if not _is_nested(value):
            branch.add(self._leaf(value, entry))
            return
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            name = escape(output.plain(key) if isinstance(key, str) else output.plain_repr(key))
            if _is_nested(item):
                self.grow(branch, name, item, entry)
            elif self.left > 0:
                branch.add(f"{name}: {self._leaf(item, entry)}")
                self.left -= 1
            if self.left <= 0:
                return

    def _leaf(self, value: Any, entry: str) -> str:
        from rich.markup import escape

        from holdfast.format.tree import IN_FILES, Opaque

        if isinstance(value, Opaque) and value.tag in IN_FILES:
            name = value.body if isinstance(value.body, str) else value.body[0]
            info = self._tensors.get(f"{entry}/{name}")
            if info is not None:
                tied = f" = {info.alias_of}" if info.alias_of else ""
                cut = f" in {info.parts} parts, {_count(info.files, 'file')}" if info.parts > 1 else ""
                return f"[cyan]{info.dtype} {list(info.shape)}[/cyan]{cut}{escape(output.plain(tied))}"
        text = output.plain_repr(value)
        return escape(text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}...")


def _is_nested(value: Any) -> bool:
    """Whether a value takes more than one line: a list of numbers does not."""
    from holdfast.format.tree import Opaque

    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, (list, tuple)) and any(isinstance(part, (Mapping, list, tuple, Opaque)) for part in value)
