"""How often the processes of a training meet: not at every step, where steps are short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_SHARE = 0.01  # of the training's time, for meetings
_LONGEST_S = 0.5  # between two meetings: a signal waits for the next one


class Rhythm:
    """When the processes meet: all count the same calls, and the coordinator says how many pass until the next.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calm = 0
        self._cost_s = math.inf
        self._called_s: float | None = None  # None where what came before was no step
        self._slowest_s = 0.0
        self._step_s = 0.0

    def is_time(self, *, counted: bool) -> bool:
        """Whether they meet at this call; one that is not counted, such as the end of an epoch, they never miss."""
        now_s = self._clock()
        if counted and self._called_s is not None:
            # The slowest: where batches are accumulated most calls come quickly, and the time that counts between few.
            self._slowest_s = max(self._slowest_s, now_s - self._called_s)
        self._called_s = now_s
        if not counted:  # it may come right after a step, and says nothing of how long one takes
            self._calm = 0
            return True
        self._calm -= 1
        return self._calm < 0

    def met(self, took_s: float, calm: int) -> None:
        """They met, which took some time, and will let so many calls pass."""
        self._cost_s = min(self._cost_s, took_s)  # without the time that one waited for another
        self._calm = calm
        self._called_s = self._clock()
        self._slowest_s = 0.0

    def calm(self) -> int:
        """How many calls may pass: as many as it takes for meetings to cost little, and signals not to wait long."""
        self._step_s = self._slowest_s or self._step_s
        if not self._step_s or math.isinf(self._cost_s):
            return 0
        return int(min(self._cost_s / _SHARE, _LONGEST_S) / self._step_s)
