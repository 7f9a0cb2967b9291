"""When to save and what to keep: frozen, pure values that are composed with ``|``, which means "any of"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from holdfast.checkpoint import Checkpoint
from holdfast.errors import UsageError
from holdfast.run import Retention, ranked_by

_FAR = 10**9

# ------------------------------------------------------------------------------------------------------- when to save


@dataclass(frozen=True, slots=True)
class Moment:
    """What a save policy is told.

    Attributes:
        event: ``"step"`` after an optimizer step, ``"epoch"`` at the end of an epoch, ``"batch"`` after a batch whose
            gradients wait for the next optimizer step.
        step: optimizer steps done.
        epoch: epochs done.
        since_save_s: seconds since the last save, or since the start when there was none.
        saves: how many saves this process began.
        cost_s: what a save takes from the training, in seconds, as measured; None before the first was.
        busy: whether a save is under way.
    """

    event: Literal["step", "epoch", "batch"]
    step: int
    epoch: int
    since_save_s: float
    saves: int = 0
    cost_s: float | None = None
    busy: bool = False


class SavePolicy(Protocol):
    """Decides when to save. A user's own policy needs only this method."""

    def due(self, moment: Moment) -> str | None:
        """Why a save is due at ``moment``, in words; None when it is not."""


class _SaveOperators:
    """``|`` between save policies, a user's own included."""

    __slots__ = ()

    def __or__(self, other: SavePolicy) -> AnySave:
        return _any_save(self, other)

    def __ror__(self, other: SavePolicy) -> AnySave:
        return _any_save(other, self)


@dataclass(frozen=True, slots=True, repr=False)
class AnySave(_SaveOperators):
    """Due when any of its policies is."""

    policies: tuple[SavePolicy, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))

    def due(self, moment: Moment) -> str | None:
        """The reasons of all that are due."""
        reasons = [reason for policy in self.policies if (reason := policy.due(moment)) is not None]
        return ", ".join(reasons) or None

    def calm_steps(self, step: int) -> int:
        """The fewest of its policies."""
        return min(calm_steps(policy, step) for policy in self.policies)

    def spacing_s(self, cost_s: float) -> float | None:
        """The shortest of those that go by the cost of a save."""
        found = [spacing for policy in self.policies if (spacing := spacing_s(policy, cost_s)) is not None]
        return min(found, default=None)


