"""Lightning's ``ModelCheckpoint``, in its own loop."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from peers.peer import LAST, Saves, hold, tensors, workloads

# It advises a person in front of a terminal.
warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Training(pytorch_lightning.LightningModule):
    """Each step makes the next state; the checkpoint of a step is saved after it, before the next begins.

    Args:
        saves: what is said of them; not needed to load.
    """

    def __init__(self, saves: Saves | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._saves = saves
        hold(self, tensors(0))

    def training_step(self, batch: list[Tensor], index: int) -> None:
        """Make the next state."""
        number = index + 1
        self._acknowledge(number - 1)
        self.load_state_dict(tensors(number))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step()
        self.log("number", float(number))
        if self._saves is not None:
            self._saves.begin(number)

    def on_fit_end(self) -> None:
        """The last save is done too."""
        self._acknowledge(LAST)

    def _acknowledge(self, number: int) -> None:
        if self._saves is not None and number > 0:
            self._saves.acknowledge(number)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Without gradients it changes nothing; but Lightning counts its steps."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


@dataclass(frozen=True, slots=True)
class Lightning:
    """The two newest are kept; files are written in the directory for temporary files and moved from there.

    Attributes:
        beside: whether that directory is on the same file system, so that a move is a rename.
    """

    name: str = "Lightning, TMPDIR on the same file system"
    package: str = "pytorch-lightning"
    keeps: int = 2
    beside: bool = True

    def train(self, directory: Path, saves: Saves) -> None:
        """See :class:`peers.peer.Peer`."""
        if self.beside:
            tempfile.tempdir = str(directory / "tmp")
            (directory / "tmp").mkdir()
        else:
            # Then it copies. The recorder reads what write() is given, not what sendfile() takes from elsewhere.
            vars(shutil)["_USE_CP_SENDFILE"] = False
        keep = ModelCheckpoint(
            dirpath=directory / "checkpoints",
            filename="{step}",
            monitor="number",
            mode="max",
            save_top_k=self.keeps,
            every_n_train_steps=1,
        )
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[keep],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        trainer.fit(Training(saves), DataLoader(TensorDataset(torch.zeros(LAST, 1))))

    def name_of(self, number: int) -> str:
        """See :class:`peers.peer.Peer`."""
        return f"step={number}.ckpt"

    def visible(self, directory: Path) -> list[str]:
        """See :class:`peers.peer.Peer`."""
        return sorted(path.name for path in (directory / "checkpoints").glob("*.ckpt"))

    def load(self, directory: Path, name: str) -> Mapping[str, Tensor]:
        """See :class:`peers.peer.Peer`."""
        path = directory / "checkpoints" / name
        loaded: dict[str, Tensor] = Training.load_from_checkpoint(path, map_location="cpu").state_dict()
        return loaded


PEERS = (Lightning(), Lightning("Lightning, TMPDIR on another file system", beside=False))
WORKLOADS = workloads(*PEERS)
