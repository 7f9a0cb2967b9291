"""Finding a function again in another process: by the name of its module, or by the file it stands in."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from holdfast.audit.records import Where
from holdfast.errors import UsageError

_WAY_OUT = (
    "Every part of an audit runs in a new process, which has to find the function by its name: "
    "define it with def, at the top level of a module."
)


def parse(text: str) -> Where:
    """What ``train.py:training`` or ``package.module:training`` means.

    Raises:
        UsageError: it is neither, or the file is not there.
    """
    place, _, function = text.rpartition(":")
    if not place or not all(part.isidentifier() for part in function.split(".")):
        raise UsageError(
            f"expected FILE.py:FUNCTION or MODULE:FUNCTION, such as train.py:training, found {text!r}.", key=text
        )
    here = os.getcwd()
    if place.endswith(".py") or os.sep in place:
        file = os.path.abspath(place)
        if not os.path.isfile(file):
            raise UsageError(f"{place} is no file; expected one that defines {function}().", path=place)
        return Where(function, file=file, search=(os.path.dirname(file), here))
    return Where(function, module=place, search=(here,))


def of(function: Callable[..., Any]) -> Where:
    """Where ``function`` is defined.

    Raises:
        UsageError: another process could not find it there; it says why.
    """
    name = getattr(function, "__qualname__", "")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if not name or module is None:
        raise UsageError(f"expected a function, found a {type(function).__qualname__} without a name. {_WAY_OUT}")
    if "<lambda>" in name:
        raise UsageError(f"a lambda has no name that another process could find. {_WAY_OUT}")
    if "<locals>" in name:
        raise UsageError(f"{name} is defined inside a function. {_WAY_OUT}")
    if _attribute(module, name) is not function:
        raise UsageError(f"{module.__name__} has something else under the name {name}. {_WAY_OUT}")
    file = getattr(module, "__file__", None)
    if file is None and module.__name__ == "__main__":
        raise UsageError(f"{name} is defined in an interactive session. {_WAY_OUT}")
    file = os.path.abspath(file) if file else ""
    own = (os.path.dirname(file), os.getcwd()) if file else (os.getcwd(),)
    search = (*own, *(entry for entry in sys.path if entry))
    return Where(name, "" if module.__name__ == "__main__" else module.__name__, file, search)


def load(where: Where) -> Callable[[], Any]:
    """Import the function, in the process that is to run it. Its module is never run as ``__main__``.

    Raises:
        UsageError: it is not there, or is no function.
    """
    known = set(sys.path)
    sys.path[:0] = [entry for entry in dict.fromkeys(where.search) if entry not in known]
    found = _attribute(_module(where), where.function)
    if found is None:
        raise UsageError(f"{where} is not there: the module has no {where.function}.", key=where.function)
    if not callable(found):
        raise UsageError(f"{where}: expected a function, found a {type(found).__qualname__}.", key=where.function)
    return found  # type: ignore[no-any-return]  # what it returns is checked when it is called


def _module(where: Where) -> ModuleType:
    if not where.file:
        return _by_name(where.module)
    if where.module and _stands_in(where.module, where.file):
        return importlib.import_module(where.module)
    return _by_file(where.module, where.file)


def _by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise UsageError(
            f"there is no module {error.name}, neither here nor installed; "
            f"give the file instead: path/to/{name.rpartition('.')[2]}.py:FUNCTION.",
            key=name,
        ) from error


def _stands_in(name: str, file: str) -> bool:
    """Whether importing ``name`` gives the module in ``file``: test runners load files under names of their own."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)


def _by_file(name: str, file: str) -> ModuleType:
    name = name or os.path.splitext(os.path.basename(file))[0]
    if name in sys.modules or not name.replace(".", "_").isidentifier():
        name = f"_audited_{abs(hash(file))}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is no Python module.", path=file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # so that loaders' workers find its classes
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, qualified_name: str) -> Any:
    found: Any = module
    for part in qualified_name.split("."):
        found = getattr(found, part, None)
    return found
