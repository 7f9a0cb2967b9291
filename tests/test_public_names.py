"""The public names: which there are, and what each owes its reader."""

from __future__ import annotations

import builtins
import importlib.metadata
import inspect
import subprocess
import sys
from typing import Any

import pytest

import holdfast
from holdfast import audit, data, errors, notices

FUNCTIONS_AND_CLASSES = [
    "Checkpoint",
    "Checkpointer",
    "Every",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Preempted",
    "Preemption",
    "RestoreReport",
    "Resume",
    "Run",
    "SaveHandle",
    "SaveReport",
    "load",
    "open",
    "register_codec",
    "restore",
    "save",
]
MODULES = {
    "audit": audit.__all__,
    "classic": ["load_checkpoint", "save_checkpoint", "save_rotating_checkpoint"],
    "data": data.__all__,
    "errors": errors.__all__,
    "notices": notices.__all__,
}
PUBLIC_ERRORS = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


def test_the_public_names_are_these() -> None:
    """A name is added or taken away on purpose, here and in the changelog."""
    assert sorted(holdfast.__all__) == sorted([*FUNCTIONS_AND_CLASSES, *MODULES, "__version__"])


def test_a_star_import_brings_every_name() -> None:
    """``from holdfast import *`` works, although the names are loaded lazily."""
    names: dict[str, Any] = {}
    exec("from holdfast import *", names)  # the only place where a star import of all names can stand

    assert set(holdfast.__all__) - set(names) == set()


def test_dir_tells_every_name() -> None:
    """Completion finds names that are not loaded yet."""
    assert set(holdfast.__all__) - set(dir(holdfast)) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as it does in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'Checkpoiner'"):
        holdfast.Checkpoiner  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_submodules_need_no_import_of_their_own(name: str) -> None:
    """After ``import holdfast``, ``holdfast.errors`` and ``holdfast.classic`` are there."""
    code = f"import holdfast; print(holdfast.{name}.__name__)"

    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert printed == f"holdfast.{name}\n"


def test_the_version_is_that_of_the_distribution() -> None:
    """There is one version, and it is a string."""
    assert holdfast.__version__ == importlib.metadata.version("holdfast")


def test_types_are_published() -> None:
    """Type checkers read the annotations of the installed package."""
    files = importlib.metadata.files("holdfast")

    assert files is not None
    assert "holdfast/py.typed" in {str(file) for file in files}


@pytest.mark.parametrize("name", FUNCTIONS_AND_CLASSES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    """``help(holdfast.save)`` says something, and so does each public method; none is inherited by chance."""
    value = getattr(holdfast, name)
    members = vars(value).items() if inspect.isclass(value) else ()
    public = [(key, member) for key, member in members if not key.startswith("_") and is_documented_by_itself(member)]

    without = [key for key, member in [(name, value), *public] if not (member.__doc__ or "").strip()]

    assert without == []


@pytest.mark.parametrize(("module", "names"), MODULES.items(), ids=MODULES)
def test_every_public_name_of_a_submodule_has_a_docstring(module: str, names: list[str]) -> None:
    """The same holds for what the submodules publish."""
    published = getattr(holdfast, module)
    documented = [(module, published), *((name, getattr(published, name)) for name in names)]

    assert [name for name, value in documented if not (value.__doc__ or "").strip()] == []


def is_documented_by_itself(member: object) -> bool:
    """Whether a member of a class is a method or property, and not data, which the class documents."""
    return inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)


@pytest.mark.parametrize("error", PUBLIC_ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_a_holdfast_error_and_a_builtin(error: type[Exception]) -> None:
    """Code that knows nothing of Holdfast can catch what it raises; only the root is no particular builtin."""
    natural = [base for base in error.__mro__ if is_particular_builtin(base)]

    assert issubclass(error, errors.HoldfastError)
    assert bool(natural) == (error is not errors.HoldfastError)


def is_particular_builtin(error: type) -> bool:
    """Whether a class is one of Python's own errors, and says more than `Exception`."""
    return vars(builtins).get(error.__name__) is error and error not in (Exception, BaseException, object)


@pytest.mark.parametrize("error", PUBLIC_ERRORS, ids=lambda error: error.__name__)
def test_every_error_says_where(error: type[errors.HoldfastError]) -> None:
    """Each carries its message and ``path``, ``step`` and ``key``, which are None where they mean nothing."""
    bare, full = error("what"), error("what", path="runs/a", step=3, key="model.weight")

    assert (str(bare), bare.path, bare.step, bare.key) == ("what", None, None, None)
    assert (str(full), full.path, full.step, full.key) == ("what", "runs/a", 3, "model.weight")


def test_every_error_class_is_published() -> None:
    """No error is raised that a user could not name."""
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }

    assert defined == {error.__name__ for error in PUBLIC_ERRORS}
