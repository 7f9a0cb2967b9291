"""Signals to one function call, beside the handlers that were there before; and what they mean in forked children."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

_logger = logging.getLogger("holdfast")

# A scheduler or a terminal sends these to the whole process group. They are meant for the trainer, and a loader's
# worker that died of one would take the trainer with it before its next step.
_FOR_THE_TRAINER = frozenset({signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT})

_INTERRUPTED = b"\nsaving at the next step, then stopping; once more stops at once\n"


class Signals:
    """Tells of signals as long as it is installed. Earlier handlers are called too, and put back afterwards.

    Ignored signals stay ignored. Only the main thread can install handlers; elsewhere a warning says what to do.

    The first SIGINT is told; each later one does what it did before, which is to raise ``KeyboardInterrupt``.

    Forked children inherit the handlers. There a signal does what it would have done without us, except that workers
    of a torch ``DataLoader`` ignore SIGUSR1, SIGUSR2 and SIGINT.

    Args:
        numbers: the signals.
        tell: called in the handler, with the signal. It must be quick, take no lock but reentrant ones, and not
            log: the handler may have interrupted just that.
    """

    def __init__(self, numbers: Iterable[signal.Signals], tell: Callable[[signal.Signals], None]) -> None:
        self._numbers = tuple(numbers)
        self._tell = tell
        self._earlier: dict[int, Any] = {}
        self._pid = 0
        self._interrupted = False

    def install(self) -> None:
        """Begin to listen."""
        if not self._numbers:
            return
        if threading.current_thread() is not threading.main_thread():
            _logger.warning(
                "this is not the main thread, so no signal can be listened to: %s will end the training without a "
                "save. Enter the Checkpointer's block in the main thread, or have its handlers call "
                "ckpt.request_preemption(reason); notices of clouds work in any case.",
                ", ".join(number.name for number in self._numbers),
            )
            return
        self._pid = os.getpid()
        self._interrupted = False
        self._earlier = {}
        for number in self._numbers:
            earlier = signal.getsignal(number)
            if earlier is None:
                _logger.warning("%s has a handler that is not Python's; it is left as it is", number.name)
            elif earlier != signal.SIG_IGN:
                self._earlier[number] = earlier
                signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the earlier handlers back, where nobody has replaced ours meanwhile."""
        self._pid = 0  # from here on ours do nothing of their own, for whoever may still call them
        if threading.current_thread() is not threading.main_thread():
            return
        for number, earlier in self._earlier.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, earlier)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if not (number in _FOR_THE_TRAINER and _in_loader_worker()):
                self._as_before(number, frame)
            return
        if number == signal.SIGINT:
            if self._interrupted:
                self._as_before(number, frame)
                return
            self._interrupted = True
            os.write(2, _INTERRUPTED)  # to the person at the terminal; logging could be what was interrupted
        self._tell(signal.Signals(number))
        earlier = self._earlier[number]
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _as_before(self, number: int, frame: FrameType | None) -> None:
        """Do what the signal did before we came."""
        earlier = self._earlier[number]
        if callable(earlier):
            earlier(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _in_loader_worker() -> bool:
    """Whether this process is a worker of a torch ``DataLoader``, or about to become one."""
    data = sys.modules.get("torch.utils.data")
    if data is None:
        return False
    # The worker has its info only after it has set itself up; what it is going to run is known from its first moment.
    target = getattr(multiprocessing.current_process(), "_target", None)
    return data.get_worker_info() is not None or str(getattr(target, "__module__", "")).startswith(data.__name__)
