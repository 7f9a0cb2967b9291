"""A small GPT learns to write Python, character by character, from the source of Python's own standard library.

    python examples/gpt.py --run runs/gpt

It has what real trainings have: dropout, random shifts of its samples drawn in worker processes, gradients accumulated
over several batches, and autocast to bfloat16. It saves in the middle of epochs. Kill it with SIGKILL or ask it to
leave with SIGTERM, at any moment, and type the same line again: it ends with the bits of a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digest import run_digests
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast import Checkpointer, Every, KeepBest, KeepLast
from holdfast.data import ResumableDataLoader


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or continue to train, report, and write a little Python."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    training = Training(options)
    with Checkpointer(
        options.run,
        training.state,
        save=Every(steps=options.save_steps) | Every(epochs=1),
        keep=KeepLast(3) | KeepBest("val_loss", "min"),
        config=vars(options),
    ) as ckpt:
        if ckpt.resumed_from is not None:
            print(f"resuming after epoch {ckpt.epoch}, step {ckpt.global_step}", flush=True)
        for epoch in range(ckpt.epoch, options.epochs):
            training.model.train()
            for batch in training.loader:  # continues within an epoch, with the very batch that would have come next
                training.accumulate(batch)
                if ckpt.accumulated + 1 < options.accumulate:
                    ckpt.step(accumulating=True)
                else:
                    training.optimize()
                    ckpt.step()
            val_loss = training.evaluate()
            print(training.describe(epoch), flush=True)
            ckpt.end_epoch({"val_loss": val_loss})

    digests = run_digests(training.state)
    print(f"finished: {training.describe(options.epochs - 1)}\nstate digest {digests['all']}")
    if options.report:
        report = {"steps": ckpt.global_step, "history": training.history, "digests": digests}
        options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(write(training.model, training.text.alphabet, "def ", options.sample, options.seed))


def training() -> tuple[dict[str, Any], Callable[[], float]]:
    """A small one, a batch at a time, for ``holdfast audit examples/gpt.py:training``."""
    torch.set_num_threads(1)
    small = "--characters 20000 --context 16 --batch-size 4 --width 16 --layers 1 --steps 4 --accumulate 2"
    training = Training(parse(small.split()))
    training.model.train()

    def batches() -> Iterator[Any]:
        while True:
            yield from training.loader

    endless = batches()

    def step() -> float:
        loss = 0.0
        for _ in range(training.options.accumulate):
            loss = training.accumulate(next(endless))
        training.optimize()
        return loss

    return training.state, step


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/gpt"), help="directory of the run's checkpoints")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps in an epoch")
    parser.add_argument("--save-steps", type=int, default=50, help="save after so many steps, and after each epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write losses and digests to this file, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="bits compare between equal numbers of threads")
    parser.add_argument("--workers", type=int, default=2, help="processes that load data")
    parser.add_argument("--characters", type=int, default=2_000_000, help="how much of the library to learn from")
    parser.add_argument("--context", type=int, default=64, help="characters that the model sees at once")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=2, help="batches in an optimizer step")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--sample", type=int, default=400, help="characters to write at the end")
    return parser.parse_args(argv)


class Training:
    """All that a training is made of, freshly constructed, and what is done with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        random.seed(options.seed)
        np.random.seed(options.seed)
        torch.manual_seed(options.seed)
        self.options = options
        self.text = load_text(options.characters)
        self.model = GPT(
            len(self.text.alphabet), options.context, options.width, options.heads, options.layers, options.dropout
        )
        self.optimizer = make_optimizer(self.model, options.lr)
        self.scheduler = make_scheduler(self.optimizer, total_steps=options.epochs * options.steps)
        samples = options.steps * options.accumulate * options.batch_size
        self.loader = ResumableDataLoader(
            Stretches(self.text.training, options.context, samples),
            batch_size=options.batch_size,
            shuffle=True,
            seed=options.seed,
            num_workers=options.workers,
        )
        self.history: dict[str, Any] = {"loss": [], "val_loss": [], "samples": ""}
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
            "history": self.history,
        }

    def accumulate(self, batch: Sequence[Tensor]) -> float:
        """Add the gradients of one batch to those that wait; the loss of the batch."""
        starts, inputs, targets = batch
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, inputs, targets)
        (loss / self.options.accumulate).backward()
        self.history["loss"].append(loss.item())
        # Which samples it has seen, and in which order, in one line that stands for all of them.
        seen = f"{self.history['samples']} {starts.tolist()}"
        self.history["samples"] = hashlib.sha256(seen.encode()).hexdigest()
        return loss.item()

    def optimize(self) -> None:
        """One step of the optimizer, with the gradients that wait."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def evaluate(self) -> float:
        """Loss on stretches that it was not trained on."""
        val_loss = evaluate(self.model, self.text.validation, self.options.batch_size, self.options.context)
        self.history["val_loss"].append(val_loss)
        return val_loss

    def describe(self, epoch: int) -> str:
        """One line on one epoch."""
        batches = self.options.steps * self.options.accumulate
        losses = self.history["loss"][epoch * batches : (epoch + 1) * batches]
        train_loss, val_loss = sum(losses) / len(losses), self.history["val_loss"][epoch]
        return f"epoch {epoch + 1:2d}  train {train_loss:.4f}  validation {val_loss:.4f}"


@dataclass(frozen=True, slots=True)
class Text:
    """The alphabet, and text as indices into it: nine tenths to train on, and the rest."""

    alphabet: str
    training: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)


def load_text(characters: int) -> Text:
    """The beginning of the standard library's source."""
    parts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if characters <= 0:
            break
        parts.append(path.read_text(encoding="utf-8")[:characters])
        characters -= len(parts[-1])
    text = "".join(parts).encode("ascii", errors="replace").decode("ascii")
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    indices = torch.tensor([index[character] for character in text])
    border = len(indices) * 9 // 10
    return Text(alphabet, indices[:border], indices[border:])


