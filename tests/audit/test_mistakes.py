"""Every planted mistake is found, and its cause is named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.audit import Auditor, AuditReport

MISTAKES = Path(__file__).with_name("mistakes.py")

# The mistake; the kinds of the causes that are named, all of them; and words that have to be among what is said.
RESUMING = {
    "loader_across_the_border": (
        ["data", "generator", "iterator"],
        [
            "the data starts over",
            "draws from torch's CPU generator",
            "step 3 made a new iterator over it in the resumed run",
            "`batches`",
            "ResumableDataLoader",
        ],
    ),
    "iterator_over_a_list": (["iterator"], ["`rows`", "list_iterator", "starts over"]),
    "optimizer_forgotten": (["forgotten"], ["`optimizer` (AdamW)", "AdamW of 2 parameters"]),
    "scheduler_forgotten": (["forgotten"], ["`scheduler` (StepLR)", "StepLR of AdamW"]),
    "hidden_in_a_closure": (["variable"], ["`hidden` (float32 [4])", "is not in the state"]),
    "generator_of_its_own": (["variable"], ["`noise` (Generator)", "is not in the state"]),
    "half_loaded": (["restore"], ["`curriculum` (Curriculum)", "curriculum.seen: 2 after step 2, 0 after the restore"]),
    "buffer_not_persistent": (["buffer"], ["`model.scale` (float32 [])", "persistent=False"]),
    "counter_in_a_closure": (["variable"], ["`count` (int)", "after step 2 it was 2; in the resumed process it is 0"]),
    "attribute_of_a_trainer": (["attribute"], ["`self.average` (float)"]),
    "gradients_waiting": (["gradients"], ["model.weight", "accumulating=True"]),
    "left_in_eval": (["mode"], ["`model` is in another mode", "it was eval(); in the resumed process it is train()"]),
    "order_of_a_set": (["hash order"], ["PYTHONHASHSEED=0", "`order` came out different", "sorted"]),
    "never_seeded": (["unseeded"], ["draws from numpy's generator before anything seeds it"]),
}
REPEATING = {
    "by_the_clock": (["clock"], ["time.time()"]),
    "by_the_system": (["entropy"], ["os.urandom"]),
    "racing_operator": (["operator"], ["put_"]),
    "benchmarked": (["benchmark"], ["torch.backends.cudnn.benchmark is on", "with it off, all runs agree"]),
}


@pytest.fixture(scope="module")
def report_on(auditor: Auditor) -> Callable[[str], AuditReport]:
    """The report on a mistake; each is audited once."""
    return functools.cache(lambda name: auditor.audit(f"{MISTAKES}:{name}", before=2, after=2))


@pytest.mark.parametrize("mistake", [*RESUMING, *REPEATING])
def test_a_mistake_is_found(mistake: str, report_on: Callable[[str], AuditReport]) -> None:
    """The runs differ, and it is told apart whether resuming is to blame."""
    report = report_on(mistake)

    assert (report.exact, report.repeatable) == (False, mistake in RESUMING)


@pytest.mark.parametrize("mistake", [*RESUMING, *REPEATING])
def test_its_cause_is_named(mistake: str, report_on: Callable[[str], AuditReport]) -> None:
    """Those causes and no others, certain, with the names of the user's own variables."""
    report = report_on(mistake)
    kinds, words = (RESUMING | REPEATING)[mistake]

    assert [cause.kind for cause in report.causes] == kinds
    assert all(cause.certain for cause in report.causes)
    assert [word for word in words if word not in str(report)] == []
    assert all(cause.evidence and cause.advice for cause in report.causes)


def test_the_first_difference_is_the_first(report_on: Callable[[str], AuditReport]) -> None:
    """The moment, the value in both runs, and then what follows from it, in the order of the computation."""
    divergence = report_on("counter_in_a_closure").divergence

    assert divergence is not None
    assert (divergence.at, divergence.step, divergence.moment) == ("step", 3, "step 3")
    assert [item.name for item in divergence.differences][:4] == [
        "loss",
        "model.weight",
        "model.bias",
        "optimizer.state.model.weight.exp_avg",
    ]
    assert divergence.first.expected.shown != divergence.first.found.shown


def test_a_value_that_was_not_restored_differs_before_any_step(report_on: Callable[[str], AuditReport]) -> None:
    """It is found where it happens, not where it shows."""
    divergence = report_on("half_loaded").divergence

    assert divergence is not None
    assert [
        (divergence.moment, item.name, item.expected.shown, item.found.shown) for item in divergence.differences
    ] == [("after the restore, before step 3", "curriculum.seen", "2", "0")]
