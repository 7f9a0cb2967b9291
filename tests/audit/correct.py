"""Trainings that resume exactly. Each function builds one."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

Training = tuple[dict[str, Any], Callable[[], Any]]


def with_dropout() -> Training:
    """A network with dropout, which draws from the global generator in each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> float:
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sys.stdout.write("what a training prints stays out of the way\n")
        return float(loss)

    return {"model": model, "optimizer": optimizer}, step


def with_everything() -> Training:
    """Scheduler, averaged weights, counters, and generators of Python, numpy and torch, all in the state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    draw, noise, order = torch.Generator().manual_seed(1), np.random.default_rng(2), random.Random(3)
    progress: dict[str, Any] = {"steps": 0, "losses": []}
    window: list[float] = []  # changes, and is not saved: nothing is computed from it

    def step() -> tuple[Tensor, int]:
        inputs = torch.randn(8, 4, generator=draw) * noise.normal() + order.random()
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
        progress["steps"] += 1
        progress["losses"].append(loss.item())
        window.append(loss.item())
        return loss, progress["steps"]

    state = {"model": model, "averaged": averaged, "optimizer": optimizer, "scheduler": scheduler}
    return {**state, "draw": draw, "noise": noise, "order": order, "progress": progress}, step


def by_epochs() -> Training:
    """A shuffled loader with a worker; a step is an epoch, so that each begins it anew, resumed or not."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(8, 4))

    def step() -> list[float]:
        losses = []
        for (batch,) in DataLoader(data, batch_size=4, shuffle=True, num_workers=1):
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return {"model": model, "optimizer": optimizer}, step


def hugging_face() -> Training:
    """A plain loop over a GPT-2 of Hugging Face, with its dropout on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def step() -> Tensor:
        tokens = torch.randint(64, (2, 16))
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss

    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}, step


def without_a_loss() -> Training:
    """One tensor, and a step that returns nothing."""
    total = torch.zeros(2, dtype=torch.bfloat16)

    def step() -> None:
        total.add_(torch.rand(2))

    return {"total": total}, step
