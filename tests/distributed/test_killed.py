"""The main job, on several ranks: any is killed at any moment, all start again, and it ends with the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import TORTURE
from lab.ranks import Launch, Outcome
from lab.ranks_kills import Kills, differences
from lab.ranks_moments import Kill

from holdfast import Run

KINDS = {"step": 1.0, "forward": 1.0, "disk": 3.0, "message": 3.0}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp, 4 ranks": (4, {"layout": "ddp", "batch_norm": True}),
    "fsdp, 2 ranks": (2, {"layout": "fsdp"}),
    "ddp, 2 ranks": (2, {"layout": "ddp", "batch_norm": True}),
    "fsdp, 4 ranks": (4, {"layout": "fsdp"}),
    "tp, 2 ranks": (2, {"layout": "tp"}),
    "hsdp, 4 ranks": (4, {"layout": "hsdp"}),
    "fsdp and tp, 4 ranks": (4, {"layout": "fsdp+tp"}),
    "gradients of two batches, ddp": (2, {"layout": "ddp", "accumulate": 2, "every_batch": True}),
    "gradients of two batches, fsdp": (2, {"layout": "fsdp", "accumulate": 2, "every_batch": True}),
}
DEFAULT = 2
SAVING = ("every_batch", "save_steps", "patience_s")
"""What a training that nobody disturbs has no use for."""


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES) if TORTURE else list(CASES)[:DEFAULT])
def test_any_rank_is_killed_at_any_moment(
    case: str,
    launch: Launch,
    undisturbed: Callable[..., Outcome],
    fresh: Callable[[], Path],
    count: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """In a batch, on the disk or between two messages; the others are killed with it, or find out by themselves.

    After each kill every checkpoint that can be seen is intact, and none that was there is gone. In the end every
    tensor, generator, loss and sample is that of a training on as many ranks that nobody disturbed.
    """
    world_size, arguments = CASES[case]
    arguments = {"patience_s": 10.0, **arguments}
    whole = undisturbed(world_size, **{name: arguments[name] for name in arguments if name not in SAVING})
    directory = fresh()
    usual = launch("train", directory, world_size, **arguments)
    assert list(differences(whole, usual, directory)) == []
    tried = Kills(launch, random.Random(case), whole, usual, KINDS, fresh, arguments)

    tried.run(count(1, 40))

    record_property("count: ranks killed at random moments", tried.done.total())


WRITE, PUBLISH = "holdfast.storage.local_pending:LocalPending.write_files", "holdfast.storage.durable:publish"
PLACES: dict[str, tuple[int, Kill]] = {
    "a rank before its files are written": (1, Kill("before", 2, WRITE)),
    "a rank after its files are written": (1, Kill("after", 2, WRITE)),
    "the coordinator after its files are written": (0, Kill("after", 2, WRITE)),
    "the coordinator before it commits": (0, Kill("before", 2, PUBLISH)),
    "the coordinator after it committed": (0, Kill("after", 2, PUBLISH)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_is_killed_where_it_matters(
    place: str, launch: Launch, undisturbed: Callable[..., Outcome], tmp_path: Path
) -> None:
    """In its part of the second save, or around the commit: that save is there whole, or not at all."""
    rank, kill = PLACES[place]
    settings = {"layout": "fsdp", "epochs": 2}
    killed = launch("train", tmp_path, 2, kills={rank: kill}, after_death="kill", **settings)
    assert killed.ranks[rank].status == -kill.number
    steps = [checkpoint.step for checkpoint in Run(tmp_path / "run")]
    for checkpoint in Run(tmp_path / "run"):
        checkpoint.verify()
    if place == "the coordinator after it committed":
        assert steps == [1, 2]
    else:
        assert steps == [1]

    outcome = launch("train", tmp_path, 2, **settings)

    assert [result["resumed"] for result in outcome.results] == [steps[-1]] * 2
    assert list(differences(undisturbed(2, **settings), outcome, tmp_path)) == []
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".tmp")] == []
