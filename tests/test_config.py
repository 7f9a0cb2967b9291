"""What changed in a configuration, by path."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

from holdfast.config import ABSENT, ConfigChange, config_changes, decode_config, encode_config
from holdfast.errors import UnsupportedValueError

NAN = float("nan")
CHANGES: dict[str, tuple[Any, Any, list[tuple[str, Any, Any]]]] = {
    "nothing": ({"lr": 0.1, "sizes": [1, 2]}, {"lr": 0.1, "sizes": [1, 2]}, []),
    "a value": ({"lr": 0.1}, {"lr": 0.2}, [("lr", 0.1, 0.2)]),
    "a type": ({"lr": 1}, {"lr": 1.0}, [("lr", 1, 1.0)]),
    "true is not one": ({"on": 1}, {"on": True}, [("on", 1, True)]),
    "a value inside": ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, [("a.b.c", 1, 2)]),
    "an item": ({"sizes": [1, 2]}, {"sizes": [1, 3]}, [("sizes[1]", 2, 3)]),
    "an item inside": ([{"a": 1}], [{"a": 2}], [("[0].a", 1, 2)]),
    "a length": ({"sizes": [1]}, {"sizes": [1, 2]}, [("sizes", [1], [1, 2])]),
    "more": ({}, {"lr": None}, [("lr", ABSENT, None)]),
    "less": ({"lr": None}, {}, [("lr", None, ABSENT)]),
    "not a number stays one": ({"x": NAN}, {"x": NAN}, []),
    "no mapping": ("fast", "slow", [("config", "fast", "slow")]),
    "another kind of thing": ({"a": {"b": 1}}, {"a": 1}, [("a", {"b": 1}, 1)]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed(name: str) -> None:
    """Each value that is not the same, with both; types count."""
    saved, now, expected = CHANGES[name]

    assert [(change.key, change.saved, change.now) for change in config_changes(saved, now)] == expected


def test_changes_in_words() -> None:
    """As lines of a diff."""
    changes = config_changes({"lr": 0.1, "old": "x"}, {"lr": 0.2, "new": [1]})

    assert list(map(str, changes)) == ["  lr: 0.1 -> 0.2", "- old: 'x'", "+ new: [1]"]


def test_a_configuration_is_what_it_was() -> None:
    """More than JSON can say is saved exactly too."""
    config = {"path": PurePosixPath("a/b"), "betas": (0.9, 0.95), "big": 2**80, "nothing": None, "$x": {1: 2}}

    assert decode_config(encode_config(config)) == config


def test_what_cannot_be_saved() -> None:
    """The error has the path to it."""
    with pytest.raises(UnsupportedValueError, match=r"config\.loss"):
        encode_config({"loss": print})


def test_the_mark_of_what_is_absent() -> None:
    """It is not None, and says what it is."""
    assert (repr(ABSENT), ConfigChange("x", ABSENT, 1).saved is None) == ("absent", False)
