"""Holdfast broken in ways that a soak has to notice, each by the name of what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import holdfast
from holdfast import Checkpoint, KeepLast, loading, resume, run
from holdfast.state import guard, rng, staging
from holdfast.storage import durable
from holdfast.storage.durable import Lock
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending

_kept: list[object] = []


def _removal_ignores_readers() -> None:
    real, lock_exclusive = LocalStore.remove, durable.lock_exclusive

    def remove(store: LocalStore, *args: Any) -> bool:
        durable.lock_exclusive = lambda *_, **__: Lock.HELD
        try:
            return real(store, *args)
        finally:
            durable.lock_exclusive = lock_exclusive

    _replace(LocalStore, "remove", remove)


def _published_before_complete() -> None:
    real = LocalPending._seal

    def commit(pending: LocalPending, name: str, manifest: bytes) -> None:
        durable.publish(pending._parent, pending._name, name)
        pending._committed = True
        time.sleep(0.01)
        real(pending, manifest)
        pending._close()

    _replace(LocalPending, "commit", commit)


def _generators_not_restored() -> None:
    _replace(rng, "restore_global", lambda _: [])


def _optimizers_do_not_wait() -> None:
    real = staging.Staging.finish

    def finish(staged: staging.Staging) -> None:
        time.sleep(0.02)  # there is little to copy, which is done before the next step otherwise
        real(staged)

    _replace(staging.Staging, "finish", finish)
    _replace(guard.StepGuard, "_before_step", lambda *_: None)


def _descriptor_leaked_at_each_save() -> None:
    real = LocalPending._close

    def close(pending: LocalPending) -> None:
        if pending._parent.fd >= 0:
            os.dup(pending._parent.fd)
        real(pending)

    _replace(LocalPending, "_close", close)


def _memory_leaked_at_each_load() -> None:
    real = loading.load

    def load(*args: Any, **options: Any) -> dict[str, Any]:
        _kept.append(b"x" * 2**20)
        return real(*args, **options)

    _replace(loading, "load", load)
    _replace(holdfast, "load", load)


def _one_too_few_kept() -> None:
    def keep(policy: KeepLast, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        return {checkpoint.name: "last" for checkpoint in checkpoints[1 - policy.n :]}

    _replace(KeepLast, "keep", keep)


def _nothing_pruned() -> None:
    _replace(LocalStore, "remove", lambda *_: False)


def _pins_ignored() -> None:
    real = run._kept

    def kept(intact: Sequence[Checkpoint], keep: Any, protect: Any) -> dict[str, str]:
        wanted = {*keep.keep(intact), *protect, intact[-1].name} if intact else set()
        return {name: why for name, why in real(intact, keep, protect).items() if name in wanted}

    _replace(run, "_kept", kept)


def _nothing_cleaned() -> None:
    _replace(LocalStore, "clean", lambda _: [])


def _resumed_from_the_oldest() -> None:
    _replace(resume, "_newest_first", lambda run: iter(list(run)))


def _writers_not_refused() -> None:
    _replace(LocalStore, "hold", lambda _: None)


def _best_not_kept() -> None:
    _replace(run, "ranked_by", lambda *_: [])
    from holdfast import policies

    _replace(policies, "ranked_by", lambda *_: [])


MUTANTS: dict[str, Callable[[], None]] = {  # the first two are noticed soonest
    "resumed from the oldest": _resumed_from_the_oldest,
    "generators are not restored": _generators_not_restored,
    "removal ignores readers": _removal_ignores_readers,
    "published before it is complete": _published_before_complete,
    "optimizers do not wait for an overlapping save": _optimizers_do_not_wait,
    "a descriptor leaked at each save": _descriptor_leaked_at_each_save,
    "memory leaked at each load": _memory_leaked_at_each_load,
    "one too few kept": _one_too_few_kept,
    "nothing pruned": _nothing_pruned,
    "pins ignored": _pins_ignored,
    "the best not kept": _best_not_kept,
    "nothing cleaned": _nothing_cleaned,
    "writers not refused": _writers_not_refused,
}


def _replace(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)
