"""The benchmarks: everybody's saves come back bit for bit, and the tables say what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measures
from benchmarks.background import BACKGROUND_PEERS, BackgroundPeer, Blocking, Session, Wait
from benchmarks.blocking import blocking_rounds
from benchmarks.cases import LORA_PEERS
from benchmarks.changes import measure_peer as measure_changes
from benchmarks.checks import WrongResultError, check_background, check_blocking, check_training, qualify
from benchmarks.files import files, remove, size
from benchmarks.output import FIGURES, PICTURE, TABLES, Run, write
from benchmarks.peers import PEERS, Peer, Safetensors, TorchSave, installed
from benchmarks.report import Result, summary
from benchmarks.rounds import Figures, Samples, interleave
from benchmarks.stall import measure_peer as measure_stall
from benchmarks.tables import Table, tables_of, targets_table
from benchmarks.targets import PEERS as FASTEST_PEER
from benchmarks.targets import STATE, Reached, Target, reach, reach_all
from benchmarks.training import Stretch, Training, lost
from benchmarks.workloads import WORKLOADS, Workload, lora

ROOT = Path(__file__).parents[1]

# What other libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def named(peer: Peer | BackgroundPeer) -> str:
    """The name of a test."""
    return peer.name.replace(", ", "-")


def needs(peer: Peer | BackgroundPeer) -> None:
    """Skip where a peer's package is not installed."""
    if installed(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed: make bench installs it")


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("workload", ["gpt2", "many", "lora"])
@pytest.mark.parametrize("peer", PEERS, ids=named)
def test_a_save_comes_back(peer: Peer, workload: str, tmp_path: Path) -> None:
    """Bit for bit, into tensors that were cleared; and nothing is left on the disk."""
    needs(peer)
    check_blocking(peer, WORKLOADS[workload]("small", 1), WORKLOADS[workload]("small", 2), tmp_path / "checkpoint")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("peer", BACKGROUND_PEERS, ids=named)
def test_a_background_save_comes_back(peer: BackgroundPeer, tmp_path: Path) -> None:
    """What was there at the call, though everything is changed right after it; the second save too."""
    needs(peer)
    check_background(peer, WORKLOADS["gpt2"]("small", 1), WORKLOADS["gpt2"]("small", 2), tmp_path / "checkpoints")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("peer", BACKGROUND_PEERS, ids=named)
def test_a_save_beside_a_training_comes_back(peer: BackgroundPeer, tmp_path: Path) -> None:
    """What was there at the call, though the training goes on while it is written."""
    needs(peer)
    check_training(peer, Training("small", 1), Training("small", 2).workload, tmp_path / "checkpoints")

    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class Careless:
    """Does not copy: it writes what it finds when it comes to it."""

    name: str = "careless"
    package: str = "torch"

    @contextmanager
    def open(self, workload: Workload, directory: Path) -> Iterator[Session]:
        """See :class:`BackgroundPeer`."""
        directory.mkdir()
        yield CarelessSession(workload, directory / "checkpoint")


class CarelessSession:
    """See :class:`Careless`."""

    def __init__(self, workload: Workload, path: Path) -> None:
        self.workload, self.newest, self.waited_s = workload, path, 0.0

    def save(self) -> Wait:
        """Put it off."""

        def wait() -> int:
            TorchSave().save(self.workload, self.newest)
            return 0

        return wait

    def guard(self) -> AbstractContextManager[object]:
        """Nothing is guarded."""
        return nullcontext()

    def stepped(self) -> None:
        """Nothing is told."""

    def load(self, live: Workload) -> None:
        """Load what was written."""
        TorchSave().load(live, self.newest)


def test_a_save_of_later_values_does_not_compete(tmp_path: Path) -> None:
    """The checks of background saves can fail: they notice one that did not copy at the call."""
    gpt2 = WORKLOADS["gpt2"]

    with pytest.raises(WrongResultError, match="592 of 592 tensors were loaded with other values than they were saved"):
        check_background(Careless(), gpt2("small", 1), gpt2("small", 2), tmp_path / "checkpoints")
    with pytest.raises(WrongResultError, match="tensors were loaded with other values than they were saved with"):
        check_training(Careless(), Training("small", 1), Training("small", 2).workload, tmp_path / "checkpoints")


def test_who_fails_a_check_is_named() -> None:
    """The others compete."""
    left_out: dict[str, str] = {}

    def check(peer: Peer) -> None:
        if peer.name == "safetensors":
            raise WrongResultError("1 of 2 tensors")

    passed = qualify([TorchSave(), Safetensors()], check, left_out)

    assert ([peer.name for peer in passed], left_out) == (["torch.save"], {"safetensors": "1 of 2 tensors"})


# ------------------------------------------------------------------------------------------------- what is measured


def test_blocking_rounds(tmp_path: Path) -> None:
    """One figure a round for every measure of every peer and of the bare machine."""
    saved, live = WORKLOADS["many"]("small", 1), WORKLOADS["many"]("small", 2)

    samples = blocking_rounds([TorchSave()], saved, live, tmp_path, 2, lambda _: None)

    counts = {measure: {name: len(found) for name, found in rows.items()} for measure, rows in samples.items()}
    raw = {name for rows in samples.values() for name in rows} - {"torch.save"}
    assert raw - {measures.RAW_DIRECT} == {measures.RAW_WRITE, measures.RAW_COPY}  # not all file systems can the other
    assert {measure: rows["torch.save"] for measure, rows in counts.items()} == dict.fromkeys(
        ["durable save", "hot load", "cold load"], 2
    )
    assert {count for rows in counts.values() for count in rows.values()} == {2}


def test_the_state_of_a_stall_changes_before_every_save(tmp_path: Path) -> None:
    """Otherwise who stores unchanged data once would have nothing to write."""
    saved = WORKLOADS["gpt2"]("small", 1)
    before = {name: tensor.clone() for name, tensor in saved.tensors.items()}

    figures = measure_stall(Blocking(TorchSave(), "torch.save"), saved, tmp_path / "checkpoints")

    assert set(figures) == {measures.FIRST_STALL, measures.STALL, measures.DURABLE}
    assert [name for name, tensor in saved.tensors.items() if not torch.equal(tensor, before[name] + 1 + 1)] == []


def test_a_lora_state_trains_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the full scale, of which only the shapes are made: 1.4 GB frozen, adapters and their AdamW beside it."""
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.empty(shape, device="meta"))
    state = lora("full", 0)

    adapters = [t for name, t in state.tensors.items() if name.startswith("model.") and ".lora_" in name]
    frozen_bytes = state.nbytes - state.changing_bytes
    assert (frozen_bytes, sum(t.nbytes for t in adapters)) == (1_419_292_672, 12_582_912)
    assert state.changing_bytes == 3 * 12_582_912 + 4 * len(adapters)


@pytest.mark.parametrize("name", ["torch.save", "holdfast"])
def test_two_saves_of_a_lora_state(name: str, tmp_path: Path) -> None:
    """Peers write everything again; Holdfast the changed tensors and its manifest."""
    (peer,) = (peer for peer in LORA_PEERS if peer.name == name)
    saved, live = lora("small", 1), lora("small", 2)

    figures = measure_changes(peer, saved, live, tmp_path / "checkpoints")

    assert set(figures) == {measures.FIRST_SAVE, measures.SECOND_SAVE, measures.SECOND_BYTES, measures.HOT}
    written = figures[measures.SECOND_BYTES] * saved.changing_bytes
    if name == "holdfast":
        assert saved.changing_bytes < written < saved.changing_bytes + 200_000
    else:
        assert written > saved.nbytes


def test_training_time_lost() -> None:
    """A stretch with a save against the mean of its neighbours; the first step's optimizer against all of theirs."""
    stretches = [
        Stretch(2.0, (0.25, 0.25, 0.5)),
        Stretch(4.0, (1.25, 0.25, 0.25), 0.25),  # 1.0 longer: the machine gets slower
        Stretch(4.0, (0.25, 0.5, 0.25)),
        Stretch(6.5, (2.25, 0.5, 0.5), 0.75),
        Stretch(5.0, (0.5, 0.5, 0.5)),
    ]

    assert lost(stretches[:3]) == {measures.LOST: 1.0, measures.WAITED: 0.25, measures.LONGER: 1.0}
    assert lost(stretches) == {measures.LOST: 1.5, measures.WAITED: 0.5, measures.LONGER: 1.375}


def test_rounds_turn() -> None:
    """Everybody once a round; each round begins one further on."""
    order: list[str] = []

    def turn(name: str, figure: float) -> Callable[[], Figures]:
        def measure() -> Figures:
            order.append(name)
            return {measures.SAVE: figure}

        return measure

    samples = interleave({"a": turn("a", 1.0), "b": turn("b", 2.0), "c": turn("c", 3.0)}, 3, lambda _: None)

    assert "".join(order) == "abcbcacab"
    assert samples == {"durable save": {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}}


def test_the_size_of_what_was_saved(tmp_path: Path) -> None:
    """A file, or all files of a directory."""
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "one").write_bytes(b"12345")
    (tmp_path / "folder" / "deep" / "two").write_bytes(b"123")

    assert (size(tmp_path / "folder"), size(tmp_path / "folder" / "one")) == (8, 5)
    assert sorted(file.name for file in files(tmp_path / "folder")) == ["one", "two"]
    remove(tmp_path / "folder" / "one")
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- the tables


