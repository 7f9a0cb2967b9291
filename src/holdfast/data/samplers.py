"""The order of an epoch: what a user's sampler or batch sampler gives, made again as it was.

A sampler may draw from the global generators, from generators of its own, depend on ``set_epoch``, or have a state.
All of that is brought to where it was when the epoch began; then the sampler is iterated again, and what was consumed
is left out. That costs what the sampler costs, and no sample is loaded for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import xxhash

from holdfast.data.fetching import BatchKey
from holdfast.data.places import Cursor, logger, mismatch
from holdfast.data.seeding import PrivateGlobals, spell
from holdfast.errors import StateMismatchError
from holdfast.state.kinds import is_stateful
from holdfast.state.rng import GENERATOR_TYPES, generator_mismatch, generator_state, restore_generator

_END = object()


class SamplerOrder:
    """The order that a sampler gives.

    Args:
        sampler: gives indices, or lists of them.
        batch_size: how many indices make a batch; None where the sampler gives what is asked for at once.
        drop_last: leave out what does not fill a batch.
        gives_batches: whether the sampler gives lists.
    """

    def __init__(self, sampler: Any, batch_size: int | None, *, drop_last: bool, gives_batches: bool) -> None:
        self.name = "batch sampler" if gives_batches else "sampler"
        self._sampler = sampler
        self._parts = _Parts(sampler)
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._gives_batches = gives_batches
        self._begin: dict[str, Any] | None = None  # what the parts held when the epoch began
        self._is_loaded = False  # whether that is still to be put back

    def __len__(self) -> int:
        count = len(self._sampler)
        if self._batch_size is None:
            return count
        return count // self._batch_size if self._drop_last else -(-count // self._batch_size)

    def state(self) -> dict[str, Any]:
        """The state of the sampler when the epoch began; before it began, as it is now."""
        return {"batch_size": self._batch_size, "sampler": self._parts.state() if self._begin is None else self._begin}

    def load(self, state: Mapping[str, Any], cursor: Cursor) -> Cursor:
        """See :class:`Order`. Single indices are counted one by one, so that another batch size continues there."""
        self._parts.check(state.get("sampler"))
        if cursor.position and state.get("batch_size") != self._batch_size:
            logger.warning(
                "the loader's epoch was begun with batch_size=%s and goes on with batch_size=%s, after %d samples.",
                state.get("batch_size"),
                self._batch_size,
                cursor.samples,
            )
            cursor = Cursor(-(-cursor.samples // (self._batch_size or 1)), cursor.samples, cursor.digest)
        self._begin = dict(state["sampler"])
        self._is_loaded = True
        return cursor

    def next_epoch(self) -> None:
        """The sampler goes on from where it is, or from where it was when it was saved."""
        if self._is_loaded and self._begin is not None:
            self._parts.restore(self._begin)
        self._begin = None
        self._is_loaded = False

    def keys(self, seed: int, epoch: int, after: Cursor) -> Iterator[tuple[BatchKey, Cursor]]:
        """See :class:`Order`."""
        restored = self._begin if after.position or self._is_loaded else None
        if restored is None:
            self._begin = self._parts.state()
        else:
            self._parts.restore(restored)
        self._is_loaded = False
        self._parts.set_epoch(epoch)
        drawn = PrivateGlobals(seed, epoch, "order")
        with drawn.in_place():
            iterator = self._iterate(may_be_over=restored is not None and bool(restored["states"]))
            digest = self._skip(iterator, after, epoch)
        return self._keys(iterator, drawn, digest, BatchKey(0, seed, epoch, after.samples, 1, None), after)

    def _iterate(self, may_be_over: bool) -> Iterator[Any]:
        """A pass over the sampler.

        The state of a sampler that has one is that of its last pass, when that was over: then the restored sampler
        gives nothing, once, just as a finished iterator would, and its next pass is the epoch's.
        """
        iterator: Iterator[Any] = iter(self._sampler)
        if may_be_over:
            first = next(iterator, _END)
            iterator = iter(self._sampler) if first is _END else chain([first], iterator)
        return iterator

    def _skip(self, iterator: Iterator[Any], after: Cursor, epoch: int) -> Any:
        """Leave out what was consumed; returns its digest, which has to be the saved one."""
        digest = xxhash.xxh3_128()
        for item in islice(iterator, after.position if self._gives_batches else after.samples):
            self._update(digest, item)
        if after.position and digest.hexdigest() != after.digest:
            raise StateMismatchError(
                f"the sampler's order differs: the first {after.samples} samples of epoch {epoch} are not those that "
                "were consumed. The data or the sampler changed, or it draws from something that is not saved: another "
                "process, the time, a generator that is not an attribute of the sampler. Seed the sampler from "
                f"set_epoch(), or start the next epoch instead: loader.set_epoch({epoch + 1}) after the restore.",
                key="sampler",
            )
        return digest

    def _keys(
        self, iterator: Iterator[Any], drawn: PrivateGlobals, digest: Any, key: BatchKey, after: Cursor
    ) -> Iterator[tuple[BatchKey, Cursor]]:
        position, samples = after.position, after.samples
        while True:
            with drawn.in_place():
                indices = self._next_batch(iterator)
            if indices is _END:
                return
            for index in [indices] if self._gives_batches or self._batch_size is None else indices:
                self._update(digest, index)
            first = samples
            samples += len(indices) if self._gives_batches or self._batch_size is not None else 1
            yield (
                key._replace(number=position - after.position, first=first, indices=indices),
                Cursor(position + 1, samples, digest.hexdigest()),
            )
            position += 1

    def _next_batch(self, iterator: Iterator[Any]) -> Any:
        if self._gives_batches:
            given: Any = next(iterator, _END)
            return given if given is _END else list(given)
        if self._batch_size is None:
            return next(iterator, _END)
        batch = list(islice(iterator, self._batch_size))
        return _END if not batch or (self._drop_last and len(batch) < self._batch_size) else batch

    def _update(self, digest: Any, item: Any) -> None:
        digest.update(spell(list(item) if self._gives_batches else item).encode() + b";")


class _Parts:
    """A sampler and those inside it, and what each of them draws from.

    Args:
        sampler: the outermost.
    """

    def __init__(self, sampler: Any) -> None:
        self._samplers = dict(_nested(sampler, "sampler"))

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to whoever asks for it."""
        for sampler in self._samplers.values():
            tell = getattr(sampler, "set_epoch", None)
            if callable(tell):
                tell(epoch)

    def state(self) -> dict[str, Any]:
        """The generators and the states of all samplers, by their paths."""
        return {
            "generators": {path: generator_state(generator) for path, generator in self._generators().items()},
            "states": {path: copy.deepcopy(sampler.state_dict()) for path, sampler in self._stateful().items()},
        }

    def check(self, state: Any) -> None:
        """Find out whether ``state`` fits, before anything is changed."""
        saved = state if isinstance(state, Mapping) else {}
        generators = self._generators()
        for part, here in (("generators", generators), ("states", self._stateful())):
            there = saved.get(part, {})
            if set(there) != set(here):
                raise mismatch(
                    f"sampler ({part})",
                    ", ".join(there) or "none",
                    ", ".join(here) or "none",
                    "Use the kind of sampler that it was saved with.",
                )
        for path, generator in generators.items():
            why = generator_mismatch(generator, saved["generators"][path])
            if why is not None:
                raise mismatch(path, "another generator", why, "Use the generator that it was saved with.")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put everything back."""
        for path, sampler in self._stateful().items():
            sampler.load_state_dict(copy.deepcopy(state["states"][path]))
        for path, generator in self._generators().items():
            restore_generator(generator, state["generators"][path])

    def _stateful(self) -> dict[str, Any]:
        return {path: sampler for path, sampler in self._samplers.items() if is_stateful(sampler)}

    def _generators(self) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, sampler in self._samplers.items()
            for name, value in getattr(sampler, "__dict__", {}).items()
            if isinstance(value, GENERATOR_TYPES)
        }


def _nested(sampler: Any, path: str, depth: int = 8) -> Iterator[tuple[str, Any]]:
    yield path, sampler
    for name in ("sampler", "batch_sampler"):
        inner = getattr(sampler, name, None)
        if inner is not None and inner is not sampler and depth:
            yield from _nested(inner, f"{path}.{name}", depth - 1)
