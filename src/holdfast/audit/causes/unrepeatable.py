"""Why a training does not repeat itself, even without an interruption: one condition after the other is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from holdfast.audit import conditions
from holdfast.audit.causes.settings import BENCHMARK, benchmark
from holdfast.audit.experiments import Evidence
from holdfast.audit.report import Cause


def causes(evidence: Evidence) -> Iterator[Cause]:
    """The first condition under which two runs agree; torch's own warnings; or the honest word that there is none."""
    # Where some pairs of runs agree anyway, that a further pair agrees proves nothing.
    always = all(found is not None for found in evidence.between_whole_runs)
    operators: list[str] = []
    for condition, cause in _TESTS.items():
        if condition == conditions.NO_BENCHMARK and evidence.whole.environment.get(BENCHMARK) != "True":
            continue
        agree, warned = evidence.runs_agree(condition)
        operators += [name for name in warned if name not in operators]
        if agree:
            yield cause(always, operators)
            return
    if operators:
        yield _operator(operators, (), certain=False)
        return
    first = min(found.step for found in evidence.between_whole_runs if found is not None)
    yield Cause(
        kind="unknown",
        what="no cause was found",
        evidence=(
            f"two runs without an interruption differ {'before the first step' if not first else f'in step {first}'}",
            _TRIED,
        ),
        advice="What remains: the date, the network, files that change, threads of your own, addresses of objects.",
        certain=False,
    )


def _agree(how: str, always: bool) -> tuple[str, ...]:
    seen = f"with {how}, all runs agree; without, they differ"
    return (seen,) if always else (seen, "without, some runs agree as well: it may be chance")


def _benchmark(always: bool, operators: list[str]) -> Cause:
    return benchmark(certain=always, seen=_agree("it off", always))


def _clock(always: bool, operators: list[str]) -> Cause:
    return Cause(
        kind="clock",
        what="the training depends on the clock: time.time(), time.perf_counter() or another",
        evidence=_agree("a clock that ticks alike in every process", always),
        advice="Let nothing that is computed or saved depend on the time: no seeds, no limits, no measured durations.",
        certain=always,
    )


def _entropy(always: bool, operators: list[str]) -> Cause:
    return Cause(
        kind="entropy",
        what="the training draws from the system's random bytes: os.urandom, secrets, uuid, "
        "or a numpy generator without a seed",
        evidence=_agree("the same bytes from os.urandom in every process", always),
        advice="Seed every generator, and put those of your own into the state.",
        certain=always,
    )


def _algorithms(always: bool, operators: list[str]) -> Cause:
    return _operator(operators, _agree("torch's deterministic algorithms", always), certain=always)


def _threads(always: bool, operators: list[str]) -> Cause:
    seen = _agree("one thread for each operator", always)
    if operators:
        return _operator(operators, seen, certain=always)
    return Cause(
        kind="threads",
        what="threads of one operator race: what it gives depends on which of them is first",
        evidence=seen,
        advice="Look for writes to the same place within one operator, such as indices that are there twice.",
        certain=always,
    )


def _operator(operators: list[str], seen: tuple[str, ...], *, certain: bool) -> Cause:
    names = ", ".join(operators)
    return Cause(
        kind="operator",
        what="an operator does not give the same bits each time" + (f": {names}" if names else ""),
        evidence=(*seen, f"torch warns that {names} has no deterministic implementation") if names else seen,
        advice="Call torch.use_deterministic_algorithms(True): it takes the deterministic form of an operator, "
        "and raises where there is none.",
        certain=certain,
    )


_TRIED = (
    "they differ all the same with a steady clock, with steady random bytes from the system, with one thread, "
    "and with torch's deterministic algorithms"
)
# Races first: they alone may agree by chance, and so under a condition that has nothing to do with them. The clock and
# random bytes never do.
_TESTS: dict[str, Callable[[bool, list[str]], Cause]] = {
    conditions.NO_BENCHMARK: _benchmark,
    conditions.DETERMINISTIC: _algorithms,
    conditions.ONE_THREAD: _threads,
    conditions.CLOCK: _clock,
    conditions.ENTROPY: _entropy,
}