SAMPLES: Samples = {
    "durable save": {
        "holdfast": [1.0, 2.0, 4.0],
        "safetensors": [4.0, 4.0, 4.0],
        "torch.save": [8.0, 8.0, 4.0],
        "raw: O_DIRECT": [0.5, 1.8, 4.0],
    },
    "hot load": {"holdfast": [0.25, 0.25, 0.25], "safetensors": [0.125, 0.25, 0.5]},
    "peak memory of a save": {"holdfast": [60e6], "safetensors": [2.5e6]},
}
RESULTS = {"gpt2": Result(100_000_000, SAMPLES)}


def test_summary() -> None:
    """Median, least, greatest; and the median of the ratios within the rounds, which is no ratio of the medians."""
    assert summary({"durable save": SAMPLES["durable save"]}) == {
        "durable save": {
            "holdfast": {"median": 2.0, "least": 1.0, "greatest": 4.0, "ratio": 1.0},
            "safetensors": {"median": 4.0, "least": 4.0, "greatest": 4.0, "ratio": 2.0},
            "torch.save": {"median": 8.0, "least": 4.0, "greatest": 8.0, "ratio": 4.0},
            "raw: O_DIRECT": {"median": 1.8, "least": 0.5, "greatest": 4.0, "ratio": 0.9},
        }
    }


