"""Retention in a training loop: metrics that come with an epoch, and what goes after each commit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint import Checkpoint
from holdfast.errors import MissingMetricError
from holdfast.handle import SaveHandle
from holdfast.policies import ranking_metrics
from holdfast.run import Retention, Run

_logger = logging.getLogger("holdfast")


class Keeper:
    """Applies a retention policy to a run that is being written.

    Args:
        run: the run.
        policy: what to keep.
    """

    def __init__(self, run: Run, policy: Retention) -> None:
        self._run = run
        self.policy = policy
        self._told_of_no_candidates = False

    def check(self, metrics: Mapping[str, Any]) -> None:
        """Refuse metrics without one that the policy ranks by."""
        for name in ranking_metrics(self.policy):
            if name not in metrics:
                given = ", ".join(metrics) or "none"
                raise MissingMetricError(
                    f"end_epoch: {self.policy} ranks checkpoints by {name!r}, but the metrics given are: "
                    f"{given}. Pass it: end_epoch({{{name!r}: value}}).",
                    key=name,
                )

    def retain(self, checkpoint: Checkpoint) -> None:
        """Remove what is not kept. Only after a commit: nothing goes before its successor is durable."""
        report = self._run.prune(self.policy, protect=[checkpoint.name])
        for removed in report.removed:
            _logger.debug("removed %s", removed.path)
        self._run.store.clean()

    def add_metrics(self, last: SaveHandle | None, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics for which no save was due, where the last checkpoint is of the very same step.

        Args:
            last: the last save, which has ended.
            step: at which the metrics were measured.
            epoch: at whose end.
            metrics: encoded.
        """
        if last is not None and last.step == step and not last.failed():
            self.retain(self._run.add_metrics(last.result(), metrics))
        elif ranking_metrics(self.policy) and not self._told_of_no_candidates:
            self._told_of_no_candidates = True
            _logger.warning(
                "%s: nothing was saved at the end of epoch %d, so its metrics belong to no checkpoint and %s cannot "
                "choose it. Add Every(epochs=1) to save=.",
                self._run.path,
                epoch,
                self.policy,
            )
