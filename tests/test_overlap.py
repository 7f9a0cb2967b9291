"""Saves that copy beside the next forward and backward: the optimizers wait, everything else is copied at the call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import Checkpointer, Every, Run, SaveHandle
from holdfast.errors import StrayWriteError
from holdfast.state import staging

WAIT_S = 60.0


class Copying:
    """Holds back what is copied in the background, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        gather = staging.gather

        def held(images: Any, slots: Any, threads: int, begins: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.begun.set()
                assert self.go_on.wait(WAIT_S)
            gather(images, slots, threads, begins)

        monkeypatch.setattr(staging, "gather", held)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copying]:
    """Copies in the background are held back; they go on at the end of the test in any case."""
    made = Copying(monkeypatch)
    yield made
    made.go_on.set()


@pytest.fixture
def waits(copying: Copying, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies are held back until an optimizer waits for them; a list that says so."""
    told: list[str] = []
    before_step = staging.Staging.before_step

    def watched(stage: staging.Staging) -> None:
        if not stage._done.is_set():
            told.append("waited")
            copying.go_on.set()
        before_step(stage)

    monkeypatch.setattr(staging.Staging, "before_step", watched)
    return told


def overlapping(path: Path, state: dict[str, Any]) -> Checkpointer:
    """A checkpointer that saves when asked."""
    return Checkpointer(path, state, save=Every(steps=10**6), overlap=True)


def values(handle: SaveHandle, *names: str) -> list[Any]:
    """Tensors of what was saved."""
    checkpoint = handle.result(WAIT_S)
    return [checkpoint.read(name).tolist() for name in names]


def train_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step on ones."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.5),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, fused=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.5),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_step_waits(tmp_path: Path, waits: list[str], make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """What is saved is what was there at the call, though the next step changes it: parameters and their state."""
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    train_step(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with overlapping(tmp_path / "run", state) as ckpt:
        holdfast.save(tmp_path / "expected", state)
        ckpt.step()
        handle = ckpt.save()
        train_step(model, optimizer)
        ckpt.step()
        report = handle.report(WAIT_S)
        assert (waits, report.mode) == (["waited"], "overlap")
        found = {name: handle.result().read(name).tolist() for name in handle.result().tensors}
    saved = holdfast.open(tmp_path / "expected")
    assert found == {name: saved.read(name).tolist() for name in saved.tensors}


def test_a_training_with_overlap_equals_one_without(tmp_path: Path) -> None:
    """Saves at every step change nothing, and each of them restores to the bits of a blocking save."""
    found = []
    for overlap in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        run = tmp_path / str(overlap)
        state = {"model": model, "optimizer": optimizer}
        with Checkpointer(
            run, state, save=Every(steps=1), keep=holdfast.KeepLast(9), overlap=overlap, background=overlap
        ) as ckpt:
            for _ in range(5):
                train_step(model, optimizer)
                ckpt.step()
        found.append([{name: c.read(name).tobytes() for name in c.tensors} for c in Run(run)])
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_what_no_optimizer_owns_is_copied_at_the_call(tmp_path: Path, copying: Copying) -> None:
    """Buffers that the next forward writes, an averaged model, plain tensors: by whatever means they are changed."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average = torch.optim.swa_utils.AveragedModel(model)
    state = {"model": model, "optimizer": optimizer, "average": average, "x": torch.zeros(2)}
    with overlapping(tmp_path, state) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        assert copying.begun.wait(WAIT_S)
        model(torch.ones(4, 3))
        for parameter in average.parameters():
            parameter.data.fill_(7)
        state["x"].data.fill_(7)
        copying.go_on.set()
        mean, average_weight, x = values(handle, "model/1.running_mean", "average/module.0.weight", "x/x")
    assert mean == [0.0, 0.0]
    assert 7.0 not in [number for row in average_weight for number in row]
    assert x == [0.0, 0.0]


def test_an_optimizer_that_is_not_in_the_state(tmp_path: Path, copying: Copying) -> None:
    """Its parameters are nobody's: they are copied at the call, and its step need not wait."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.weight.tolist()
    with overlapping(tmp_path, {"model": model}) as ckpt:
        ckpt.step()
        with pytest.warns(UserWarning, match="SGD of 2 parameters is alive"):
            handle = ckpt.save()
        train_step(model, optimizer)
        copying.go_on.set()
        assert values(handle, "model/weight") == [before]
    assert model.weight.tolist() != before


def test_several_optimizers(tmp_path: Path, waits: list[str]) -> None:
    """Whichever steps first waits; each owns what it updates."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.5) for part in model]
    train_step(model, *optimizers)
    before = [part.weight.tolist() for part in model]
    with overlapping(tmp_path, {"model": model, "optimizers": optimizers}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        train_step(model, optimizers[1], optimizers[0])
        assert values(handle, "model/0.weight", "model/1.weight") == before
    assert waits == ["waited"]


def test_optimizers_that_step_in_the_backward(tmp_path: Path, waits: list[str]) -> None:
    """One optimizer a parameter, called by gradient hooks in the middle of a backward."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizers = {}
    for name, parameter in model.named_parameters():
        optimizers[name] = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)

        def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizers[name]) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    train_step(model)
    before = [part.weight.tolist() for part in model]
    with overlapping(tmp_path, {"model": model, "optimizers": optimizers}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        train_step(model)
        assert values(handle, "model/0.weight", "model/1.weight") == before
    assert waits == ["waited"]


def test_an_optimizer_with_a_closure(tmp_path: Path, waits: list[str]) -> None:
    """LBFGS evaluates the model within its step, after the hook, and keeps lists of tensors."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, and takes a tensor
    state = {"model": model, "optimizer": optimizer}
    with overlapping(tmp_path / "run", state) as ckpt:
        holdfast.save(tmp_path / "expected", state)
        ckpt.step()
        handle = ckpt.save()
        optimizer.step(closure)  # type: ignore[arg-type]
        found = {name: handle.result(WAIT_S).read(name).tolist() for name in handle.result().tensors}
    saved = holdfast.open(tmp_path / "expected")
    assert found == {name: saved.read(name).tolist() for name in saved.tensors}
    assert waits == ["waited"]


def test_a_scaler_that_skips_the_step(tmp_path: Path, copying: Copying) -> None:
    """Nothing is written then and nobody waits; the save ends by itself."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    before = model.weight.tolist()
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer, "scaler": scaler}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        scaler.scale(model(torch.full((1, 3), float("inf"))).sum()).backward()
        scaler.step(optimizer)  # the gradients are infinite: it does not call the optimizer
        scaler.update()
        assert copying.begun.wait(WAIT_S)
        assert not handle.done()
        copying.go_on.set()
        assert values(handle, "model/weight") == [before]


def test_a_scaler_that_steps(tmp_path: Path, waits: list[str]) -> None:
    """Through a scaler the optimizer waits as well."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu")
    before = model.weight.tolist()
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer, "scaler": scaler}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert values(handle, "model/weight") == [before]
    assert waits == ["waited"]


