"""What a restore is going to do, collected before anything is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.checkpoint import Checkpoint
from holdfast.errors import StateMismatchError
from holdfast.format import tree
from holdfast.format.names import GRADIENTS_ENTRY
from holdfast.state.kinds import Kind
from holdfast.state.leaves import SavedArray, SavedLeaves, SavedTensor
from holdfast.state.optimizers import ParameterNames
from holdfast.state.ranks import PerRankShare, decoded
from holdfast.state.report import Findings, Misshapen, RestoreReport
from holdfast.state.sharding import local_of
from holdfast.state.tensors import dtype_name

GENERATORS_LAST = len(Kind) + 1
OVERRIDES = GENERATORS_LAST + 1  # they draw nothing


@dataclass(frozen=True, slots=True)
class Beside:
    """Where a new tensor goes: on a device, and cut over ranks as a DTensor is."""

    like: torch.Tensor
    device: torch.device | str


Place = Callable[[SavedTensor, str], torch.device | str | Beside]


@dataclass(slots=True)
class Plan:
    """What is to be done, collected before anything is."""

    checkpoint: Checkpoint
    names: ParameterNames
    optimizers: set[int]
    strict: bool
    per_rank: PerRankShare = field(default_factory=PerRankShare)
    copies: list[tuple[SavedTensor | SavedArray, Any]] = field(default_factory=list)
    actions: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    forms: dict[str, str] = field(default_factory=dict)
    _fresh: dict[str, Any] = field(default_factory=dict)

    def saved(self, entry: str) -> Any:
        """The saved value of an entry, with its tensors as :class:`SavedTensor`; this rank's where each has its own."""
        if entry in self.per_rank.values:
            return self.per_rank.values[entry]
        return decoded(
            self.checkpoint, entry, self.checkpoint.manifest.state[entry], SavedLeaves(self.checkpoint, entry)
        )

    def gradients(self) -> Iterator[Any]:
        """The saved gradients: those that are cut over ranks or of one process, and this rank's own."""
        node = self.checkpoint.manifest.state.get(GRADIENTS_ENTRY)
        # One process has all of them in one entry; of several, those in it are cut over ranks.
        if node is not None and (GRADIENTS_ENTRY not in self.per_rank.anew or GRADIENTS_ENTRY in self.per_rank.saved):
            yield decoded(self.checkpoint, GRADIENTS_ENTRY, node, SavedLeaves(self.checkpoint, GRADIENTS_ENTRY))
        if GRADIENTS_ENTRY in self.per_rank.values:
            yield self.per_rank.values[GRADIENTS_ENTRY]
        if GRADIENTS_ENTRY in self.per_rank.anew:
            self.findings.notes.append(
                f"{GRADIENTS_ENTRY}: gradients that were not cut over ranks are left out; "
                f"{self.per_rank.saved_world_size} rank(s) saved them, each its own"
            )

    def install(self, order: int, action: Callable[[], object]) -> None:
        """Do ``action`` after the tensors are filled; lower orders first."""
        self.actions.append((order, action))

    def report(self, state: Mapping[str, Any]) -> RestoreReport:
        """The report of what is planned."""
        saved = [*self.checkpoint.manifest.state, *sorted(self.per_rank.saved)]
        entries = (entry for entry in saved if not entry.startswith("_"))
        return self.findings.report(
            path=self.checkpoint.path,
            step=self.checkpoint.step,
            epoch=self.checkpoint.epoch,
            restored=len(self.copies),
            skipped=[entry for entry in entries if entry not in state],
            forms=self.forms,
        )

    def fresh(self, saved: SavedTensor, place: torch.device | str | Beside) -> torch.Tensor:
        """A new tensor for ``saved``; tied ones get one and the same."""
        if isinstance(place, Beside):
            key = f"{saved.key} beside {id(place.like)} on {place.device}"
        else:
            key = f"{saved.key} on {place}"
        if key not in self._fresh:
            self._fresh[key] = (
                saved.new_beside(place.like, place.device) if isinstance(place, Beside) else saved.new(place)
            )
            self.copies.append((saved, self._fresh[key]))
        tensor = self._fresh[key]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def into_tensor(self, saved: SavedTensor, live: torch.Tensor, name: str) -> bool:
        """Plan to fill ``live`` in place; False, and noted, when it has another shape."""
        if live.is_meta or local_of(live).is_meta:
            raise StateMismatchError(
                f"{name}: the live tensor is a meta tensor and has no memory to restore into; "
                "materialize the module first: to_empty(device=...).",
                path=self.checkpoint.path,
                key=name,
            )
        if live.shape != saved.record.shape:
            self.findings.misshapen.append(Misshapen(name, tensor_form(live), saved.form))
            return False
        if dtype_name(live.dtype) != saved.record.dtype:
            self.findings.converted.append(Misshapen(name, tensor_form(live), saved.form))
        self.copies.append((saved, live))
        return True

    def graft(self, saved: Any, live: Any, path: str, place: Place) -> Any:
        """``saved`` with its tensors as live ones: in place where ``live`` has an equal one, else new on ``place``."""
        if isinstance(saved, SavedTensor):
            if isinstance(live, torch.Tensor) and not live.is_meta and _is_alike(live, saved):
                self.copies.append((saved, live))
                return live
            return self.fresh(saved, place(saved, path))
        if isinstance(saved, SavedArray):
            if saved.fits(live):
                self.copies.append((saved, live))
                return live
            if saved.key not in self._fresh:
                self._fresh[saved.key] = saved.new()
                self.copies.append((saved, self._fresh[saved.key]))
            return self._fresh[saved.key]
        if isinstance(saved, dict):
            other = live if isinstance(live, Mapping) else {}
            for key, item in saved.items():
                saved[key] = self.graft(item, other.get(key), tree.child(path, key), place)
            return saved
        if type(saved) in (list, tuple):
            others = live if type(live) is type(saved) else ()
            return type(saved)(
                self.graft(item, others[index] if index < len(others) else None, f"{path}[{index}]", place)
                for index, item in enumerate(saved)
            )
        if isinstance(saved, deque):
            for index, item in enumerate(saved):
                saved[index] = self.graft(item, None, f"{path}[{index}]", place)
        return saved


def _is_alike(live: torch.Tensor, saved: SavedTensor) -> bool:
    return live.shape == saved.record.shape and dtype_name(live.dtype) == saved.record.dtype


def tensor_form(tensor: torch.Tensor) -> str:
    """Dtype and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def saved_device(saved: SavedTensor, path: str) -> str:
    """Where a new tensor goes when nothing says better: the kind of device it was saved from, if there is one."""
    kind = saved.record.device.partition(":")[0]
    if kind == "cuda" and torch.cuda.is_available():
        return saved.record.device if torch.cuda.device_count() > 1 else "cuda"
    if kind == "mps" and torch.backends.mps.is_available():
        return "mps"
    return "cpu"
