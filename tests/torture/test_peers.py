"""Other ways to save a training, under the same tests: what they are told to show, and what the tests make of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lab.disk import Event, Node, Rename, Resize, Snapshot, Write
from lab.explore import Recording
from lab.marks import GOING, MAY, MUST, REPLACING, Mark, Promises
from lab.subject import Ended, Subjects
from lab.volumes import VolumeError
from peers.cuts import FILE_SYSTEMS, Cuts
from peers.measuring import Bounds, Measured, kills, measure, peers_of
from peers.peer import LAST, Saves, Tensors, number_in, tensors
from peers.table import tables
from peers.verdict import Harm, Tally, harms


@dataclass(frozen=True, slots=True)
class Plain:
    """A peer whose checkpoints are files with a number in them; what holds no number does not load."""

    name: str = "plain"
    package: str = "holdfast"
    keeps: int = 2

    def train(self, directory: Path, saves: Saves) -> None:
        """Not called here."""

    def name_of(self, number: int) -> str:
        """The number."""
        return str(number)

    def visible(self, directory: Path) -> list[str]:
        """All files."""
        return sorted(path.name for path in directory.iterdir())

    def load(self, directory: Path, name: str) -> Tensors:
        """What the file says; zero stands for values that were never saved."""
        return tensors(int((directory / name).read_text()))


SAVED_TWO = [Mark(MAY, "1", 1), Mark(MUST, "1", 1), Mark(MAY, "2", 2), Mark(MUST, "2", 2)]
REMOVES_FIRST = [*SAVED_TWO, Mark(MAY, "3", 3), Mark(GOING, "1")]
REPLACED = [Mark(MAY, "1", 1), Mark(MUST, "1", 1), Mark(REPLACING, "1", 2)]


@pytest.mark.parametrize(
    ("said", "files", "expected"),
    [
        ([], {}, set()),
        (SAVED_TWO, {"1": "1", "2": "2"}, set()),
        (SAVED_TWO, {"1": "1"}, {Harm.LOST}),
        (SAVED_TWO, {"1": "torn", "2": "2"}, {Harm.LOST}),
        (SAVED_TWO, {"1": "1", "2": "torn"}, {Harm.LOST, Harm.TORN_NEWEST}),
        (SAVED_TWO, {"1": "0", "2": "2"}, {Harm.SILENT}),
        (SAVED_TWO, {"1": "2", "2": "2"}, {Harm.SILENT}),
        (SAVED_TWO, {"1": "1", "2": "0"}, {Harm.SILENT, Harm.TORN_NEWEST}),
        (SAVED_TWO, {"1": "0", "2": "0"}, {Harm.SILENT, Harm.TORN_NEWEST, Harm.EVERYTHING}),
        (SAVED_TWO, {}, {Harm.LOST, Harm.EVERYTHING}),
        (SAVED_TWO[:1], {"1": "torn"}, {Harm.TORN_NEWEST}),
        (REMOVES_FIRST, {"2": "2"}, set()),
        (REMOVES_FIRST, {"1": "1", "2": "2", "3": "torn"}, {Harm.TORN_NEWEST}),
        (REMOVES_FIRST, {"3": "3"}, {Harm.LOST}),
        (REPLACED, {"1": "1"}, set()),
        (REPLACED, {"1": "2"}, set()),
        ([*REPLACED, Mark(MUST, "1", 2)], {"1": "1"}, {Harm.LOST}),
    ],
)
def test_a_directory_shows_what_is_lost_wrong_or_torn(
    said: list[Mark], files: dict[str, str], expected: set[Harm], tmp_path: Path
) -> None:
    """Each kind of harm is told from the others; a peer may lose what it was about to remove or replace."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert harms(Plain(), tmp_path, Promises.of(said)) == expected


def test_a_state_with_one_other_element_is_none() -> None:
    """A single wrong element is noticed, in each tensor."""
    for name in tensors(1):
        changed = {key: tensor.clone() for key, tensor in tensors(1).items()}
        changed[name][-1] += 1
        assert number_in(changed) is None, name
    assert number_in(tensors(1)) == 1
    assert number_in({key: torch.zeros_like(tensor) for key, tensor in tensors(1).items()}) is None


