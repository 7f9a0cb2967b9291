"""The workloads, and which measures are taken of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import measures
from benchmarks.background import BACKGROUND_PEERS, BackgroundPeer, Blocking, Holdfast
from benchmarks.blocking import blocking_rounds
from benchmarks.changes import changes_rounds
from benchmarks.checks import N, Named, check_background, check_blocking, check_training, qualify
from benchmarks.memory import peaks_of
from benchmarks.peers import PEERS, installed
from benchmarks.peers import Holdfast as BlockingHoldfast
from benchmarks.planning import planning_rounds
from benchmarks.report import Result
from benchmarks.rounds import Figures, record
from benchmarks.spacing import spacing_rounds
from benchmarks.stall import background_rounds
from benchmarks.training import Training, training_rounds
from benchmarks.workloads import WORKLOADS, Workload

LORA_PEERS: tuple[BackgroundPeer, ...] = (
    Holdfast(),
    *(Blocking(peer, peer.name) for peer in PEERS if peer.package != "holdfast"),
)
"""A run of Holdfast's, whose next checkpoint links what did not change; the others as they save at their best."""

TRAINING_PEERS: tuple[BackgroundPeer, ...] = (
    *(peer for peer in BACKGROUND_PEERS if peer.package in ("holdfast", "torch", "torch-checkpointing")),
    Blocking(BlockingHoldfast(), measures.BLOCKING),
)
"""Without those whose stall alone is longer than what the others lose."""

EVERYBODY: tuple[Named, ...] = (*PEERS, *BACKGROUND_PEERS, *TRAINING_PEERS)


@dataclass(frozen=True, slots=True)
class Setting:
    """How to measure.

    Attributes:
        scale: ``"full"`` or ``"small"``.
        rounds: how often.
        only: the names of those to measure; None for all.
        directory: on the disk to be measured.
        tell: is told what is being measured.
    """

    scale: str
    rounds: int
    only: frozenset[str] | None
    directory: Path
    tell: Callable[[str], None]

    def choose(self, peers: Sequence[N]) -> list[N]:
        """Those who are wanted and installed."""
        return [peer for peer in peers if self.wants(peer) and installed(peer.package) is not None]

    def wants(self, peer: Named) -> bool:
        """Whether it is to be measured, installed or not."""
        return self.only is None or peer.name in self.only


def measure(workload: str, setting: Setting) -> Result:
    """Take all measures of one workload."""
    return CASES[workload](setting)


def _gpt2(setting: Setting) -> Result:
    saved, live = (WORKLOADS["gpt2"](setting.scale, seed) for seed in (1, 2))
    result = _saves_and_loads("gpt2", saved, live, setting)
    left_out: dict[str, str] = {}
    peers = qualify(
        setting.choose(BACKGROUND_PEERS),
        lambda peer: check_background(peer, saved, live, setting.directory / "check"),
        left_out,
    )
    result.samples.update(background_rounds(peers, saved, setting.directory, setting.rounds, setting.tell))
    result.left_out.update({f"{name}, background saves": why for name, why in left_out.items()})
    for peer in peers:
        record(result.samples, peer.name, _peaks("background", peer, "gpt2", setting))
    return result


def _many(setting: Setting) -> Result:
    saved, live = (WORKLOADS["many"](setting.scale, seed) for seed in (1, 2))
    return _saves_and_loads("many", saved, live, setting)


def _saves_and_loads(workload: str, saved: Workload, live: Workload, setting: Setting) -> Result:
    left_out: dict[str, str] = {}
    peers = qualify(
        setting.choose(PEERS), lambda peer: check_blocking(peer, saved, live, setting.directory / "check"), left_out
    )
    samples = blocking_rounds(peers, saved, live, setting.directory, setting.rounds, setting.tell)
    for peer in peers:
        record(samples, peer.name, _peaks("blocking", peer, workload, setting))
    return Result(saved.nbytes, samples, left_out)


def _peaks(kind: Literal["blocking", "background"], peer: Named, workload: str, setting: Setting) -> Figures:
    setting.tell(f"memory of {peer.name}")
    return peaks_of(kind, peer.name, workload, setting.scale, setting.directory)


def _lora(setting: Setting) -> Result:
    saved, live = (WORKLOADS["lora"](setting.scale, seed) for seed in (1, 2))
    peers = setting.choose(LORA_PEERS)
    samples = changes_rounds(peers, saved, live, setting.directory, setting.rounds, setting.tell)
    return Result(saved.nbytes, samples)


def _training(setting: Setting) -> Result:
    training, other = Training(setting.scale, 1), Training(setting.scale, 2)
    left_out: dict[str, str] = {}
    peers = qualify(
        setting.choose(TRAINING_PEERS),
        lambda peer: check_training(peer, training, other.workload, setting.directory / "check"),
        left_out,
    )
    samples = training_rounds(peers, training, setting.directory, setting.rounds, setting.tell)
    return Result(training.workload.nbytes, samples, left_out)


def _planning(setting: Setting) -> Result:
    return Result(0, planning_rounds(setting.scale, setting.directory, setting.rounds, setting.tell))


def _spacing(setting: Setting) -> Result:
    training = Training(setting.scale, 1)
    samples = spacing_rounds(training, setting.scale, setting.directory, setting.rounds, setting.tell)
    return Result(training.workload.nbytes, samples)


CASES: dict[str, Callable[[Setting], Result]] = {
    "gpt2": _gpt2,
    "many": _many,
    "lora": _lora,
    "training": _training,
    "planning": _planning,
    "spacing": _spacing,
}
