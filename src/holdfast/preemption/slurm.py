"""Slurm: putting one's own job back into the queue.

Sources: https://slurm.schedmd.com/scontrol.html (requeue), https://slurm.schedmd.com/sbatch.html (``--signal``,
``--requeue``, environment variables).
"""

from __future__ import annotations

import logging
import os
import subprocess

_logger = logging.getLogger("holdfast")
_SCONTROL_S = 20.0  # the controller may be busy, which is when jobs are preempted


def in_job() -> bool:
    """Whether this process belongs to a Slurm job."""
    return bool(os.environ.get("SLURM_JOB_ID"))


def requeue() -> bool:
    """Have Slurm run this job again. Blocks until it has answered; a failure is logged and changes nothing.

    Of the tasks of a job only the first asks, for all of them.

    Returns:
        Whether Slurm has agreed.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SLURM_PROCID", "0") != "0":
        return False
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _logger.error("%s: %s. Put the job back by hand.", " ".join(command), error)
        return False
    if done.returncode != 0:
        _logger.error(
            "%s: exit code %d: %s. Put the job back by hand; a job that was submitted with --no-requeue, or in a "
            "partition that forbids it, cannot be put back.",
            " ".join(command),
            done.returncode,
            (done.stderr or done.stdout).strip(),
        )
        return False
    _logger.info("job %s is in the queue again", job)
    return True
