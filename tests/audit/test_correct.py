"""Trainings that resume exactly are found to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.audit import Auditor, AuditReport

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TRAININGS = {
    "dropout": (f"{HERE / 'correct.py'}:with_dropout", 2),
    "everything": (f"{HERE / 'correct.py'}:with_everything", 2),
    "epochs, with a loader's worker": (f"{HERE / 'correct.py'}:by_epochs", 2),
    "Hugging Face": (f"{HERE / 'correct.py'}:hugging_face", 2),
    "no loss": (f"{HERE / 'correct.py'}:without_a_loss", 1),
    "examples/digits.py": (f"{EXAMPLES / 'digits.py'}:training", 1),
    "examples/gpt.py": (f"{EXAMPLES / 'gpt.py'}:training", 2),
}


@pytest.fixture(scope="module")
def report_on(auditor: Auditor) -> Callable[[str], AuditReport]:
    """The report on a training; each is audited once."""

    def report(name: str) -> AuditReport:
        target, steps = TRAININGS[name]
        return auditor.audit(target, before=steps, after=steps)

    return functools.cache(report)


@pytest.mark.parametrize("name", TRAININGS)
def test_it_resumes_exactly(name: str, report_on: Callable[[str], AuditReport]) -> None:
    """No divergence and no causes."""
    report = report_on(name)

    assert (report.divergence, report.repeatable, report.causes) == (None, True, ())


def test_what_was_compared_is_counted(report_on: Callable[[str], AuditReport]) -> None:
    """Values, bytes over all moments, and each generator: so that nobody takes an empty comparison for a proof."""
    counts = report_on("no loss").counts

    assert (counts.leaves, counts.nbytes, counts.moments) == (1, 2 * 4, 2)
    assert counts.generators == ("Python's generator", "numpy's generator", "torch's CPU generator")
    assert counts.seconds > 0