def test_a_kill_leaves_what_was_done_in_its_order() -> None:
    """What was written before a file was cut short does not come back when it grows again."""
    root, file = Node(), Node(data=bytearray())
    events: list[Event] = [
        Rename(((root, "file", file),)),
        Resize(file, 3),
        Write(file, 0, b"old"),
        Resize(file, 0),
        Resize(file, 3),
        Write(file, 0, b"n"),
    ]
    recording = Recording("none", Snapshot(root, {}, {}), events, Ended(), [])
    left = [crash.files["file"] for crash in kills(recording)]
    assert left == [b"", b"\0\0\0", b"old", b"", b"\0\0\0", b"n\0\0"]


def test_tables_say_everything_that_was_counted() -> None:
    """One line for each peer in each table, and a reason for each that could not be measured."""
    tally = Tally()
    tally.add({Harm.LOST, Harm.EVERYTHING})
    tally.add(set())
    whole = Measured("one", "package 1.0", possible=tally, killed=Tally(), cuts={"ext4": tally})
    expected = """\
After a power cut that leaves anything that POSIX allows:

|  | states | lost | silent | everything lost | torn newest | any |
|---|--:|--:|--:|--:|--:|--:|
| one (package 1.0) | 2 | 1 | 0 | 1 | 0 | 1 |

After a kill:

|  | states | lost | silent | everything lost | torn newest | any |
|---|--:|--:|--:|--:|--:|--:|
| one (package 1.0) | 0 | 0 | 0 | 0 | 0 | 0 |

After real power cuts right behind an acknowledged save, on ext4:

|  | states | lost | silent | everything lost | torn newest | any |
|---|--:|--:|--:|--:|--:|--:|
| one (package 1.0) | 2 | 1 | 0 | 1 | 0 | 1 |

- two: not recordable: it fails"""
    assert tables([whole, Measured("two", failure="it fails")]) == expected


@pytest.mark.usefixtures("strace")
def test_tutorials_lose_what_they_acknowledged(scratch: Path, count: Callable[[int, int], int]) -> None:
    """Without a sync, a power cut takes what was acknowledged; a kill takes it where one path is overwritten."""
    tutorial, careful = measure("with_torch", Bounds(count(100, 2000), 0, 0, scratch))
    assert (tutorial.failure, careful.failure) == ("", "")
    for measured in (tutorial, careful):
        assert measured.possible.harms.keys() == set(Harm), measured.name
    assert tutorial.killed.harms.keys() == {Harm.LOST, Harm.EVERYTHING, Harm.TORN_NEWEST}
    assert (careful.killed.states > 0, careful.killed.harmed) == (True, 0)


@pytest.mark.usefixtures("strace")
def test_holdfast_shows_no_harm_in_the_same_harness(
    scratch: Path, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """No state after a power cut or a kill breaks what was acknowledged."""
    [measured] = measure("with_holdfast", Bounds(count(300, 5000), 0, 0, scratch))
    record_property("count: states of the peers' harness", measured.possible.states + measured.killed.states)
    assert (measured.failure, measured.possible.harmed, measured.killed.harmed) == ("", 0, 0)
    assert measured.possible.states >= 200
    assert measured.killed.states >= 20


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems")
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_real_power_cut_takes_from_the_tutorial_and_not_from_holdfast(
    kind: str, scratch: Path, count: Callable[[int, int], int]
) -> None:
    """The file system is cut off after each of the saves, with nothing flushed and with the journal flushed."""
    if kind != FILE_SYSTEMS[0] and not count(0, 1):
        pytest.skip("in make torture")
    tallies = {}
    rounds = count(2, 2 * LAST)
    for adapter in ("with_torch", "with_holdfast"):
        peer = peers_of(adapter)[0]
        with Subjects(workloads=f"peers.adapters.{adapter}") as subjects:
            try:
                tallies[adapter] = Cuts(subjects, peer, scratch).tally(kind, rounds)
            except VolumeError as error:
                pytest.skip(str(error))
    assert (tallies["with_holdfast"].states, tallies["with_holdfast"].harmed) == (rounds, 0)
    assert tallies["with_torch"].harms[Harm.LOST] > 0
