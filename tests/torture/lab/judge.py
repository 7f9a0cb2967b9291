"""Looks at a directory that a process left when its machine stopped, and says which promises are broken."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import holdfast
from holdfast import KeepLast, Run
from holdfast.errors import HoldfastError
from holdfast.storage.local import LocalStore
from lab.marks import Promises, without_generation
from lab.states import fill, new_state, number_of

FOREIGN = {"notes.txt": b"mine", "step-7/weights.bin": b"older than Holdfast", ".tmp-mine/file": b"not a save"}
"""What lies in the directory of a run and is none of its business."""
_OWN_LITTER = (".tmp-0", ".trash-", ".aside-", ".probe-")
_NEXT_STATE = 99_000


def place_foreign(run: Path) -> None:
    """Put strangers' files into a run."""
    for name, content in FOREIGN.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class Judge(Protocol):
    """Knows what must hold of a directory."""

    def problems(self, directory: Path, promises: Promises) -> list[str]:
        """Every promise that is broken, in words; may change what is there."""

    def at_first_sight(self) -> Judge:
        """The same, without what takes long."""


class RunJudge:
    """What holds of the directory of a run, whenever the machine stops.

    Args:
        broken: names of checkpoints that were damaged before, and stay where they are.
        foreign: whether :func:`place_foreign` was called.
        aftermath: also start again on what is there: clean up, save, load, and apply a retention policy.
        place: where the run is, below the directory that is judged.
    """

    def __init__(
        self, *, broken: frozenset[str] = frozenset(), foreign: bool = False, aftermath: bool = True, place: str = ""
    ) -> None:
        self._place = place
        self._broken = broken
        self._foreign = foreign
        self._aftermath = aftermath

    def at_first_sight(self) -> Judge:
        """The same, without the aftermath."""
        quick = copy.copy(self)
        quick._aftermath = False
        return quick

    def problems(self, directory: Path, promises: Promises) -> list[str]:
        """Every promise that is broken, in words; changes what is there when it looks at the aftermath."""
        with _quiet():
            return [*self._problems(directory / self._place, promises)]

    def _problems(self, directory: Path, promises: Promises) -> Iterator[str]:
        if not directory.exists():
            yield from (f"lost with its run: {name}" for name in promises.must)
            if not self._aftermath:
                return
        run = Run(directory)
        before = yield from self._contents(run, promises)
        run.events()
        yield from self._strangers(directory)
        if self._aftermath:
            yield from self._start_again(run, before)

    def _contents(self, run: Run, promises: Promises) -> Generator[str, None, set[str]]:
        """Look at every checkpoint; returns the names of the intact ones."""
        broken = {str(found.name): found.error for found in run.broken()}
        for name in broken.keys() - self._broken:
            yield f"torn and visible: {name}: {broken[name]}"
        for name in self._broken - broken.keys():
            yield f"a broken checkpoint was not left as it was: {name}"
        intact = list(run)
        for checkpoint in intact:
            seed = _number_at(checkpoint.path)
            if seed not in promises.may.get(without_generation(checkpoint.name), set()):
                yield f"wrong contents: {checkpoint.name} holds state {seed}"
            elif seed not in promises.must.get(checkpoint.name, {seed}):
                yield f"replaced: {checkpoint.name} holds state {seed}, acknowledged was another"
            if checkpoint.name in promises.pinned and not checkpoint.pinned:
                yield f"no longer pinned: {checkpoint.name}"
        names = {checkpoint.name for checkpoint in intact}
        yield from (f"lost: {name}" for name in promises.must.keys() - names)
        return names

    def _strangers(self, directory: Path) -> Iterator[str]:
        for name, content in FOREIGN.items() if self._foreign else ():
            path = directory / name
            if not path.is_file() or path.read_bytes() != content:
                yield f"a stranger's file was touched: {name}"

    def _start_again(self, run: Run, before: set[str]) -> Iterator[str]:
        run.store.clean()
        litter = [name for name in run.store.names() if name.startswith(_OWN_LITTER)]
        litter += [str(path) for path in Path(run.path).glob("step-*/.annotations*")]
        if litter:
            yield f"litter after cleaning up: {litter}"
        if {checkpoint.name for checkpoint in run} != before:
            yield "cleaning up changed what is there"
        latest = run.latest()
        if before and (latest is None or latest.name != max(before)):
            yield f"the newest is not found: {latest}"
        state = new_state()
        fill(state, _NEXT_STATE)
        saved = run.save(state, step=0 if latest is None else latest.step + 1)
        if _number_at(saved.path) != _NEXT_STATE:
            yield "the next save does not hold what was saved"
        run.prune(KeepLast(1))
        left = {checkpoint.name for checkpoint in run if not checkpoint.pinned}
        if left != {saved.name}:
            yield f"retention left {sorted(left)}"
        yield from self._strangers(Path(run.path))


class PathJudge:
    """What holds of a checkpoint that is replaced under one name, as the functions of ``holdfast.classic`` do."""

    def at_first_sight(self) -> Judge:
        """It takes no longer."""
        return self

    def problems(self, directory: Path, promises: Promises) -> list[str]:
        """Every promise that is broken, in words."""
        with _quiet():
            return [*self._problems(directory, promises)]

    def _problems(self, directory: Path, promises: Promises) -> Iterator[str]:
        store = LocalStore(directory)
        for name, seeds in promises.must.items():
            path = directory / name
            if not path.exists():
                store.recover(name)
            seed = _number_at(str(path))
            if seed not in seeds:
                yield f"{name} holds state {seed}, expected one of {sorted(seeds)}"
        for name in store.names():
            if not name.startswith(".") and _number_at(str(directory / name)) not in promises.may.get(name, set()):
                yield f"visible, but not what was saved: {name}"
        store.clean()
        litter = [name for name in store.names() if name.startswith(_OWN_LITTER)]
        if litter:
            yield f"litter after cleaning up: {litter}"


def _number_at(path: str) -> int | None:
    try:
        return number_of(holdfast.load(path))
    except HoldfastError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of broken checkpoints are expected here."""
    logger = logging.getLogger("holdfast")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
