"""Finding a function again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.audit import where
from holdfast.audit.records import Where
from holdfast.errors import UsageError


def here() -> str:
    """At the top level."""
    return "here"


class Trainings:
    """A class that holds one."""

    @staticmethod
    def inside() -> str:
        """In a class."""
        return "inside"


@pytest.fixture(autouse=True)
def untouched_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is forgotten after it."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("function", [here, Trainings.inside], ids=["function", "in a class"])
def test_a_function_is_found_where_it_says(function: Callable[[], str]) -> None:
    """By the file of its module."""
    place = where.of(function)

    assert (place.function, place.file) == (function.__qualname__, __file__)
    assert where.load(place)() == function()


def test_a_module_is_imported_by_its_name_where_that_gives_its_file(tmp_path: Path) -> None:
    """So that relative imports work, and classes have the names by which others know them."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("ANSWER = 'by name'")
    (package / "training.py").write_text("from .parts import ANSWER\ndef training(): return ANSWER, __name__")
    place = Where("training", "package.training", str(package / "training.py"), (str(tmp_path),))

    assert where.load(place)() == ("by name", "package.training")


def test_a_file_is_found_with_its_neighbours(tmp_path: Path) -> None:
    """As when it is run: its directory is searched, and it is not ``__main__``."""
    (tmp_path / "neighbour.py").write_text("ANSWER = 'next door'")
    script = tmp_path / "my-train.py"
    script.write_text("from neighbour import ANSWER\nassert __name__ != '__main__'\ndef training(): return ANSWER")

    assert where.load(where.parse(f"{script}:training"))() == "next door"


def test_a_file_may_be_called_like_a_module(tmp_path: Path) -> None:
    """It does not take the place of the other, and the other not its."""
    script = tmp_path / "random.py"
    script.write_text("def training(): return 'mine'")

    assert where.load(where.parse(f"{script}:training"))() == "mine"
    assert hasattr(sys.modules["random"], "getstate")


def test_a_module_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``train:training`` for train.py here."""
    (tmp_path / "train_here.py").write_text("def training(): return 'here'")
    monkeypatch.chdir(tmp_path)

    assert where.load(where.parse("train_here:training"))() == "here"


@pytest.mark.parametrize("text", ["train.py", "train.py:", ":training", "train.py:two words", ""])
def test_a_place_that_says_nothing(text: str) -> None:
    """The error shows what is expected."""
    with pytest.raises(UsageError, match=r"such as train\.py:training"):
        where.parse(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Refused at once, before an interpreter is started."""
    with pytest.raises(UsageError, match="is no file"):
        where.parse(f"{tmp_path}/train.py:training")


def test_a_module_that_is_not_there() -> None:
    """The error says what to give instead."""
    with pytest.raises(UsageError, match=r"there is no module nowhere.*path/to/train\.py:FUNCTION"):
        where.load(Where("training", module="nowhere.train"))


def test_a_module_that_imports_one_that_is_not_there(tmp_path: Path) -> None:
    """That is the user's own error, and stays it."""
    (tmp_path / "imports_nothing.py").write_text("import nowhere_at_all")

    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        where.load(Where("training", module="imports_nothing", search=(str(tmp_path),)))


def nested() -> Callable[[], Any]:
    """A function that another process cannot reach."""

    def training() -> None:
        pass

    return training


def renamed() -> None:
    """Is not found under its name."""


renamed.__qualname__ = "here"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda: None, "a lambda has no name"),
        (nested(), "is defined inside a function"),
        (functools.partial(here), "found a partial without a name"),
        (renamed, "has something else under the name here"),
    ],
    ids=["lambda", "nested", "partial", "renamed"],
)
def test_what_no_other_process_can_find(function: Callable[[], Any], why: str) -> None:
    """The error says why, and what to do."""
    with pytest.raises(UsageError, match=f"{why}.*define it with def, at the top level of a module"):
        where.of(function)
