"""New Python interpreters that run the parts of a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import msgspec

from holdfast.audit import records
from holdfast.audit.records import Failure, Job, Outcome
from holdfast.errors import AuditError, UsageError

INSIDE = "HOLDFAST_AUDIT"
"""Set in the processes of an audit, so that a module that audits when it is imported is told so."""

_LAST_LINES = 15


class Interpreter:
    """A new interpreter, with hash order and random seeds of its own. It starts at once and waits for jobs.

    Args:
        directory: for files.
        name: for files.
        variables: environment variables to set.
    """

    def __init__(self, directory: str, name: str, variables: dict[str, str] | None = None) -> None:
        self._stderr = os.path.join(directory, f"{name}{records.LOG}")
        with open(self._stderr, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.audit.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, INSIDE: "1", **(variables or {})},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # so that it and its trainings can be ended together
            )
        self._count = 0
        self._directory = directory
        self._name = name

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs, beside each other where there is room. Blocks.

        Raises:
            AuditError: the interpreter did not start or was ended.
        """
        files = []
        for job in jobs:
            self._count += 1
            files.append(os.path.join(self._directory, f"{self._name}-{self._count}.job"))
            records.write(files[-1], job)
        codes = self._ask(json.dumps(files))
        return [_outcome(job, code) for job, code in zip(jobs, codes, strict=True)]

    def close(self) -> None:
        """End it, with whatever it still runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:  # waits, and closes the pipes
            pass

    def _ask(self, line: str) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise AuditError(f"{sys.executable} ended with exit code {code}.\n{_tail(self._stderr)}")
        codes: list[int] = json.loads(answer)
        return codes

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        self.close()


def _outcome(job: Job, code: int) -> Outcome:
    """What a job recorded; a failure where it did not come to writing it."""
    try:
        return records.read(job.outcome, Outcome)
    except (FileNotFoundError, msgspec.DecodeError):
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        log = _tail(job.outcome + records.LOG)
        return Outcome(failure=Failure(False, f"the {job.part}", f"its process {how}", log))


def _tail(file: str) -> str:
    """The last lines of what a process printed."""
    try:
        with open(file, encoding="utf-8", errors="replace") as log:
            return "".join(log.readlines()[-_LAST_LINES:])
    except FileNotFoundError:
        return ""


def refuse_inside() -> None:
    """Refuse to start an audit within an audit: a module that is imported by one would start the next, without end.

    Raises:
        UsageError: this process belongs to an audit.
    """
    if INSIDE in os.environ:
        raise UsageError(
            'an audit was started by a module that an audit imports; put that call under: if __name__ == "__main__".'
        )