def test_there_is_no_ratio_to_nothing() -> None:
    """Training that lost no time in one round has no figure to compare with."""
    samples: Samples = {"lost": {"holdfast": [-0.25, 1.0], "DCP": [2.0, 2.0]}}

    assert summary(samples)["lost"]["DCP"] == {"median": 2.0, "least": 2.0, "greatest": 2.0}


def test_tables() -> None:
    """One row for everybody, Holdfast first and the bare machine last; one column a measure, with its unit."""
    assert tables_of(RESULTS) == [
        Table(
            "gpt2, 100 MB: blocking saves and loads",
            ("", "durable save, s", "hot load, s", "peak memory of a save, MB"),
            (
                ("**holdfast**", "2.000 (1.000 to 4.000), 1.00x", "0.250, 1.00x", "60.0, 1.00x"),
                ("safetensors", "4.000, 2.00x", "0.250 (0.125 to 0.500), 1.00x", "2.5, 0.04x"),
                ("torch.save", "8.000 (4.000 to 8.000), 4.00x", "", ""),
                ("*raw: O_DIRECT*", "1.800 (0.500 to 4.000), 0.90x", "", ""),
            ),
        )
    ]


def test_a_table_is_aligned() -> None:
    """It reads well as a table on a page and as text."""
    table = Table("Saves", ("", "save, s"), (("**holdfast**", "2.000"), ("DCP", "10.000, 5.00x")))

    assert table.markdown() == (
        "### Saves\n"
        "\n"
        "|              |       save, s |\n"
        "| ------------ | ------------: |\n"
        "| **holdfast** |         2.000 |\n"
        "| DCP          | 10.000, 5.00x |\n"
    )


def test_targets() -> None:
    """Each that was measured, against the peer that was fastest, the bare machine, or a bound of its own."""
    assert [
        (found.target.promise, found.against, found.median, found.least, found.greatest, found.met)
        for found in reach_all(RESULTS)
    ] == [
        ("durable blocking save", "safetensors", 0.5, 0.25, 1.0, True),
        ("bandwidth of a durable blocking save", "raw: O_DIRECT", 0.9, 0.5, 1.0, True),
        ("hot load, verified", "safetensors", 1.0, 0.5, 2.0, True),
        ("peak memory of a blocking save", "", 60e6, 60e6, 60e6, True),
    ]


def test_the_table_of_targets() -> None:
    """The bound, what was reached, and whether that keeps it; bounds without a comparison have a unit."""
    ratio = Target("save", "gpt2", measures.SAVE, 0.6, FASTEST_PEER)
    speed = Target("bandwidth", "gpt2", measures.SAVE, 0.8, ("raw",), at_least=True)
    stall = Target("stall", "gpt2", measures.STALL, 0.005)
    reached = [
        Reached(ratio, "safetensors", 0.625, 0.5, 0.75),
        Reached(speed, "raw", 0.9, 0.8, 1.0),
        Reached(stall, "", 0.004, 0.003, 0.0061),
    ]

    assert targets_table(reached) == Table(
        "Targets",
        ("", "against", "target", "reached", "met"),
        (
            ("save", "safetensors", "at most 0.60", "0.62 (0.50 to 0.75)", "no"),
            ("bandwidth", "raw", "at least 0.80", "0.90 (0.80 to 1.00)", "yes"),
            ("stall", "", "at most 5.0 ms", "4.0 (3.0 to 6.1)", "yes"),
        ),
    )


