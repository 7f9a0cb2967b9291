"""The harness itself: ranks start, are killed and reaped; a training repeats itself; and bad ways to save are found."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import TORTURE
from lab.ranks import Launch, Outcome
from lab.ranks_kills import Kills, differences
from lab.ranks_model import WORLD_SIZES
from lab.ranks_moments import KINDS, Kill

SETTINGS: dict[str, Any] = {"epochs": 2}


EVERY = [(layout, size) for layout, sizes in WORLD_SIZES.items() for size in sizes if size in (1, sizes[-1])]
REPEATED = EVERY if TORTURE else [("ddp", 4), ("fsdp+tp", 4)]
FORGOTTEN = ["generators", "loader", "optimizer"] if TORTURE else ["generators"]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    REPEATED,
)
def test_a_training_repeats_itself(
    layout: str, world_size: int, launch: Launch, undisturbed: Callable[..., Outcome], tmp_path: Path
) -> None:
    """On as many ranks, bit for bit, in every layout; otherwise nothing could be compared."""
    outcome = launch("train", tmp_path, world_size, saving="nothing", layout=layout, **SETTINGS)

    assert list(differences(undisturbed(world_size, layout=layout, **SETTINGS), outcome, tmp_path)) == []
    assert outcome.results[0]["steps"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_killed_at_its_moment(kind: str, launch: Launch, tmp_path: Path) -> None:
    """Of every kind; the other one finds out, and nobody is left."""
    outcome = launch(
        "train", tmp_path, 2, kills={1: Kill(kind, 3)}, saving="apart", layout="fsdp", after_death="leave", **SETTINGS
    )

    assert outcome.ranks[1].status == -signal.SIGKILL
    assert (outcome.ranks[0].status, outcome.late) == (3, ())


def test_a_rank_is_killed_before_and_after_a_call(launch: Launch, tmp_path: Path) -> None:
    """Of the function that is named, the time that is named."""
    call = "lab.ranks_training:Training.optimize"
    steps: list[int] = []
    for number, kind in enumerate(("before", "after")):
        kills = {0: Kill(kind, 2, call)}
        outcome = launch("train", tmp_path / kind, 1, kills=kills, saving="apart", layout="ddp", **SETTINGS)
        steps.append(len(list((tmp_path / kind / "run" / "rank-0").glob("*.pt"))))
        assert outcome.statuses == [-signal.SIGKILL], number
    assert steps == [1, 1]


def test_ranks_that_hang_are_ended(launch: Launch, tmp_path: Path) -> None:
    """When the time is over, all that are left."""
    outcome = launch("train", tmp_path, 2, saving="nothing", absent=[0, 1], timeout_s=1.0, **SETTINGS)

    assert (outcome.statuses, outcome.late) == ([-signal.SIGKILL] * 2, (0, 1))


def test_bystanders_are_ended_with_the_others(launch: Launch, tmp_path: Path) -> None:
    """A rank that does nothing does not keep the others from ending."""
    outcome = launch(
        "train", tmp_path, 2, saving="nothing", absent=[1], bystanders=[1], layout="alone", timeout_s=60.0, **SETTINGS
    )

    assert (outcome.statuses, outcome.late) == ([0, -signal.SIGKILL], ())


@pytest.fixture
def kills(launch: Launch, undisturbed: Callable[..., Outcome], fresh: Callable[[], Path]) -> Callable[..., Kills]:
    """Kills of a training that saves with a stand-in."""

    def make(world_size: int, **arguments: Any) -> Kills:
        whole = undisturbed(world_size, layout="ddp", **SETTINGS)
        arguments = {"layout": "ddp", "saving": "apart", **SETTINGS, **arguments}
        usual = launch("train", fresh(), world_size, **arguments)
        return Kills(
            launch, random.Random(0), whole, usual, {"forward": 1.0, "disk": 1.0, "message": 1.0}, fresh, arguments
        )

    return make


def test_a_good_way_to_save_passes(kills: Callable[..., Kills]) -> None:
    """One that saves everything at one step of all ranks."""
    tried = kills(2)

    tried.run(4)

    assert tried.done.total() == 4


@pytest.mark.parametrize("forget", FORGOTTEN)
def test_what_is_forgotten_is_found(forget: str, kills: Callable[..., Kills]) -> None:
    """A way to save that does not restore everything does not pass."""
    with pytest.raises(AssertionError, match=r"rank 0 repeated another batch|rank 0: gathered"):
        kills(2, forget=forget).run(4)


def test_ranks_that_resume_apart_are_found(launch: Launch, undisturbed: Callable[..., Outcome], tmp_path: Path) -> None:
    """Each from its own newest checkpoint, where one had a step more than the other."""
    arguments = {"layout": "ddp", "saving": "apart", "agree": False, **SETTINGS}
    killed = launch("train", tmp_path, 2, kills={1: Kill("before", 2, "pathlib:Path.rename")}, **arguments)
    assert killed.ranks[1].status == -signal.SIGKILL
    newest = [max(int(path.stem) for path in (tmp_path / "run").glob(f"rank-{rank}/*.pt")) for rank in (0, 1)]
    assert newest[0] > newest[1]

    outcome = launch("train", tmp_path, 2, timeout_s=10.0, **arguments)

    whole = undisturbed(2, layout="ddp", **SETTINGS)
    assert set(outcome.statuses) != {0} or list(differences(whole, outcome, tmp_path)) != []
