"""What saves cost a training, measured while it runs."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_QUIET_STEPS = 50
_COSTS = 10
_MOST_TIMES_SLOWER = 3.0  # beside a save; what takes longer was something else, such as an evaluation


class Pace:
    """Measures how much time each save takes from a training: where it stood still, and where its steps went slower.

    A step beside a save is compared with the median of the last steps beside none.

    Args:
        clock: gives seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_s: deque[float] = deque(maxlen=_QUIET_STEPS)
        self._costs_s: deque[float] = deque(maxlen=_COSTS)
        self._measured = 0
        self._going_since_s: float | None = None
        self._saved_at_s = clock()
        self._stall_s: float | None = None  # of the save that is being measured
        self._beside_s: list[float] = []
        self._was_busy = False

    @property
    def cost_s(self) -> float | None:
        """What a save takes from the training: the mean of the last ten; None before the first was measured.

        The first, which makes memory for the others, counts until there is another.
        """
        return statistics.fmean(self._costs_s) if self._costs_s else None

    @property
    def since_save_s(self) -> float:
        """Seconds since the last save went to the background, or since the start when there was none."""
        return self._clock() - self._saved_at_s

    def stop(self, *, busy: bool, whole_step: bool = True) -> bool:
        """The training called: its step, if ``whole_step``, took from :meth:`go` to now.

        Args:
            busy: whether a save is under way.
            whole_step: whether nothing but one step lies in between.

        Returns:
            Whether this completed the measurement of a save.
        """
        step_s = 0.0 if self._going_since_s is None else self._clock() - self._going_since_s
        measured = whole_step and self._going_since_s is not None
        if measured and (self._was_busy or busy):
            self._beside_s.append(step_s)
        elif measured:
            self._quiet_s.append(step_s)
        self._going_since_s = None
        self._was_busy = busy
        if self._stall_s is None or busy:
            return False
        self._measured += 1
        if self._measured == 2:
            self._costs_s.clear()
        self._costs_s.append(self._stall_s + self._slower_by_s())
        self._stall_s = None
        return True

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The training stands still while a save begins."""
        start_s = self._clock()
        yield
        self._saved_at_s = self._clock()
        self._stall_s = self._saved_at_s - start_s
        self._beside_s.clear()
        self._was_busy = True

    def go(self) -> None:
        """The training goes on."""
        self._going_since_s = self._clock()

    def _slower_by_s(self) -> float:
        if not self._quiet_s:
            return 0.0
        usual_s = statistics.median(self._quiet_s)
        extra_s = sum(min(step_s - usual_s, _MOST_TIMES_SLOWER * usual_s) for step_s in self._beside_s)
        return max(0.0, extra_s)
