"""What a ``step`` function reaches and its state does not hold: variables, attributes, buffers, gradients, iterators.

A place is where such a thing lies. It is looked at once, between the two halves of a training, and it can be given
another value: that is how an experiment tells a cause from a harmless difference.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from holdfast.audit.digests import combined, leaves_of, plain_leaf
from holdfast.audit.records import Leaf, Thing
from holdfast.state.capture import capture
from holdfast.state.kinds import Kind, kind_of, live_objects
from holdfast.state.rng import GENERATOR_TYPES

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic)
_CONTAINERS = (list, dict, tuple, set, frozenset, deque)
_DEEPEST = 4
_MOST_PARTS = 64
_INSTALLED = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib", "platlib"))
_LIBRARIES = frozenset({"holdfast", "torch"})  # wherever they lie
_OF_MODULES = frozenset(vars(torch.nn.Module()))  # what every module has: hooks, parameters, the mode


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lies that is not saved.

    Attributes:
        name: as the user's code calls it.
        kind: see :class:`holdfast.audit.records.Thing`.
        value: what lies there now.
        put: puts another value there; None where nothing but the value itself can be changed.
    """

    name: str
    kind: str
    value: Any
    put: Callable[[Any], None] | None = None


def describe(place: Place) -> Thing | None:
    """What lies at a place, with its digest; None when there is no telling."""
    if place.kind == "iterator":
        return Thing(place.name, place.kind, _iterator_leaf(place.value), savable=False)
    if place.kind == "mode":
        return Thing(place.name, place.kind, _mode_leaf(place.value), savable=True)
    try:
        leaves = leaves_of(capture({"value": place.value}, generators=False))
    except Exception:  # noqa: BLE001 - from the state_dict() of anything that a step may use
        return None
    return Thing(place.name, place.kind, combined(leaves, _form(place.value)), savable=True)


def places(step: Callable[[], Any], state: Mapping[str, Any]) -> list[Place]:
    """Every place that ``step`` reaches outside ``state``, and those of the state's objects that they do not save."""
    search = _Search(state, (getattr(step, "__module__", None) or type(step).__module__).partition(".")[0])
    search.callable(step)
    found = [*search.found, *_unsaved_parts(state, search)]
    names = Counter[str]()
    numbered = []
    for place in found:  # functions may have variables of the same name
        names[place.name] += 1
        again = names[place.name]
        numbered.append(place if again == 1 else replace(place, name=f"{place.name} #{again}"))
    return numbered


def _form(value: Any) -> str:
    if isinstance(value, _CONTAINERS):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__qualname__


def _mode_leaf(modes: list[bool]) -> Leaf:
    shown = "train()" if all(modes) else "eval()" if not any(modes) else "train() in parts, eval() in others"
    return plain_leaf(modes, "mode", shown)


def _iterator_leaf(value: Any) -> Leaf:
    """How far an iterator has come, as far as it can be seen without taking anything from it."""
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        position: list[object] = [inspect.getgeneratorstate(value), frame and frame.f_lasti]
    else:
        position = [getattr(value, "_num_yielded", None), getattr(value, "__length_hint__", lambda: None)()]
    return plain_leaf(position, type(value).__qualname__)


# ----------------------------------------------------------------------------------------- what the function reaches