@dataclass(frozen=True, slots=True, repr=False)
class Every(_SaveOperators):
    """Save at a regular distance; give exactly one of the first four.

    Args:
        steps: after each step whose number is a multiple of this.
        epochs: at the end of each epoch whose number (counted from 1) is a multiple of this.
        minutes: at the first step or end of an epoch this long after the last save.
        overhead: as often as it takes no more than this share of the training time, such as 0.02. What a save costs is
            measured while the training runs: how long it stood still, and how much slower it went beside the save. The
            first save comes at once, to be measured.
        mtbf_hours: with ``overhead``: how long a machine runs until it fails or is taken away, on average. Saves are
            spaced so that the time lost for saving and the time lost by failures are least in sum (Daly, "A higher
            order estimate of the optimum checkpoint interval for restart dumps", 2006), unless that costs more than
            ``overhead`` allows.

    Raises:
        UsageError: none or several were given, or one that is out of its range.
    """

    steps: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    overhead: float | None = None
    mtbf_hours: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in _fields(self).items() if value is not None and name != "mtbf_hours"}
        if len(given) != 1:
            raise UsageError(
                f"Every: expected exactly one of steps=, epochs=, minutes= and overhead=, found {given or 'none'}; "
                "combine several as Every(steps=...) | Every(minutes=...)."
            )
        for name, value in given.items():
            _check_positive(f"Every({name}=)", value, whole=name in ("steps", "epochs"))
        if self.overhead is not None and self.overhead >= 1:
            raise UsageError(
                f"Every(overhead=): expected a share between 0 and 1, such as 0.02, found {self.overhead}."
            )
        if self.mtbf_hours is not None:
            _check_positive("Every(mtbf_hours=)", self.mtbf_hours, whole=False)
            if self.overhead is None:
                raise UsageError("Every(mtbf_hours=): it belongs to overhead=: Every(overhead=0.02, mtbf_hours=...).")

    def __repr__(self) -> str:
        return _as_written(self)

    def due(self, moment: Moment) -> str | None:
        """See :class:`SavePolicy`."""
        if self.steps is not None and moment.event == "step" and moment.step % self.steps == 0:
            return f"every {_plural(self.steps, 'step')}"
        if self.epochs is not None and moment.event == "epoch" and moment.epoch % self.epochs == 0:
            return f"every {_plural(self.epochs, 'epoch')}"
        if self.minutes is not None and moment.since_save_s >= self.minutes * 60:
            return f"every {_plural(self.minutes, 'minute')}"
        return None if self.overhead is None else self._due_by_cost(moment)

    def calm_steps(self, step: int) -> int:
        """How many steps after ``step`` none becomes due at, whatever the time."""
        return _FAR if self.steps is None else self.steps - step % self.steps - 1

    def spacing_s(self, cost_s: float) -> float | None:
        """Seconds between two saves that cost the training ``cost_s`` each; None where the cost does not matter."""
        if self.overhead is None:
            return None
        spacing_s = cost_s / self.overhead
        return spacing_s if self.mtbf_hours is None else max(spacing_s, daly_s(cost_s, self.mtbf_hours * 3600))

    def _due_by_cost(self, moment: Moment) -> str | None:
        """A save under way is not measured yet; neither is anything before the first."""
        if moment.busy or (moment.cost_s is None and moment.saves > 0):
            return None
        why = f"at most {self.overhead:.3g} of the time"
        if moment.cost_s is None:
            return f"{why}: the first, to be measured"
        spacing_s = self.spacing_s(moment.cost_s)
        assert spacing_s is not None
        return f"{why}: every {spacing_s:.3g} s" if moment.since_save_s >= spacing_s else None


def calm_steps(policy: SavePolicy, step: int) -> int:
    """How many steps after ``step`` pass until ``policy`` may want a save for their number; of a user's own, none."""
    count = getattr(policy, "calm_steps", None)
    return int(count(step)) if callable(count) else 0


# -------------------------------------------------------------------------------------------------------- what to keep


class _KeepOperators:
    """``|`` between retention policies, a user's own included."""

    __slots__ = ()

    def __or__(self, other: Retention) -> AnyKeep:
        return _any_keep(self, other)

    def __ror__(self, other: Retention) -> AnyKeep:
        return _any_keep(other, self)


@dataclass(frozen=True, slots=True, repr=False)
class AnyKeep(_KeepOperators):
    """Keeps what any of its policies keeps."""

    policies: tuple[Retention, ...]

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """The union; a checkpoint kept for several reasons has them all."""
        kept: dict[str, str] = {}
        for policy in self.policies:
            for name, why in policy.keep(checkpoints).items():
                kept[name] = f"{kept[name]}, {why}" if name in kept else why
        return kept

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics by which any of the policies ranks."""
        return tuple(metric for policy in self.policies for metric in ranking_metrics(policy))


@dataclass(frozen=True, slots=True)
class KeepLast(_KeepOperators):
    """Keep the ``n`` newest checkpoints."""

    n: int

    def __post_init__(self) -> None:
        _check_positive("KeepLast(n)", self.n, whole=True)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """See :class:`Retention`."""
        return {checkpoint.name: f"last {self.n}" for checkpoint in checkpoints[-self.n :]}


@dataclass(frozen=True, slots=True)
class KeepBest(_KeepOperators):
    """Keep the ``n`` checkpoints with the best ``metric``.

    A checkpoint saved between evaluations has no metric and is no candidate. Not a number never wins; of equals the
    earliest stays.

    Args:
        metric: the name under which it is given to ``end_epoch``.
        mode: ``"min"`` or ``"max"``: which is better is never guessed from the name.
        n: how many.
    """

    metric: str
    mode: str
    n: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise UsageError(f"KeepBest(metric): expected a name, found {self.metric!r}.", key="metric")
        if self.mode not in ("min", "max"):
            raise UsageError(
                f"KeepBest({self.metric!r}, mode): expected 'min' or 'max', found {self.mode!r}.", key="mode"
            )
        _check_positive("KeepBest(n=)", self.n, whole=True)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric that must be given at the end of each epoch."""
        return (self.metric,)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """See :class:`Retention`."""
        best = ranked_by(self.metric, self.mode, checkpoints)[: self.n]
        return {checkpoint.name: f"best {self.metric}" for checkpoint in best}


