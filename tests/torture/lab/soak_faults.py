"""Errors of the file system, at random, in a training that runs: injected by strace, or by functions of ``os``."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.storage import durable

_INJECTABLE = {
    ("fsync", "fdatasync"): ("EIO", "ENOSPC", "EDQUOT"),
    ("fallocate",): ("ENOSPC", "EIO"),
    ("pwritev", "pwritev2", "pwrite64", "write"): ("EIO", "ENOSPC", "EDQUOT"),
    ("renameat2",): ("EIO", "ENOSPC", "EINVAL"),
    ("rename", "renameat"): ("EIO", "ENOSPC"),
    ("mkdirat", "mkdir"): ("ENOSPC", "EIO"),
    ("linkat", "link"): ("EMLINK", "EPERM", "EIO", "ENOSPC"),
    ("unlinkat", "unlink", "rmdir"): ("EIO", "EROFS"),
    ("openat",): ("EMFILE", "EIO", "ENFILE"),
    ("getdents64",): ("EIO",),
}
"""What a file system may answer to each call."""

_OF_OS = {
    "open": (errno.EMFILE, errno.ENFILE, errno.EIO),
    "listdir": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "pwritev": (errno.EIO, errno.ENOSPC),
    "write": (errno.ENOSPC, errno.EIO),
    "rename": (errno.EIO, errno.ENOSPC),
    "mkdir": (errno.ENOSPC, errno.EIO),
    "link": (errno.EMLINK, errno.EPERM, errno.EIO),
    "unlink": (errno.EIO, errno.EROFS),
    "rmdir": (errno.EIO, errno.EROFS),
}
"""What functions of ``os`` may raise."""
_OF_DURABLE = {
    "_renameat2": (errno.EIO, errno.ENOSPC),
    "_fallocate": (errno.ENOSPC, errno.EIO),
}
"""What functions of the durable module may raise."""

_HOLDFAST = str(Path(durable.__file__).parents[1])
_INJECTED = re.compile(r"(\w+)\(.*= -1 (E\w+) .*\(INJECTED\)|<\.\.\. (\w+) resumed>.*= -1 (E\w+) .*\(INJECTED\)")


def has_strace() -> bool:
    """Whether there is strace, and it may watch."""
    return shutil.which("strace") is not None


class Injector:
    """strace beside a process that runs already, injecting errors until it is ended.

    Args:
        pid: the process.
        rng: chooses what fails.
        output: where strace writes what it saw.
    """

    def __init__(self, pid: int, rng: random.Random, output: Path) -> None:
        self._output = output
        chosen = rng.sample(sorted(_INJECTABLE), k=rng.randint(1, 4))
        calls = [name for names in chosen for name in names]
        rules = []
        for names in chosen:
            error = rng.choice(_INJECTABLE[names])
            when = f"{rng.randint(1, 4)}+{rng.randint(2, 9)}"  # counted in each thread, of which a save has several
            rules += [f"inject={','.join(f'?{name}' for name in names)}:error={error}:when={when}"]
        options = ["-e", "trace=" + ",".join(f"?{name}" for name in calls), "-e", "signal=none"]
        options += [part for rule in rules for part in ("-e", rule)]
        self._process = subprocess.Popen(
            ["strace", "-f", "-q", "-p", str(pid), "-o", str(output), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> Counter[str]:
        """Let go of the process; how often which call failed with which error."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        found: Counter[str] = Counter()
        if self._output.exists():
            for match in _INJECTED.finditer(self._output.read_text(errors="replace")):
                found[f"{match[1] or match[3]} {match[2] or match[4]}"] += 1
            self._output.unlink()
        return found


class PatchedFaults:
    """Functions of ``os`` and the one rename that Python does not know, failing with a probability while switched on.

    Args:
        seed: chooses what fails.
        probability: for each call.
        tell: called with each call that is made to fail, and its error.
    """

    def __init__(self, seed: int, probability: float, tell: Callable[[str], None]) -> None:
        self.on = False
        self._rng = random.Random(seed)
        self._probability = probability
        self._tell = tell
        self._pid = os.getpid()

    def install(self) -> None:
        """Take the place of the functions, in this process."""
        for module, table in ((os, _OF_OS), (durable, _OF_DURABLE)):
            for name, errors in table.items():
                setattr(module, name, self._failing(name.strip("_"), getattr(module, name), errors))

    def _failing(self, name: str, real: Callable[..., Any], errors: tuple[int, ...]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            ours = sys._getframe(1).f_code.co_filename.startswith(_HOLDFAST)  # not a loader that starts its workers
            if self.on and ours and os.getpid() == self._pid and self._rng.random() < self._probability:
                code = self._rng.choice(errors)
                self._tell(f"{name} {errno.errorcode[code]}")
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return maybe
