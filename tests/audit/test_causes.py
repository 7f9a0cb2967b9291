"""Causes that are hard to plant: what is said where the evidence is thin."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.audit import Divergence
from holdfast.audit.causes import lost
from holdfast.audit.comparison import ABSENT, Difference
from holdfast.audit.diagnosis import diagnose
from holdfast.audit.digests import plain_leaf
from holdfast.audit.records import Failure, Outcome, Thing, Watched

LEAF = plain_leaf(0, "int", "0")
DIVERGENCE = Divergence("step", 3, "step 3", (Difference("loss", LEAF, plain_leaf(1, "int", "1")),))
EVERY_CONDITION = ["no benchmark", "deterministic algorithms", "one thread", "clock", "entropy"]


def evidence(**known: Any) -> Any:
    """A divergence in step 3 that nothing explains, but for what is given."""
    same = Outcome(environment={"threads": "1"})
    fixed: dict[str, Any] = {
        "before": 2,
        "halves": SimpleNamespace(whole=same, second=same),
        "whole": Outcome(),
        "resumed": Outcome(),
        "divergence": DIVERGENCE,
        "between_whole_runs": [None, None, None],
        "replay_cures": False,
        "same_interpreter_cures": False,
        "lost": [],
        "cured_by_saving": lambda choices: dict.fromkeys(choices, False),
        "runs_agree": lambda condition: (False, []),
    }
    return SimpleNamespace(**{**fixed, **known})


def thing(name: str, value: int = 0) -> tuple[Thing, Thing]:
    """A variable, after the first half and in the resumed process."""
    return Thing(name, "variable", plain_leaf(value, "int", "1"), True), Thing(name, "variable", LEAF, True)


@pytest.mark.parametrize(
    ("replayed", "words"),
    [(True, "what is missing lives in the process"), (False, "the resumed run differs all the same")],
)
def test_no_cause_is_said_to_be_none(replayed: bool, words: str) -> None:
    """And what is known even so: whether the process or the restore is to blame."""
    _, repeatable, causes = diagnose(evidence(replay_cures=replayed))

    assert repeatable
    assert [(cause.kind, cause.certain) for cause in causes] == [("unknown", False)]
    assert words in causes[0].evidence[1]


def test_a_watched_run_that_failed_is_told() -> None:
    """An audit that saw less than it wanted says so."""
    failed = Outcome(failure=Failure(False, "looking for what is not in the state", "RuntimeError: no"))

    _, _, causes = diagnose(evidence(whole=failed))

    assert causes[0].evidence[2].startswith("a watched run failed while looking for what is not in the state")


def test_settings_that_differ_are_suspects() -> None:
    """Named with both values, and only where nothing better is known."""
    halves = SimpleNamespace(
        whole=Outcome(environment={"threads": "1", "hash seed": "0"}),
        second=Outcome(environment={"threads": "2", "hash seed": "random"}),
    )

    _, _, causes = diagnose(evidence(halves=halves))

    assert [(cause.kind, cause.certain, cause.evidence) for cause in causes] == [
        ("setting", False, ("1 in the uninterrupted run, 2 in the resumed one",))
    ]


def test_benchmark_is_a_suspect_where_nothing_explains_more() -> None:
    """On a machine without a GPU too: the word is possible."""
    on = Outcome(environment={"cudnn.benchmark": "True"})

    _, _, causes = diagnose(evidence(halves=SimpleNamespace(whole=on, second=on)))

    assert [(cause.kind, cause.certain) for cause in causes] == [("benchmark", False)]


def test_what_differs_and_was_not_shown_to_matter_is_a_suspect() -> None:
    """Saving it did not help, so it is only possible; and not named at all where the cause is known."""
    unclear = evidence(lost=[thing("window", 1)])

    assert [(cause.kind, cause.certain) for cause in lost.causes(unclear, explained=False)] == [("variable", False)]
    assert list(lost.causes(unclear, explained=True)) == []


def test_what_helps_only_together_is_named_together() -> None:
    """Each with the experiment that it took part in."""
    both = evidence(
        lost=[thing("one", 1), thing("two", 2)],
        cured_by_saving=lambda choices: {names: len(names) == 2 for names in choices},
    )

    causes = list(lost.causes(both, explained=False))

    assert [cause.certain for cause in causes] == [True, True]
    assert {cause.evidence[1] for cause in causes} == {
        "with all of `one`, `two` saved and restored as well, the resumed run is exact"
    }


def test_gradients_that_nobody_uses_again_are_not_blamed() -> None:
    """They differ after every restore; they count where they were seen to be used."""
    gradients = Thing("model: gradients", "gradients", plain_leaf(1, "dict"), True)
    pair = (gradients, Thing("model: gradients", "gradients", LEAF, True))
    tried: list[Any] = []

    def cured(choices: Any) -> Any:
        tried.extend(choices)
        return dict.fromkeys(choices, True)

    unused = evidence(lost=[pair], cured_by_saving=cured)
    used = evidence(lost=[pair], cured_by_saving=cured, whole=Outcome(watched=Watched(waiting=["model.weight"])))

    assert list(lost.causes(unused, explained=False)) == []
    assert tried == []
    assert [cause.kind for cause in lost.causes(used, explained=False)] == ["gradients"]


@pytest.mark.parametrize(("replayed", "explained"), [(True, False), (False, False), (True, True)])
def test_what_is_alive_and_in_no_variable_is_named_by_its_type(replayed: bool, explained: bool) -> None:
    """Certain where doing the first steps again makes the run exact, and nothing else explains that."""
    hidden = evidence(whole=Outcome(watched=Watched(forgotten=["AdamW of 2 parameters"])), replay_cures=replayed)

    causes = list(lost.causes(hidden, explained=explained))

    assert [(cause.kind, cause.what, cause.certain) for cause in causes] == [
        ("forgotten", "AdamW of 2 parameters is alive and not in the state", replayed and not explained)
    ]


def test_an_iterator_that_moved_is_not_blamed_for_what_something_else_explains() -> None:
    """A progress bar moves too: where saving a variable makes the run exact, it has no part in it."""
    rows = Thing("rows", "iterator", plain_leaf(2, "list_iterator"), savable=False)
    pairs = [(rows, Thing("rows", "iterator", LEAF, savable=False)), thing("count", 2)]
    alone = evidence(
        lost=pairs,
        replay_cures=True,
        cured_by_saving=lambda choices: {names: names == ("count",) for names in choices},
    )

    assert [cause.kind for cause in lost.causes(alone, explained=False)] == ["variable"]
    assert [cause.kind for cause in lost.causes(evidence(lost=pairs[:1], replay_cures=True), explained=False)] == [
        "iterator"
    ]


def test_what_the_resumed_process_does_not_have_at_all_is_a_suspect() -> None:
    """An attribute that a step made cannot be put back, but it can be named."""
    made = (thing("self.cache", 1)[0], Thing("self.cache", "variable", ABSENT, savable=False))

    causes = list(lost.causes(evidence(lost=[made], replay_cures=True), explained=False))

    assert [(cause.kind, cause.certain) for cause in causes] == [("variable", False)]
    assert causes[0].evidence == (
        "after step 2 it was 1; in the resumed process it is not there",
        "with steps 1 to 2 repeated before the restore, the resumed run is exact",
    )


def asked(answers: dict[str, tuple[bool, list[str]]]) -> tuple[list[str], Callable[[str], tuple[bool, list[str]]]]:
    """A stand-in for the experiments, and the list of what was asked."""
    questions: list[str] = []

    def answer(condition: str) -> tuple[bool, list[str]]:
        questions.append(condition)
        return answers.get(condition, (False, []))

    return questions, answer


def test_a_training_that_never_repeats_itself_and_nobody_knows_why() -> None:
    """Every condition was tried, but trying out algorithms, which is off; the honest word is none."""
    questions, answer = asked({})

    divergence, repeatable, causes = diagnose(evidence(between_whole_runs=[DIVERGENCE] * 3, runs_agree=answer))

    assert (divergence, repeatable, questions) == (DIVERGENCE, False, EVERY_CONDITION[1:])
    assert [(cause.kind, cause.certain) for cause in causes] == [("unknown", False)]
    assert causes[0].evidence[0] == "two runs without an interruption differ in step 3"


def test_agreement_that_may_be_chance_is_no_proof() -> None:
    """Where some runs agree anyway, what makes them agree is only possible."""
    _, answer = asked({"one thread": (True, [])})

    _, _, causes = diagnose(evidence(between_whole_runs=[DIVERGENCE, None, DIVERGENCE], runs_agree=answer))

    assert [(cause.kind, cause.certain) for cause in causes] == [("threads", False)]
    assert "it may be chance" in causes[0].evidence[1]


def test_an_operator_that_torch_warns_about_is_possible() -> None:
    """It is named even where no condition makes the runs agree."""
    _, answer = asked({"deterministic algorithms": (False, ["put_"])})

    _, _, causes = diagnose(evidence(between_whole_runs=[DIVERGENCE] * 3, runs_agree=answer))

    assert [(cause.kind, cause.certain) for cause in causes] == [("operator", False)]
    assert "put_" in causes[0].what
