"""The public names, and the promises that hold for all of them."""

from __future__ import annotations

import inspect

import pytest

import holdfast
from holdfast import errors

NAMES = [
    "Checkpoint",
    "Checkpointer",
    "Every",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "RestoreReport",
    "Run",
    "SaveHandle",
    "__version__",
    "classic",
    "errors",
    "load",
    "open",
    "register_codec",
    "restore",
    "save",
]


def test_the_public_names_are_these() -> None:
    """A name that comes or goes is a decision, taken here."""
    assert sorted(holdfast.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_there_and_says_what_it_is(name: str) -> None:
    """Each name can be used and has a docstring."""
    value = getattr(holdfast, name)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_what_is_not_there_is_an_attribute_error() -> None:
    """The lazy loading does not hide a misspelt name."""
    with pytest.raises(AttributeError, match="has no attribute 'Chekpoint'"):
        holdfast.Chekpoint  # noqa: B018 - the access is the test


def test_each_error_is_a_holdfast_error_and_a_builtin() -> None:
    """Whoever knows nothing of Holdfast can catch what it raises."""
    classes = [value for name in errors.__all__ if inspect.isclass(value := getattr(errors, name))]
    exceptions = [kind for kind in classes if issubclass(kind, BaseException) and kind is not errors.HoldfastError]
    assert exceptions
    for kind in exceptions:
        assert issubclass(kind, errors.HoldfastError)
        assert any(base.__module__ == "builtins" and base not in (Exception, BaseException, object) for base in kind.__mro__)


def test_each_error_carries_path_step_and_key() -> None:
    """The attributes exist on each error, None where they mean nothing, and the message is the text."""
    error = errors.StorageError("full", path="runs/a", step=3, key="k")
    assert (str(error), error.path, error.step, error.key) == ("full", "runs/a", 3, "k")
    bare = errors.MissingMetricError("no metric")
    assert (str(bare), bare.path, bare.step, bare.key) == ("no metric", None, None, None)
