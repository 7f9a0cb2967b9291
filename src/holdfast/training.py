"""What a checkpoint of a training loop consists of: the user's state, how far the loop is, and what was recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from holdfast.checkpoint import Checkpoint
from holdfast.config import ConfigChange, config_changes, decode_config, encode_config
from holdfast.format import tree
from holdfast.format.names import CONFIG_ENTRY, LOOP_ENTRY
from holdfast.loaders import Loaders
from holdfast.progress import Progress
from holdfast.state.capture import CapturedEntry, capture
from holdfast.state.forgotten import forgotten
from holdfast.state.rng import capture_global

_logger = logging.getLogger("holdfast")


class Training:
    """A training as it is saved.

    Args:
        state: the live objects.
        config: what the user records.
        path: of the run, for messages.

    Attributes:
        state: as given.
        progress: how far the loop is.
        config_changes: what is not as it was in the checkpoint that was resumed from.

    Raises:
        UnsupportedValueError: ``config`` cannot be written exactly.
    """

    def __init__(self, state: Mapping[str, Any], config: Any, path: str) -> None:
        self.state = state
        self.progress = Progress()
        self.config_changes: tuple[ConfigChange, ...] = ()
        self._path = path
        self._config = encode_config(config)
        self._loaders = Loaders(())
        self._generators: dict[str, Any] | None = None  # of the last step
        self._evaluates = False
        self._was_asked_in_evaluations = False
        self._looked_for_forgotten = False

    # ------------------------------------------------------------------------------------------------ how far it is

    def begin(self, progress: Progress, resumed_from: Checkpoint | None) -> None:
        """The loop begins, with the state as it was in ``resumed_from``."""
        self.progress = progress
        self._loaders = Loaders.in_state(self.state)
        if resumed_from is None:
            _logger.info("starting a new run in %s", self._path)
            return
        where = f"step {progress.step}, epoch {progress.epoch}{self._place_in_epoch()}"
        _logger.info("resumed %s: %s", resumed_from.path, where)
        self._compare_config(resumed_from)

    def count(self, *, accumulating: bool) -> None:
        """A batch was trained on, and unless it is ``accumulating``, the optimizer made its step."""
        if accumulating:
            self.progress.count_batch()
        else:
            self.progress.count_step()
        wanted = self._was_asked_in_evaluations or self._loaders.reached_end()
        self._generators = capture_global() if wanted else None
        self._loaders.note_step()

    def count_epoch(self) -> None:
        """An epoch ended, and whatever comes belongs to the next one."""
        self.progress.count_epoch()
        self._loaders.end_epoch()
        self._loaders.note_step()
        self._generators = None

    def _place_in_epoch(self) -> str:
        """In words; nothing at a border."""
        if self.progress.steps_in_epoch == 0:
            return ""
        into = f", {self.progress.steps_in_epoch} steps into it"
        if self._loaders:
            return into
        return f"{into} (unless something in the state knows the position in the data, the epoch starts over)"

    def _compare_config(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.config
        if self._config is None or saved is None:
            return
        self.config_changes = config_changes(saved, decode_config(self._config))
        if self.config_changes:
            changes = "\n".join(f"  {change}" for change in self.config_changes)
            _logger.warning("%s: the configuration changed since %s:\n%s", self._path, checkpoint.name, changes)

    # ---------------------------------------------------------------------------------------------- what is saved

    def capture(self) -> dict[str, CapturedEntry]:
        """Everything, as it is now; within :meth:`evaluating` with the generators of the last step."""
        generators = self._generators if self._evaluates and self._generators is not None else True
        captured = capture(self.state, generators=generators, gradients=self.progress.accumulated > 0)
        loop = tree.encode(self.progress.entry(), LOOP_ENTRY, tree.OpaqueLeaves())
        captured[LOOP_ENTRY] = CapturedEntry(loop, {}, {})
        if self._config is not None:
            captured[CONFIG_ENTRY] = CapturedEntry(self._config, {}, {})
        return captured

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What is captured in the block lies in an evaluation, which whoever resumes begins anew."""
        self._evaluates = True
        try:
            yield
        finally:
            self._evaluates = False
            self._was_asked_in_evaluations = True

    def warn_of_forgotten(self) -> None:
        """Once: name what is alive, belongs to this training, and is not in its state."""
        if self._looked_for_forgotten:
            return
        self._looked_for_forgotten = True
        for what in forgotten(self.state):
            warnings.warn(
                f"a {what} is alive and not in the state of {self._path}: it will not be saved, and a resumed "
                "training will differ. Add it to the state.",
                stacklevel=4,
            )

    def warn_of_batch_in_hand(self) -> None:
        """Warn where a save would skip the batch that is being trained on."""
        self._loaders.warn_of_batch_in_hand(self._path)
