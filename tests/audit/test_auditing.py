"""The functions of ``holdfast.audit``, and everything that cannot be audited."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.audit import Auditor, assert_resumes_exactly, audit
from holdfast.audit.interpreters import INSIDE, Interpreter
from holdfast.errors import AuditError, UsageError

UNUSABLE = Path(__file__).with_name("unusable.py")


def sound() -> tuple[dict[str, Any], Callable[[], float]]:
    """Resumes exactly."""
    total = torch.zeros(1)
    return {"total": total}, lambda: float(total.add_(torch.rand(1)))


def unsound() -> tuple[dict[str, Any], Callable[[], int]]:
    """Counts for itself."""
    numbers = iter(range(10))
    return {"total": torch.zeros(1)}, lambda: next(numbers)


def test_a_function_of_a_test_module_resumes_exactly() -> None:
    """It is found again, although the test runner gave its module a name that nobody can import."""
    assert_resumes_exactly(sound, before=1, after=1)


def test_an_assertion_carries_the_whole_report() -> None:
    """What a test prints is what the command prints: the first difference, both values, the cause."""
    with pytest.raises(AssertionError) as failure:
        assert_resumes_exactly(unsound, before=2, after=1)

    text = str(failure.value)
    assert "unsound does not resume exactly" in text
    assert "first difference: step 3, loss\n    uninterrupted  2\n    resumed        0\n" in text
    assert "cause (iterator): `numbers`" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("returns_one_thing", r"returns_one_thing\(\) must return \(state, step\), found a dict"),
        ("returns_three_things", "found a tuple of 3"),
        ("state_is_a_list", "with a dict of names to objects as state, found a list"),
        ("step_is_a_number", "with a function that does one step as step, found a int"),
        ("NOT_A_FUNCTION", "expected a function, found a int"),
        ("missing", "the module has no missing"),
    ],
)
def test_what_a_function_must_be_and_return(name: str, message: str, auditor: Auditor) -> None:
    """What was expected and what was found, without a traceback."""
    with pytest.raises(UsageError, match=message) as error:
        auditor.audit(f"{UNUSABLE}:{name}", before=1, after=1)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("build_fails", ["build_fails() failed: FileNotFoundError: no data here", "unusable.py", "in build_fails"]),
        ("third_step_fails", ["step 3 failed: ZeroDivisionError", "raise ZeroDivisionError", "in step"]),
        ("step_is_killed", ["was killed by signal 9", "the last words"]),
        ("step_exits", ["step 1 failed: SystemExit"]),
        ("state_cannot_be_saved", ["strange: object cannot be saved exactly"]),
        ("structure_changes", ["holdfast.restore failed", "live objects and checkpoint differ"]),
    ],
)
def test_a_failure_is_told_with_its_place(name: str, words: list[str], auditor: Auditor) -> None:
    """What was being done, the error, and the user's own lines; none of the audit's."""
    with pytest.raises(AuditError) as error:
        auditor.audit(f"{UNUSABLE}:{name}", before=2, after=2)
    assert [word for word in words if word not in str(error.value)] == []
    assert "holdfast/audit" not in str(error.value)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (True, 1), (1, 1.5)])
def test_a_count_of_steps_is_at_least_one(before: Any, after: Any, auditor: Auditor) -> None:
    """Refused before anything runs."""
    with pytest.raises(UsageError, match="expected a number of steps of at least 1"):
        auditor.audit(sound, before=before, after=after)


def test_an_interpreter_that_does_not_start(tmp_path: Path) -> None:
    """What it said before it ended is what is told."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    with (
        pytest.raises(AuditError, match=r"ended with exit code 1(.|\n)*this torch is broken"),
        Interpreter(str(tmp_path), "broken", {"PYTHONPATH": path}) as interpreter,
    ):
        interpreter.run([])


def test_an_audit_within_an_audit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that audits when it is imported would start itself without end."""
    monkeypatch.setenv(INSIDE, "1")

    with pytest.raises(UsageError, match='put that call under: if __name__ == "__main__"'):
        audit(sound)