def test_a_target_against_the_state() -> None:
    """Bytes are compared with those of the state."""
    target = Target("memory", "gpt2", measures.PEAK_SAVE, 0.5, STATE)

    assert reach(target, RESULTS) == Reached(target, STATE, 0.6, 0.6, 0.6)


def test_a_target_against_a_peer_that_lost_nothing() -> None:
    """Rounds in which there is nothing to compare with are left out; without any there is no ratio."""
    target = Target("lost", "training", measures.LOST, 0.5, FASTEST_PEER)

    def reached(peer: list[float]) -> Reached | None:
        samples = {measures.LOST.name: {"holdfast": [0.5, -0.5, 0.25], "DCP": peer, "no save": [0.0, 0.0, 0.0]}}
        return reach(target, {"training": Result(1, samples)})

    assert reached([-1.0, 2.0, 1.0]) == Reached(target, "DCP", 0.0, -0.25, 0.25)
    assert reached([0.0, 0.0, -1.0]) is None


def test_what_was_not_measured_has_no_target() -> None:
    """Neither a missing workload, nor a missing peer."""
    target = Target("save", "gpt2", measures.SAVE, 0.6, ("nobody",))

    assert (reach(target, {}), reach(target, RESULTS)) == (None, None)


def test_a_run_on_paper(tmp_path: Path) -> None:
    """All figures, the tables and the picture."""
    pytest.importorskip("matplotlib")
    environment: dict[str, Any] = {
        "date": "2026-11-23",
        "processor": "a processor",
        "cores": 2,
        "memory_bytes": 24 * 2**30,
        "file_system": "ext4",
        "system": "Linux 6.18",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "safetensors": None},
    }
    left_out = {"torchsnapshot, background saves": "1 of 2 tensors were loaded with other values"}
    run = Run(environment, "full", 3, {"gpt2": Result(100_000_000, SAMPLES, left_out)})

    write(run, tmp_path, lambda _: None)

    figures = json.loads((tmp_path / FIGURES).read_text())
    assert (figures["environment"], figures["scale"], figures["rounds"]) == (environment, "full", 3)
    assert (figures["workloads"]["gpt2"]["samples"], figures["workloads"]["gpt2"]["left_out"]) == (SAMPLES, left_out)
    assert figures["targets"][0] == {
        "promise": "durable blocking save",
        "workload": "gpt2",
        "measure": "durable save",
        "who": "holdfast",
        "against": "safetensors",
        "at_most": 0.6,
        "median": 0.5,
        "least": 0.25,
        "greatest": 1.0,
        "met": True,
    }
    assert (
        (tmp_path / TABLES)
        .read_text()
        .startswith(
            "# Results\n\n![Holdfast beside its peers](picture.png)\n\nMeasured on 2026-11-23 at the full scale in 3 "
            "rounds: 2 cores of a processor, 24 GiB, ext4, Linux 6.18, Python 3.11.7, torch 2.13.0. Median (least"
        )
    )
    assert (
        (tmp_path / TABLES)
        .read_text()
        .endswith(
            "Left out of `gpt2`: torchsnapshot, background saves. 1 of 2 tensors were loaded with other values.\n"
        )
    )
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_measures_everything(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    """One round of every workload at the small scale: figures for each, and nothing left on the disk.

    By default of one workload, which tells as well whether the command works.
    """
    everything = count(0, 1) == 1
    command = [sys.executable, "-m", "benchmarks", "--scale", "small", "--rounds", "1"]
    command += ["--directory", str(tmp_path / "disk"), "--output", str(tmp_path / "results")]
    for name in ("holdfast", "holdfast, overlap", "safetensors"):
        command += ["--only", name]
    command += [] if everything else ["--workload", "lora"]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    workloads = json.loads((tmp_path / "results" / FIGURES).read_text())["workloads"]
    assert list((tmp_path / "disk").iterdir()) == []
    if not everything:
        assert len(workloads) == 1
        return
    names = {
        measure: set(rows) - {*measures.BOUNDS}
        for found in workloads.values()
        for measure, rows in found["samples"].items()
    }
    background = {"holdfast", "holdfast, overlap"}
    assert names["durable save"] == {"holdfast", "safetensors"}
    assert names["stall of a background save"] == names["training time lost per background save"] == background
    assert names["peak memory of background saves"] == background
    assert names["second save"] == {"holdfast", "safetensors"}
    assert names[measures.PLAN.name] == {"holdfast, 50 tensors", "holdfast, 500 tensors"}


def test_an_unknown_peer() -> None:
    """It says which there are."""
    command = [sys.executable, "-m", "benchmarks", "--only", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "there are: holdfast; torch.save" in done.stderr
