"""An interpreter of an audit: imports torch once, and runs each job in a process forked from itself.

    python -m holdfast.audit.worker

It reads lines from its standard input, each a JSON list of job files that may run beside each other, and answers each
with a JSON list of the exit codes. What the user's code prints goes to a file beside the outcome.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import sys
import warnings
from typing import Any

import torch

from holdfast.audit import part, records
from holdfast.audit.records import Job

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd")


def main() -> None:
    """Serve jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports a good part of torch: once here, not in every fork
    gc.freeze()  # what is here belongs to no training: forked processes need not look at it again
    for line in sys.stdin:
        files = json.loads(line)
        beside = [files] if not _has_accelerator() else [[file] for file in files]
        codes = [code for some in beside for code in _run(some)]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def _run(files: list[str]) -> list[int | None]:
    """Run jobs beside each other; their exit codes."""
    # A fork is safe here: torch was imported and never used, so it has neither threads nor a GPU yet.
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=_run_job, args=(file, random.getstate())) for file in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run_job(file: str, python_generator: tuple[Any, ...]) -> None:
    # Python seeds this generator anew in each fork, the others stay as they are. Here all parts begin alike, so that a
    # training without a seed can be audited too: what is asked is whether the resumed one goes on as the first would.
    random.setstate(python_generator)
    job = records.read(file, Job)
    log = os.open(job.outcome + records.LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        sys.stdout.flush()
        os.dup2(log, descriptor)
    os.chdir(job.directory)
    records.write(job.outcome, part.run(job))


def _has_accelerator() -> bool:
    """Whether trainings may want a GPU's memory, which has room for one of them at a time."""
    return any(os.path.exists(path) for path in _ACCELERATORS)


if __name__ == "__main__":
    main()