class Stretches(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
    """Stretches of the text at equal distances, each moved a little at random every time it is looked at."""

    def __init__(self, indices: Tensor, context: int, samples: int) -> None:
        self._indices = indices
        self._context = context
        self._samples = samples
        self._distance = max(1, (len(indices) - 2 * context) // samples)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> tuple[int, Tensor, Tensor]:
        """Where it begins, the characters, and the same stretch one character later."""
        start = (sample * self._distance + random.randrange(self._context)) % (len(self._indices) - self._context)
        stretch = self._indices[start : start + self._context + 1]
        return start, stretch[:-1], stretch[1:]


class GPT(nn.Module):
    """Token and position embeddings, blocks of attention, and the token embedding again as the output layer."""

    def __init__(self, alphabet: int, context: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(alphabet, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        self.head.weight = self.tokens.weight  # tied: one tensor under two names
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        """Logits of the next character at each place; ``indices`` and the result begin with batch and place."""
        places = torch.arange(indices.shape[1], device=indices.device)
        hidden = self.tokens(indices) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class Block(nn.Module):
    """Attention to what came before, then a small network at each place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden state after this block, of the same shape."""
        hidden = hidden + self.dropout(self.attend(self.attention_norm(hidden)))
        result: Tensor = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return result

    def attend(self, hidden: Tensor) -> Tensor:
        """Causal attention over the places."""
        batch, places, width = hidden.shape
        parts = self.query_key_value(hidden).view(batch, places, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.projection(attended.transpose(1, 2).reshape(batch, places, width))
        return projected


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Weight decay for matrices; none for biases, norms and the rest."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def make_scheduler(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over a tenth of the steps, then fall along a cosine to a tenth of the peak."""
    warmup_steps = max(1, total_steps // 10)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def draw_batch(indices: Tensor, batch_size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of the text, and the same stretches one character later."""
    starts = torch.randint(len(indices) - context, (batch_size,), generator=generator)
    stretches = indices[starts[:, None] + torch.arange(context + 1)]
    return stretches[:, :-1], stretches[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per character, in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, validation: Tensor, batch_size: int, context: int) -> float:
    """Loss on stretches that it was not trained on: the same ones every time."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(validation, batch_size, context, generator) for _ in range(10)]
    return sum(loss_of(model, inputs, targets).item() for inputs, targets in batches) / len(batches)


@torch.no_grad()
def write(model: GPT, alphabet: str, text: str, length: int, seed: int) -> str:
    """Continue ``text``, drawing from a generator of its own: writing leaves no trace in the training."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.tensor([[alphabet.index(character) for character in text]])
    for _ in range(length):
        probabilities = (model(indices[:, -model.context :])[0, -1] / 0.8).softmax(dim=0)
        indices = torch.cat([indices, torch.multinomial(probabilities, 1, generator=generator)[None]], dim=1)
    return "".join(alphabet[i] for i in indices[0].tolist())


if __name__ == "__main__":
    main()