@dataclass(frozen=True, slots=True, repr=False)
class KeepEvery(_KeepOperators):
    """Keep checkpoints at a regular distance for ever; give exactly one of the two.

    Args:
        steps: those whose step is a multiple of this.
        epochs: of each epoch that is a multiple of this, the first checkpoint saved after it ended.
    """

    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in _fields(self).items() if value is not None}
        if len(given) != 1:
            raise UsageError(f"KeepEvery: expected exactly one of steps= and epochs=, found {given or 'none'}.")
        for name, value in given.items():
            _check_positive(f"KeepEvery({name}=)", value, whole=True)

    def __repr__(self) -> str:
        return _as_written(self)

    def keep(self, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
        """See :class:`Retention`."""
        if self.steps is not None:
            why = f"every {_plural(self.steps, 'step')}"
            return {checkpoint.name: why for checkpoint in checkpoints if checkpoint.step % self.steps == 0}
        assert self.epochs is not None
        why = f"every {_plural(self.epochs, 'epoch')}"
        first: dict[int, str] = {}
        for checkpoint in checkpoints:
            if checkpoint.epoch > 0 and checkpoint.epoch % self.epochs == 0:
                first.setdefault(checkpoint.epoch, checkpoint.name)
        return dict.fromkeys(first.values(), why)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two checkpoints that lose least time in all, if failures come at random.

    Args:
        cost_s: what a checkpoint takes from the training.
        mtbf_s: mean time between failures.

    Source:
        J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
        Computer Systems 22 (2006), equation 37; its first term is Young's estimate of 1974.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio**2 / 9) - cost_s


def spacing_s(policy: object, cost_s: float) -> float | None:
    """Seconds between saves under a policy that goes by what they cost; None for every other policy."""
    of_policy = getattr(policy, "spacing_s", None)
    found: float | None = of_policy(cost_s) if callable(of_policy) else None
    return found


def ranking_metrics(policy: object) -> tuple[str, ...]:
    """The metrics by which a retention policy ranks; a user's own may say so in an attribute ``metrics``."""
    return tuple(getattr(policy, "metrics", ()))


def _any_save(*policies: Any) -> AnySave:
    flat: list[SavePolicy] = []
    for policy in policies:
        if not callable(getattr(policy, "due", None)):
            raise UsageError(f"a save policy has a method due(moment); found {policy!r}, which belongs elsewhere.")
        flat.extend(policy.policies if isinstance(policy, AnySave) else [policy])
    return AnySave(tuple(flat))


def _any_keep(*policies: Any) -> AnyKeep:
    flat: list[Retention] = []
    for policy in policies:
        if not callable(getattr(policy, "keep", None)):
            raise UsageError(
                f"a retention policy has a method keep(checkpoints); found {policy!r}, which belongs elsewhere."
            )
        flat.extend(policy.policies if isinstance(policy, AnyKeep) else [policy])
    return AnyKeep(tuple(flat))


def _fields(policy: Any) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in policy.__dataclass_fields__}


def _as_written(policy: Any) -> str:
    """A policy as its user wrote it."""
    given = ", ".join(f"{name}={value!r}" for name, value in _fields(policy).items() if value is not None)
    return f"{type(policy).__qualname__}({given})"


def _check_positive(what: str, value: object, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise UsageError(f"{what}: expected a positive {'whole ' if whole else ''}number, found {value!r}.")


def _plural(count: float, noun: str) -> str:
    return noun if count == 1 else f"{count:g} {noun}s"
