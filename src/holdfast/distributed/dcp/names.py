"""DCP's flat names and the entries of a checkpoint: which is where.

DCP flattens a nested state dict: ``{"model": {"fc.weight": w}}`` becomes ``model.fc.weight``, and its planner data says
``("model", "fc.weight")``. Where a value goes depends on its own path alone, for each rank knows only its own values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from holdfast.errors import UsageError
from holdfast.format import tree
from holdfast.format.names import check_entry_names, is_entry_name

LOOSE_ENTRY = "state_dict"
"""The entry of what has none of its own, such as the tensors of ``dcp.save(model.state_dict())``."""
DCP_ENTRY = "_dcp"
"""What DCP's names cannot be told from the trees of the other entries."""

Path = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value of a state dict stands in a checkpoint.

    Attributes:
        entry: the entry.
        inner: the path within the entry's tree; empty for all of it.
        name: the tensor's name in the entry.
    """

    entry: str
    inner: Path
    name: str


def place_of(path: Path, is_tensor: bool) -> Place:
    """The place of the value at ``path`` of a state dict."""
    first = path[0]
    own = isinstance(first, str) and first != LOOSE_ENTRY and _may_be_entry(first)
    if own and (len(path) > 1 or not (is_tensor or "." in str(first))):
        return Place(str(first), path[1:], _name(path[1:]) if len(path) > 1 else str(first))
    return Place(LOOSE_ENTRY, path, _name(path))


def _may_be_entry(name: str) -> bool:
    if not is_entry_name(name):
        return False
    try:
        check_entry_names([name])
    except UsageError:
        return False
    return True


def _name(path: Path) -> str:
    name = ".".join(map(str, path))
    return f"{name}#2" if name == "__metadata__" else name  # safetensors' own


def root_of(entry: str, by_dcp: bool) -> Path:
    """The path in a state dict of all of ``entry``."""
    return () if by_dcp and entry == LOOSE_ENTRY else (entry,)


def paths_of(planner_data: Any) -> Mapping[str, Path]:
    """The path of each flat name, where planner data is what DCP's own planners make; otherwise nothing."""
    if isinstance(planner_data, Mapping) and all(
        isinstance(name, str) and isinstance(path, tuple) and path for name, path in planner_data.items()
    ):
        return planner_data
    return {}


# ----------------------------------------------------------------------------------------------------- nested, and back


def nest(items: Iterable[tuple[Path, Any]], what: str) -> Any:
    """Dictionaries and lists of values, by the path of each.

    Raises:
        UsageError: a value stands where another path says that there are more below it.
    """
    root: list[Any] = [_ABSENT]
    for path, value in items:
        holder: Any = root
        place: str | int = 0
        for key in path:
            holder = _container(holder, place, key, what)
            place = key
        _extend(holder, place)
        if _get(holder, place) is not _ABSENT:
            raise _conflict(what, path)
        holder[place] = value
    return _without_holes(root[0])


def _container(holder: Any, place: str | int, key: str | int, what: str) -> Any:
    """What is at ``place``, made where it is not yet, to hold ``key``."""
    kind = list if isinstance(key, int) else dict
    _extend(holder, place)
    found = _get(holder, place)
    if found is _ABSENT:
        found = holder[place] = kind()
    if type(found) is not kind:
        raise _conflict(what, (place, key))
    return found


def _extend(holder: Any, place: str | int) -> None:
    if isinstance(holder, list) and isinstance(place, int):
        holder.extend([_ABSENT] * (place + 1 - len(holder)))


def _get(holder: Any, place: Any) -> Any:
    return holder[place] if isinstance(holder, list) else holder.get(place, _ABSENT)


def _without_holes(value: Any) -> Any:
    if type(value) is dict:
        return {key: _without_holes(item) for key, item in value.items()}
    if type(value) is list:
        return [_without_holes(item) for item in value]
    return None if value is _ABSENT else value


def _conflict(what: str, path: Path) -> UsageError:
    return UsageError(
        f"{what}: {'.'.join(map(str, path))} is a value here and holds values there; give each a name of its own.",
        key=what,
    )


_ABSENT = object()


def flattened(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The values in a typed tree, as DCP's ``flatten_state_dict`` finds them in what the tree stands for.

    A list is looked into only where it holds tensors or dictionaries.
    """
    items = _items(node)
    if items is not None:
        for key, item in items:
            yield from flattened(item, (*path, key))
    elif isinstance(node, list) and not _is_value(node):
        for index, item in enumerate(node):
            yield from flattened(item, (*path, index))
    else:
        yield path, node


def is_tensor_node(node: Any) -> bool:
    """Whether a node of a typed tree stands for a tensor."""
    return isinstance(node, dict) and len(node) == 1 and "$tensor" in node


def _is_value(node: Any) -> bool:
    """Whether DCP takes a node for one value."""
    if isinstance(node, list):
        return not any(is_tensor_node(item) or not _is_value(item) for item in node)
    return _items(node) is None


def _items(node: Any) -> list[tuple[str, Any]] | None:
    """Keys, as DCP calls them, and values of a node that stands for a dictionary; None for any other."""
    if not isinstance(node, dict):
        return None
    tag, body = next(iter(node.items())) if len(node) == 1 else ("", [])
    if tag in ("$dict", "$ordereddict", "$counter"):
        pairs = body
    elif tag == "$defaultdict":
        pairs = body[1]
    elif tag.startswith("$"):
        return None
    else:
        return list(node.items())
    return [(str(tree.decode(key, tree.OpaqueLeaves())), item) for key, item in pairs]


def node_at(node: Any, inner: Path) -> Any:
    """The node at a path within a tree; ValueError where there is none."""
    for key in inner:
        items = _items(node)
        if items is not None:
            found = dict(items).get(str(key), _ABSENT)
        else:
            within = isinstance(node, list) and isinstance(key, int) and 0 <= key < len(node)
            found = node[key] if within else _ABSENT
        if found is _ABSENT:
            raise ValueError(f"the tree has nothing at {'.'.join(map(str, inner))}")
        node = found
    return node