def test_a_stray_write(tmp_path: Path, copying: Copying) -> None:
    """Weights written by something else while they are copied: an error of that save, and nothing is visible of it."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        assert copying.begun.wait(WAIT_S)
        with torch.no_grad():
            model.weight.zero_()
        copying.go_on.set()
        with pytest.raises(StrayWriteError, match=r"^weight: written while .* use overlap=False"):
            handle.result(WAIT_S)
        with pytest.raises(StrayWriteError):
            ckpt.step()
        assert list(Run(tmp_path)) == []
        train_step(model, optimizer)  # nobody waits for what was given up
    (checkpoint,) = Run(tmp_path)
    assert checkpoint.read("model/weight").tolist() == model.weight.tolist()


def test_a_copy_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer does not wait for ever for a copy that was given up."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gather = staging.gather

    def fail(images: Any, slots: Any, threads: int, begins: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        gather(images, slots, threads, begins)

    monkeypatch.setattr(staging, "gather", fail)
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.step()
        handle = ckpt.save()
        train_step(model, optimizer)
        with pytest.raises(MemoryError):
            handle.result(WAIT_S)
        monkeypatch.setattr(staging, "gather", gather)
        with pytest.raises(MemoryError):
            ckpt.step()


def test_the_hooks_go_with_the_block(tmp_path: Path) -> None:
    """Outside its block a checkpointer has no part in the optimizers."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.step()
        assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_a_forked_child_does_not_wait(tmp_path: Path, copying: Copying, in_a_fork: Callable[..., int]) -> None:
    """The thread that copies is not in the child; its optimizer steps on the child's own memory."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with overlapping(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save()
        assert copying.begun.wait(WAIT_S)
        assert in_a_fork(optimizer.step) == 0
        copying.go_on.set()
    assert len(list(Run(tmp_path))) == 1
