"""The configuration that a user records with a run: what changed in it since the checkpoint that is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.format import tree
from holdfast.format.tree import child


class _Absent:
    """Stands for a value that is not there, which None is."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Any = _Absent()


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One value of a configuration that is not what it was.

    Attributes:
        key: the path to it, such as ``optimizer.lr``.
        saved: what it was when the checkpoint was saved; ``ABSENT`` when it was not there.
        now: what it is; ``ABSENT`` when it is gone.
    """

    key: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        if self.saved is ABSENT:
            return f"+ {self.key}: {self.now!r}"
        if self.now is ABSENT:
            return f"- {self.key}: {self.saved!r}"
        return f"  {self.key}: {self.saved!r} -> {self.now!r}"


def encode_config(config: Any) -> Any:
    """``config`` as the manifest holds it.

    Raises:
        UnsupportedValueError: something in it cannot be written exactly; it names the path to it.
    """
    return tree.encode(config, "config", tree.OpaqueLeaves())


def decode_config(encoded: Any) -> Any:
    """The configuration that :func:`encode_config` encoded."""
    return tree.decode(encoded, tree.OpaqueLeaves())


def config_changes(saved: Any, now: Any) -> tuple[ConfigChange, ...]:
    """What is not the same in two configurations, by path; numbers are the same when type and value are."""
    return tuple(_changes("", saved, now))


def _changes(path: str, saved: Any, now: Any) -> Iterator[ConfigChange]:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*saved, *(key for key in now if key not in saved)]:
            where = child(path, key) if path else str(key)
            yield from _changes(where, saved.get(key, ABSENT), now.get(key, ABSENT))
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for index, (old, new) in enumerate(zip(saved, now, strict=True)):
            yield from _changes(f"{path}[{index}]", old, new)
    elif (type(saved) is not type(now) or saved != now) and not _both_nan(saved, now):
        yield ConfigChange(path or "config", saved, now)


def _both_nan(saved: Any, now: Any) -> bool:
    return isinstance(saved, float) and isinstance(now, float) and saved != saved and now != now