@dataclass(slots=True)
class _Search:
    """Follows a function to what it uses: closures, globals, defaults, and the attributes of the user's objects.

    Attributes:
        state: what is saved.
        package: the package of the function, which is the user's own even where it is installed.
        found: the places.
    """

    state: Mapping[str, Any]
    package: str
    found: list[Place] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    _globals: set[tuple[int, str]] = field(default_factory=set)
    _kept: list[Any] = field(default_factory=list)  # an id stays that of one object while the object lives

    def __post_init__(self) -> None:
        for value in _belonging(self.state):
            self._see(value)

    def callable(self, function: Any) -> None:
        """What a function, a method, a partial or a callable object uses."""
        if not self._see(function):
            return
        if isinstance(function, functools.partial):
            for index, argument in enumerate(function.args):
                self.value(f"partial.args[{index}]", argument, None)
            for name, argument in function.keywords.items():
                self.value(name, argument, functools.partial(function.keywords.__setitem__, name))
            self.callable(function.func)
        elif isinstance(function, MethodType):
            self.value("self", function.__self__, None)
            self.callable(function.__func__)
        elif isinstance(function, FunctionType):
            self._function(inspect.unwrap(function))
        elif callable(function):
            self.attributes("step", function)
            self.callable(type(function).__call__)

    def value(
        self, name: str, value: Any, put: Callable[[Any], None] | None, kind: str = "variable", depth: int = 0
    ) -> None:
        """Note ``value`` if it can be looked at, or go on to what it holds."""
        if isinstance(value, _PLAIN):
            self.found.append(Place(name, kind, value, put))
        elif isinstance(value, (FunctionType, MethodType, functools.partial)):
            if self.is_the_users(value):
                self.callable(value)
        elif isinstance(value, (type, ModuleType, BuiltinFunctionType)) or depth > _DEEPEST or not self._see(value):
            return
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            self.found.append(Place(name, kind, value, put))
        elif isinstance(value, _CONTAINERS):
            self._container(name, value, put, kind, depth)
        elif kind_of(value) is not None:
            self.found.append(Place(name, "generator" if isinstance(value, GENERATOR_TYPES) else "object", value, put))
        elif isinstance(value, torch.utils.data.DataLoader):
            self.value(f"{name}.generator", value.generator, None, "attribute", depth + 1)
        elif hasattr(value, "__next__"):
            self.found.append(Place(name, "iterator", value))
        elif self.is_the_users(type(value)):
            self.attributes(name, value, depth)

    def attributes(self, name: str, value: Any, depth: int = 0, skip: frozenset[str] = frozenset()) -> None:
        """Go on to the attributes of an object."""
        for attribute, item in _attributes(value):
            if attribute not in skip:
                put = functools.partial(setattr, value, attribute)
                self.value(f"{name}.{attribute}", item, put, "attribute", depth + 1)

    def is_the_users(self, thing: Any) -> bool:
        """Whether a class, module or function is the user's own, and not a library's."""
        function = thing.func if isinstance(thing, functools.partial) else thing
        name = thing.__name__ if isinstance(thing, ModuleType) else getattr(function, "__module__", None) or ""
        package = name.partition(".")[0]
        if package == self.package or package in _LIBRARIES:
            return package == self.package
        file = getattr(sys.modules.get(name), "__file__", None)
        return file is not None and not os.path.realpath(file).startswith(_INSTALLED)

    def _function(self, function: FunctionType) -> None:
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if not self._see(cell):
                continue
            try:
                self.value(name, cell.cell_contents, functools.partial(setattr, cell, "cell_contents"))
            except ValueError:  # a variable that was not assigned yet
                continue
        defaults = function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        for name, value in [*zip(names, defaults, strict=True), *(function.__kwdefaults__ or {}).items()]:
            self.value(name, value, None)
        used = set(_names(code))
        for name in sorted(used & function.__globals__.keys()):
            if (id(function.__globals__), name) in self._globals:
                continue
            self._globals.add((id(function.__globals__), name))
            value = function.__globals__[name]
            if isinstance(value, ModuleType) and self.is_the_users(value):
                for inner in sorted(used & vars(value).keys()):
                    self.value(f"{name}.{inner}", vars(value)[inner], functools.partial(setattr, value, inner))
            else:
                self.value(name, value, functools.partial(function.__globals__.__setitem__, name))

    def _container(self, name: str, value: Any, put: Callable[[Any], None] | None, kind: str, depth: int) -> None:
        place = Place(name, kind, value, put)
        if describe(place) is not None:
            self.found.append(place)
            return
        if not isinstance(value, (list, dict, tuple)):
            return
        items = list(value.items() if isinstance(value, dict) else enumerate(value))[:_MOST_PARTS]
        for key, item in items:
            store = None if isinstance(value, tuple) else functools.partial(value.__setitem__, key)
            self.value(f"{name}[{key!r}]", item, store, kind, depth + 1)

    def _see(self, value: Any) -> bool:
        """Whether ``value`` was not seen yet."""
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        self._kept.append(value)
        return True


def _names(code: CodeType) -> Iterator[str]:
    """Every global name and attribute that code mentions, that of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


# ---------------------------------------------------------------------------------- what the state's objects leave out


def _belonging(state: Mapping[str, Any]) -> Iterator[Any]:
    """What is saved: the state, its containers, its objects, and their tensors."""
    yield state
    yield from _nested(state)
    for _, value, kind in live_objects(state):
        yield value
        if kind is Kind.MODULE:
            yield from (*value.modules(), *value.parameters(), *value.buffers())
        elif kind is Kind.OPTIMIZER:
            yield from (value.param_groups, value.state)


def _nested(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from _nested(item)
    elif isinstance(value, (list, tuple)):
        yield value
        for item in value:
            yield from _nested(item)
    elif not isinstance(value, _PLAIN):
        yield value


def _unsaved_parts(state: Mapping[str, Any], search: _Search) -> Iterator[Place]:
    before = len(search.found)
    for path, value, kind in live_objects(state):
        if kind is Kind.MODULE:
            yield from _of_module(path, value, search)
        elif kind is Kind.STATEFUL and search.is_the_users(type(value)):
            search.attributes(path, value)
    yield from search.found[before:]


def _of_module(path: str, module: torch.nn.Module, search: _Search) -> Iterator[Place]:
    """Buffers that are not persistent, gradients, modes, and the attributes of the user's own modules."""
    for name, submodule in module.named_modules(prefix=path):
        for buffer in submodule._non_persistent_buffers_set:
            value = submodule._buffers.get(buffer)
            if value is not None:
                yield Place(f"{name}.{buffer}", "buffer", value, functools.partial(setattr, submodule, buffer))
        if search.is_the_users(type(submodule)):
            search.attributes(name, submodule, skip=_OF_MODULES)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    yield Place(f"{path}: gradients", "gradients", gradients, functools.partial(_put_gradients, module))
    modes = [submodule.training for submodule in module.modules()]
    yield Place(f"{path}.training", "mode", modes, functools.partial(_put_modes, module))


def _put_gradients(module: torch.nn.Module, gradients: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _put_modes(module: torch.nn.Module, modes: list[bool]) -> None:
    for submodule, mode in zip(module.modules(), modes, strict=True):
        submodule.training = mode
