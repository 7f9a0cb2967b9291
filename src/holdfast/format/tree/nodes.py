"""What both directions of the typed tree share: the contract for its leaves, paths, and the limits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.errors import UnsupportedValueError

Json = Any  # None | bool | int | float | str | list[Json] | dict[str, Json]

# Half of Python's default stack serves the deepest tree, in either direction: five frames a level. The rest is the
# caller's, who may load a checkpoint from much deeper in the stack than it was saved from.
MAX_DEPTH = 100
MAX_INT_HEX_DIGITS = 100_000

MAX_EQUAL_HASHES = 64
"""Of the members of a set or the keys of a dictionary. Each is compared with all others of its hash, and whoever
chooses the values can choose them so that there are a hundred thousand; by chance there are never two."""

FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (int, float, complex, bool, str, bytes, list, dict, set, tuple)
}
"""What a defaultdict may make its missing values with."""

IN_FILES = frozenset({"$tensor", "$ndarray"})
"""The tags of leaves whose bytes lie in a data file."""

HASHED_LEAVES = frozenset({"$dtype", "$size", "$device"})
"""The tags of leaves that may be members of sets and keys of dictionaries."""


class LeafEncoder(Protocol):
    """What the tree leaves to its user when it is written: tensors, and the values that only torch knows."""

    def encode(self, value: Any, path: str) -> dict[str, Json] | None:
        """``value`` as a tagged object, or None when it is not one of these leaves."""


class LeafDecoder(Protocol):
    """The same when it is read."""

    def decode(self, tag: str, body: Json) -> Any:
        """The value of a tagged object; KeyError when the tag is not one of these leaves."""

    def for_codec(self) -> LeafDecoder | None:
        """Leaves for the value that a codec is given: its tensors are real ones after :meth:`fill`.

        None where values are only looked at; what a codec would make of one stays :class:`Opaque` then.
        """

    def fill(self) -> None:
        """Read the tensors that ``decode`` gave out."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is not made here: its tag and body, for showing. Neither torch nor a codec is needed, or run."""

    tag: str
    body: Any
    _hash: int | None = field(default=None, repr=False, compare=False)

    def __hash__(self) -> int:
        # A body may be a list, yet what it stands for may be the key of a dictionary. Kept, for within each other
        # there may be fifty of them.
        if self._hash is None:
            object.__setattr__(self, "_hash", hash((self.tag, _fingerprint(self.body))))
        assert self._hash is not None
        return self._hash

    def __repr__(self) -> str:
        shown = self.body
        if self.tag == "$codec":
            name, value = self.body
            shown = f"{name}: {value!r}"
        return f"{self.tag.removeprefix('$')}({shown})"


def _fingerprint(value: Any) -> int:
    """A hash of what may hold lists and dictionaries; equal for equal values."""
    if isinstance(value, Mapping):
        return hash(sum(hash((key, _fingerprint(item))) for key, item in value.items()))
    if isinstance(value, (list, tuple, deque)):
        return hash(tuple(map(_fingerprint, value)))
    if isinstance(value, (set, frozenset)):
        return hash(frozenset(value))
    return hash(bytes(value)) if isinstance(value, bytearray) else hash(value)


def crowded(keys: Sequence[Hashable]) -> bool:
    """Whether so many of ``keys`` have one hash that looking one up would take long."""
    if len(keys) <= MAX_EQUAL_HASHES:
        return False
    return max(Counter(map(hash, keys)).values()) > MAX_EQUAL_HASHES


class OpaqueLeaves:
    """Leaves for looking at a tree without torch: each stays what it is on disk."""

    def encode(self, value: Any, path: str) -> dict[str, Json] | None:
        """Nothing is a leaf when encoding without tensors."""
        return None

    def decode(self, tag: str, body: Json) -> Any:
        """Every unknown tag becomes an :class:`Opaque`."""
        return Opaque(tag, body)

    def for_codec(self) -> None:
        """There are no tensors here."""

    def fill(self) -> None:
        """There is nothing to read."""


def child(path: str, key: object) -> str:
    """The path of the value under ``key`` in the container at ``path``: ``optimizer.param_groups[0].lr``."""
    if isinstance(key, str):
        return f"{path}.{key}" if path else key
    try:
        return f"{path}[{key!r}]"
    except ValueError:  # Python shows no int of more than 4,300 digits
        return f"{path}[{type(key).__name__}]"


def unsupported(value: object, path: str, way_out: str) -> UnsupportedValueError:
    """The error for a value that cannot be written."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return UnsupportedValueError(f"{path}: {name} cannot be saved exactly. {way_out}", key=path)
