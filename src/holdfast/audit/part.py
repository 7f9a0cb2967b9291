"""One part of a training, run and recorded in a process of its own."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.audit import where
from holdfast.audit.conditions import CONDITIONS, operators_named
from holdfast.audit.digests import record
from holdfast.audit.records import Failure, Job, Outcome
from holdfast.audit.surroundings import Place, describe, places
from holdfast.audit.watching import LoaderWatch, waiting_gradients
from holdfast.errors import HoldfastError, UsageError
from holdfast.loading import restore
from holdfast.saving import save
from holdfast.state.forgotten import forgotten
from holdfast.state.kinds import live_objects


def run(job: Job) -> Outcome:
    """Run one part. What goes wrong is in the outcome."""
    part = _Part(job)
    try:
        with CONDITIONS[job.condition](), operators_named(part.outcome.operators), part.loaders.watching():
            _MODES[job.part](part)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is told, with its traceback
        part.outcome.failure = _failure(error, part.doing)
    return part.outcome


class _Part:
    """A training under way.

    Attributes:
        doing: what is being done, in words, for when it fails.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcome = Outcome()
        self.loaders = LoaderWatch()
        self.doing = f"importing {job.where}"
        self._state: Any = {}
        self._step: Any = None

    def build(self) -> None:
        """Import and call the user's function."""
        self.outcome.points.append(record("begun", 0, {}))
        function = where.load(self.job.where)
        self.doing = f"{self.job.where.function}()"
        self._state, self._step = _checked(function(), self.job.where.function)
        self._record("built", 0)

    def steps(self, first: int, last: int, *, recorded: bool = True) -> None:
        """Do the steps from ``first`` to ``last``, inclusive."""
        for number in range(first, last + 1):
            self.doing = f"step {number}"
            self.loaders.step = number
            loss = self._step()
            if recorded:
                self.doing = f"recording step {number}"
                self._record("step", number, loss)
            del loss  # with its graph, as in a loop that goes on
        self.outcome.environment = _environment()

    def save(self) -> None:
        """Save the first half."""
        self.doing = f"holdfast.save after step {self.job.before}"
        with self._with_others(self.job.save_also) as (state, _):
            save(self.job.checkpoint, state, step=self.job.before)

    def restore(self) -> None:
        """Restore what the first half saved."""
        self.doing = "holdfast.restore"
        with self._with_others(self.job.restore_also) as (state, others):
            report = restore(self.job.checkpoint, state, strict=True)
            for entry in self._state:
                if state[entry] is not self._state[entry]:
                    self._state[entry] = state[entry]
            for entry, place in others.items():
                if place.put is not None:
                    place.put(state[entry])
        self.outcome.notes = [*report.notes, *(f"{name}: new to its optimizer" for name in report.fresh)]
        self._record("restored", self.job.before)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Between the halves: look at what is not saved; inside, watch which of the gradients are still used."""
        if not self.job.watch:
            yield
            return
        self.doing = "looking for what is not in the state"
        watched = self.outcome.watched
        found = [describe(place) for place in places(self._step, self._state)]
        watched.things = [thing for thing in found if thing is not None]
        watched.forgotten = forgotten(self._state)
        watched.kinds = {path: type(value).__qualname__ for path, value, kind in live_objects(self._state) if kind}
        with waiting_gradients(self._state, watched.waiting):
            yield

    def loaders_noted(self) -> None:
        """Take down which iterators were made."""
        self.outcome.watched.iterators = self.loaders.made(self._state)

    def _record(self, at: str, step: int, loss: Any = None) -> None:
        self.outcome.points.append(record(at, step, self._state, loss))

    @contextmanager
    def _with_others(self, names: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], dict[str, Place]]]:
        """The state with things outside it as further entries, and the places of those."""
        found = {place.name: place for place in places(self._step, self._state)} if names else {}
        others = {entry: found[name] for entry, name in names.items() if name in found}
        yield {**self._state, **{entry: place.value for entry, place in others.items()}}, others


def _whole(part: _Part) -> None:
    before, after = part.job.before, part.job.after
    part.build()
    part.steps(1, before)
    with part.watched():
        part.steps(before + 1, before + 1)
    part.steps(before + 2, before + after)
    part.loaders_noted()


def _first_half(part: _Part) -> None:
    part.build()
    part.steps(1, part.job.before)
    part.save()


def _second_half(part: _Part) -> None:
    before, after = part.job.before, part.job.after
    part.build()
    if part.job.replay:
        part.steps(1, before, recorded=False)
    part.restore()
    with part.watched():
        part.steps(before + 1, before + after)
    part.loaders_noted()


_MODES: dict[str, Callable[[_Part], None]] = {
    "whole": _whole,
    "first half": _first_half,
    "second half": _second_half,
}


def _checked(returned: Any, name: str) -> tuple[MutableMapping[str, Any], Callable[[], Any]]:
    """The state and the step that the user's function returned."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UsageError(f"{name}() must return (state, step), found {_kind(returned)}.", key=name)
    state, step = returned
    if not isinstance(state, MutableMapping):
        raise UsageError(
            f"{name}() must return (state, step) with a dict of names to objects as state, found {_kind(state)}.",
            key=name,
        )
    if not callable(step):
        raise UsageError(
            f"{name}() must return (state, step) with a function that does one step as step, found {_kind(step)}.",
            key=name,
        )
    return state, step


def _kind(value: object) -> str:
    return f"a {type(value).__qualname__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def _failure(error: BaseException, doing: str) -> Failure:
    """What to tell of an error: that of Holdfast is one for the user to read, any other needs its traceback."""
    if isinstance(error, HoldfastError):
        return Failure(isinstance(error, UsageError), doing, str(error))
    place = traceback.extract_tb(error.__traceback__)
    own = os.path.dirname(__file__)
    users = [frame for frame in place if not frame.filename.startswith(own)]
    shown = "".join(["Traceback (most recent call last):\n", *traceback.format_list(users or place)])
    shown += "".join(traceback.format_exception_only(error))
    return Failure(False, doing, f"{type(error).__qualname__}: {error}", shown)


def _environment() -> dict[str, str]:
    """Settings that may change bits."""
    return {
        "threads": str(torch.get_num_threads()),
        "threads between operators": str(torch.get_num_interop_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "hash seed": os.environ.get("PYTHONHASHSEED", "random") if sys.flags.hash_randomization else "0",
    }
