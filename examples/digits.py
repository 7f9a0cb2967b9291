"""A small network learns scikit-learn's handwritten digits, and no kill can stop it.

    python examples/digits.py --run runs/digits

Kill it, at any moment, and type the same line again: it continues where it was, and ends with exactly the bits of a
run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digest import run_digests
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from holdfast import Checkpointer, Every, KeepBest, KeepLast


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or continue to train, and report."""
    options = parse(argv)
    images, validation = load_data()
    state = make_state(options.epochs, options.seed)
    history = state["history"]
    with Checkpointer(options.run, state, save=Every(epochs=1), keep=KeepLast(3) | KeepBest("val_loss", "min")) as ckpt:
        if ckpt.epoch:
            print(f"resuming after epoch {ckpt.epoch}", flush=True)
        for epoch in range(ckpt.epoch, options.epochs):
            for _ in epoch_of(state, images, validation):
                ckpt.step()
            print(describe(epoch, history), flush=True)
            ckpt.end_epoch({"val_loss": history["val_loss"][-1], "accuracy": history["accuracy"][-1]})

    digests = run_digests(state)
    print(f"finished: {describe(len(history['val_loss']) - 1, history)}\nstate digest {digests['all']}")
    if options.report:
        report = {"steps": ckpt.global_step, "history": history, "digests": digests}
        options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def training() -> tuple[dict[str, Any], Callable[[], float]]:
    """The same training for ``holdfast audit examples/digits.py:training``: a step is an epoch, where it is saved."""
    images, validation = load_data()
    state = make_state(epochs=12, seed=0)
    return state, lambda: sum(epoch_of(state, images, validation))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="directory of the run's checkpoints")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write losses and digests to this file, as JSON")
    return parser.parse_args(argv)


def load_data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Four fifths of the 1,797 images of 8 by 8 pixels to train on, and the rest."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, validation = order[360:], order[:360]
    return TensorDataset(images[training], labels[training]), (images[validation], labels[validation])


def make_state(epochs: int, seed: int) -> dict[str, Any]:
    """Everything that changes while it learns, as it is before the first epoch."""
    torch.set_num_threads(1)  # sums in another order are other sums: bits compare between equal numbers of threads
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    model = make_model()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    history: dict[str, list[float]] = {"train_loss": [], "val_loss": [], "accuracy": []}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "history": history}


def make_model() -> nn.Module:
    """Two convolutions, with normalisation and dropout."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10)),
    )


def epoch_of(state: Mapping[str, Any], training: TensorDataset, validation: tuple[Tensor, Tensor]) -> Iterator[float]:
    """Learn from every image once, then measure; yields the loss after each batch."""
    model, optimizer, ema, history = state["model"], state["optimizer"], state["ema"], state["history"]
    losses = []
    model.train()
    for images, labels in DataLoader(training, batch_size=64, shuffle=True):
        loss = F.cross_entropy(model(augment(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        yield losses[-1]
    state["scheduler"].step()
    val_loss, accuracy = evaluate(ema, validation)
    history["train_loss"].append(sum(losses) / len(losses))
    history["val_loss"].append(val_loss)
    history["accuracy"].append(accuracy)


def augment(images: Tensor) -> Tensor:
    """Shift, contrast and noise, each from another of the generators that real pipelines draw from."""
    shift = (random.randint(-1, 1), random.randint(-1, 1))
    contrast = float(np.random.uniform(0.8, 1.2))
    return torch.roll(images, shift, dims=(2, 3)) * contrast + 0.1 * torch.randn_like(images)


@torch.no_grad()
def evaluate(model: nn.Module, validation: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and accuracy on images that it was not trained on."""
    images, labels = validation
    logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), accuracy.item()


def describe(epoch: int, history: dict[str, list[float]]) -> str:
    """One line on one epoch."""
    train_loss, val_loss, accuracy = (history[name][epoch] for name in ("train_loss", "val_loss", "accuracy"))
    return f"epoch {epoch + 1:2d}  train {train_loss:.4f}  validation {val_loss:.4f}  accuracy {accuracy:.2%}"


if __name__ == "__main__":
    main()
