"""The small GPT on several processes, its parameters and its optimizer's state sharded over them by FSDP2.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node=2 --max-restarts=3 examples/fsdp.py

What differs from a training on one process is PyTorch's: the process group, ``fully_shard``, a share of the data for
each rank. The ``Checkpointer`` is the same on every rank. Kill any process, or all of them: torchrun, or the same line
typed again, continues with the bits of a run that nobody stopped. Give another ``--nproc-per-node``, and it continues
with the same samples in the same batches. (The variable has each restart begin with a store of its own, see
docs/distributed.md.)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digest import digest
from gpt import GPT, Stretches, evaluate, load_text, loss_of, make_optimizer, make_scheduler
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

from holdfast import Checkpointer, Every, KeepBest, KeepLast
from holdfast.data import ResumableDataLoader


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or continue to train, and report."""
    options = parse(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """What each process does."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = load_text(options.characters)
    model = make_model(options, len(text.alphabet))
    optimizer = make_optimizer(model, options.lr)
    scheduler = make_scheduler(optimizer, total_steps=options.epochs * options.steps)
    loader = ResumableDataLoader(
        Stretches(text.training, options.context, options.steps * options.batch_size),
        batch_size=options.batch_size // ranks,  # of all ranks together it is the same, however many there are
        shuffle=True,
        seed=options.seed,
        rank=rank,
        world_size=ranks,
    )
    losses: list[float] = []
    torch.manual_seed(options.seed + rank)  # dropout is not the same everywhere
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "losses": losses}
    with Checkpointer(
        options.directory,
        state,
        save=Every(steps=options.save_steps) | Every(epochs=1),
        keep=KeepLast(3) | KeepBest("val_loss", "min"),
        per_rank="reassign",  # on another number of ranks: generators go to those who are there
    ) as ckpt:
        if ckpt.resumed_from is not None and rank == 0:
            print(f"resuming after epoch {ckpt.epoch}, step {ckpt.global_step}, on {ranks} ranks", flush=True)
        for epoch in range(ckpt.epoch, options.epochs):
            model.train()
            for _, inputs, targets in loader:
                loss = loss_of(model, inputs, targets)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                losses.append(mean(loss))
                ckpt.step()
            val_loss = evaluate(model, text.validation, options.batch_size, options.context)
            if rank == 0:
                print(f"epoch {epoch + 1:2d}  train {losses[-1]:.4f}  validation {val_loss:.4f}", flush=True)
            ckpt.end_epoch({"val_loss": val_loss})
    report(options, model, optimizer, losses)


def make_model(options: argparse.Namespace, alphabet: int) -> GPT:
    """The same on all ranks, then cut: each keeps its part of every parameter."""
    torch.manual_seed(options.seed)
    model = GPT(alphabet, options.context, options.width, options.heads, options.layers, options.dropout)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def mean(loss: torch.Tensor) -> float:
    """Over all ranks, each of which has had as many samples."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def report(
    options: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Say in one line what came of it: every bit of the model and the optimizer, put together again."""
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # the others get nothing
        told: dict[str, Any] = {"steps": len(losses), "losses": losses, "digest": digest(list(whole))}
        print(f"finished: {told['steps']} steps, loss {losses[-1]:.4f}\nstate digest {told['digest']}")
        if options.report:
            options.report.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Not --run: torchrun takes that for the beginning of an option of its own.
    parser.add_argument("--directory", type=Path, default=Path("runs/fsdp"), help="of the run's checkpoints")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in an epoch")
    parser.add_argument("--save-steps", type=int, default=20, help="save after so many steps, and after each epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write losses and a digest to this file, as JSON")
    parser.add_argument("--characters", type=int, default=1_000_000, help="how much of the library to learn from")
    parser.add_argument("--context", type=int, default=64, help="characters that the model sees at once")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of all ranks together in a step")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
