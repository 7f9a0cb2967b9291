"""Values that are no tensors of a plan: to typed trees when they are saved, to DCP's planners when they are loaded."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.format import tree
from holdfast.state.capture import CapturedTensor, capture
from holdfast.state.kinds import kind_of

_CONTAINERS = (list, tuple, set, frozenset, deque)


@dataclass(slots=True)
class EncodedValues:
    """Values of one entry.

    Attributes:
        nodes: of each, its typed tree.
        tensors: those that are within them, by the name that the trees know them by.
        aliases: other names of the same tensors.
    """

    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, CapturedTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def encode_values(entry: str, named: Sequence[tuple[str, Any]], *, whole: bool) -> EncodedValues:
    """Values of ``entry`` by name as typed trees; ``whole`` where there is one, which is all of the entry.

    Raises:
        UnsupportedValueError: one cannot be written exactly; it names the path.
    """
    for name, value in named:
        _refuse_live(value, name if whole else f"{entry}.{name}")
    captured = capture({entry: named[0][1] if whole else dict(named)}, generators=False)[entry]
    if whole:
        nodes = [captured.tree]
    elif "$dict" in captured.tree:
        nodes = [node for _, node in captured.tree["$dict"]]
    else:
        nodes = list(captured.tree.values())
    return EncodedValues(nodes, captured.tensors, captured.aliases)


def _refuse_live(value: Any, path: str) -> None:
    """Refuse objects that have a state: DCP would put what they are saved as in their place when it loads."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_live(item, tree.child(path, key))
    elif isinstance(value, _CONTAINERS):
        for index, item in enumerate(value):
            _refuse_live(item, f"{path}[{index}]")
    elif not isinstance(value, torch.Tensor) and kind_of(value) is not None:
        raise tree.unsupported(
            value,
            path,
            "DCP asks objects for their state only at the top level of the state dict; put its state_dict() here.",
        )


def in_memory(value: Any) -> io.BytesIO:
    """``value`` as DCP's planners take it from a storage reader: they call ``torch.load`` on it.

    It is made here, of a value that was decoded from the typed tree, and never leaves this process: nothing that was
    read from a disk is ever unpickled.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer
