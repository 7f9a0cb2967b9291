"""What stands still is stored once: linked, verified by content, and never taken for what it is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab.sharded import Cells, Pieces, write_sharded
from safetensors.torch import load_file
from torch import nn

import holdfast
from holdfast import Checkpoint, Checkpointer, Every, KeepLast, Run
from holdfast.errors import CorruptCheckpointError
from holdfast.state.unchanged import MIN_GROUP_BYTES

MANY = MIN_GROUP_BYTES // 4  # elements of float32 that are worth a file


def adapted() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A frozen backbone under a small adapter."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"backbone": nn.Linear(MANY // 64, 64), "adapter": nn.Linear(64, 4)})
    model["backbone"].requires_grad_(False)
    return model, torch.optim.SGD(model["adapter"].parameters(), lr=0.1, momentum=0.9)


def train(ckpt: Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps, each saved when the next is done."""
    for _ in range(steps):
        optimizer.zero_grad()
        model["adapter"](model["backbone"](torch.ones(2, MANY // 64))).square().mean().backward()
        optimizer.step()
        ckpt.step()
        ckpt.save().result(60)


def run_adapted(path: Path, steps: int, **options: Any) -> nn.Module:
    """Train the adapted model, as a new process would."""
    model, optimizer = adapted()
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(path, state, save=Every(steps=10**6), keep=KeepLast(9), **options) as ckpt:
        train(ckpt, model, optimizer, steps)
    return model


def inodes(checkpoint: Checkpoint) -> dict[str, int]:
    """The file behind each name."""
    return {name: (Path(checkpoint.path) / name).stat().st_ino for name in checkpoint.files}


FROZEN, REST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("options", [{}, {"background": False}, {"overlap": True}], ids=str)
def test_a_frozen_backbone_is_stored_once(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every checkpoint has it, whole; on the disk it is one file."""
    model = run_adapted(tmp_path, 3, **options)
    checkpoints = list(Run(tmp_path))
    assert [sorted(c.files) for c in checkpoints] == [sorted([FROZEN, REST, INDEX, "optimizer.safetensors"])] * 3
    assert len({inodes(c)[FROZEN] for c in checkpoints}) == 1
    assert len({inodes(c)[REST] for c in checkpoints}) == 3
    for checkpoint in checkpoints:
        checkpoint.verify()
    loaded = holdfast.load(checkpoints[-1].path)["model"]
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    fresh, optimizer = adapted()
    nn.init.zeros_(fresh["backbone"].weight)
    holdfast.restore(checkpoints[1].path, {"model": fresh, "optimizer": optimizer})
    assert torch.equal(fresh["backbone"].weight, model["backbone"].weight)


def test_files_of_several_processes_say_nothing_of_what_stood_still(tmp_path: Path) -> None:
    """A process that resumes from theirs saves one file again: what lay where was a matter of who held it."""
    arrays = {name: np.full(4, number, np.float32) for number, name in enumerate("abc")}
    cuts = {"x/b": Pieces((((0,), (4,)),)), "x/c": Cells((2,))}
    write_sharded(tmp_path / "step-000000000001", {"x": arrays}, cuts)
    state = {"x": {name: torch.zeros(4) for name in arrays}}
    with Checkpointer(tmp_path, state, save=Every(steps=10**6)) as ckpt:
        assert {name: tensor.tolist() for name, tensor in state["x"].items()} == {
            name: array.tolist() for name, array in arrays.items()
        }
        ckpt.step()
        ckpt.save().result(60)
    newest = Run(tmp_path).latest()
    assert newest is not None
    assert [name for name in newest.files if name.startswith("x")] == ["x.safetensors"]


def test_a_resumed_process_goes_on_linking(tmp_path: Path) -> None:
    """It links what the checkpoint that it resumed from stored apart."""
    run_adapted(tmp_path, 1)
    run_adapted(tmp_path, 2)
    assert len({inodes(c)[FROZEN] for c in Run(tmp_path)}) == 1
    assert [c.step for c in Run(tmp_path)] == [1, 2, 3]


def test_the_standard_sharded_layout(tmp_path: Path) -> None:
    """Each file is a standard safetensors file, and the index says which tensor lies where, tied ones too."""
    model, optimizer = adapted()
    model["tied"] = nn.Linear(64, 4)
    model["tied"].weight = model["adapter"].weight
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as ckpt:
        train(ckpt, model, optimizer, 1)
    path = Path(Run(tmp_path)[1].path)
    index = json.loads((path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": sum(p.nbytes for p in model.parameters())},
        "weight_map": {
            "adapter.bias": REST,
            "adapter.weight": REST,
            "backbone.bias": FROZEN,
            "backbone.weight": FROZEN,
            "tied.bias": REST,
            "tied.weight": REST,
        },
    }
    found = {**load_file(path / FROZEN), **load_file(path / REST)}
    expected = model.state_dict()
    assert set(found) == set(expected) - {"tied.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_transformers_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``from_pretrained`` takes the directory of a checkpoint, shared files or not, tied weights included."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="needs transformers, which the dev extra installs")
    sizes = {"vocab_size": 4096, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    for frozen in (False, True):
        model = transformers.GPT2LMHeadModel(config)
        model.transformer.wte.requires_grad_(not frozen)
        checkpoint = Run(tmp_path / str(frozen)).save({"model": model}, step=1)
        assert (INDEX in checkpoint.files) == frozen
        loaded = transformers.GPT2LMHeadModel.from_pretrained(
            checkpoint.path, config=config, generation_config=transformers.GenerationConfig()
        )
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        expected, found = model.state_dict(), loaded.state_dict()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_whole_entry(tmp_path: Path) -> None:
    """A teacher that is all frozen keeps its plain name."""
    teacher = nn.Linear(MANY // 64, 64).requires_grad_(False)
    with Checkpointer(tmp_path, {"teacher": teacher, "x": torch.zeros(1)}, keep=KeepLast(9)) as ckpt:
        for _ in range(2):
            ckpt.step()
            ckpt.save().result(60)
    first, second = Run(tmp_path)
    assert sorted(second.files) == ["teacher.safetensors", "x.safetensors"]
    assert inodes(first)["teacher.safetensors"] == inodes(second)["teacher.safetensors"]
    assert inodes(first)["x.safetensors"] != inodes(second)["x.safetensors"]


def test_what_comes_to_rest_later(tmp_path: Path) -> None:
    """Tensors that nobody wrote to since the last save get a file of their own, and are linked from then on."""
    moving, still = torch.zeros(MANY), torch.ones(MANY)
    with Checkpointer(tmp_path, {"data": {"moving": moving, "still": still}}, keep=KeepLast(9)) as ckpt:
        for _ in range(4):
            moving.add_(1)
            ckpt.step()
            report = ckpt.save().report(60)
    first, _, third, fourth = Run(tmp_path)
    assert sorted(first.files) == ["data.safetensors"]
    shared = "data-00001-of-00002.safetensors"
    assert inodes(third)[shared] == inodes(fourth)[shared]
    assert report.bytes_linked == fourth.files[shared].bytes
    assert [c.read("data/moving")[0] for c in Run(tmp_path)] == [1, 2, 3, 4]
    assert [c.read("data/still")[0] for c in Run(tmp_path)] == [1, 1, 1, 1]


SECRET_WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "data": lambda tensor: tensor.data.add_(1),
    "numpy": lambda tensor: tensor.detach().numpy().__iadd__(1),
    "one byte of it": lambda tensor: tensor.data[-1:].fill_(7),
}


@pytest.mark.parametrize("write", SECRET_WRITES.values(), ids=SECRET_WRITES.keys())
def test_frozen_weights_that_change_all_the_same(tmp_path: Path, write: Callable[[torch.Tensor], object]) -> None:
    """Whatever version counters say, content decides: every checkpoint holds what was there, the rest stays linked."""
    model = nn.ModuleList([nn.Linear(MANY, 1).requires_grad_(False) for _ in range(2)])
    expected = []
    with Checkpointer(tmp_path, {"model": model, "x": torch.zeros(1)}, keep=KeepLast(9)) as ckpt:
        for step in range(5):
            if step == 2:
                write(model[0].weight)
            ckpt.step()
            ckpt.save().result(60)
            expected.append([part.weight.tolist() for part in model])
    checkpoints = list(Run(tmp_path))
    assert [[c.read(f"model/{n}.weight").tolist() for n in (0, 1)] for c in checkpoints] == expected
    files = [inodes(c) for c in checkpoints]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]
    assert files[3][FROZEN] == files[4][FROZEN]
    for checkpoint in checkpoints:
        checkpoint.verify()


def test_a_frozen_weight_of_another_size(tmp_path: Path) -> None:
    """The same names hold something else: it is written, and linked from then on."""
    state = {"teacher": nn.Linear(MANY, 1).requires_grad_(False)}
    with Checkpointer(tmp_path, state, keep=KeepLast(9)) as ckpt:
        for step in range(4):
            if step == 2:
                state["teacher"] = nn.Linear(2 * MANY, 1).requires_grad_(False)
            ckpt.step()
            ckpt.save().result(60)
    found = [inodes(c)["teacher.safetensors"] for c in Run(tmp_path)]
    assert (found[0] == found[1], found[1] == found[2], found[2] == found[3]) == (True, False, True)
    assert Run(tmp_path).latest().read("teacher/weight").shape == (1, 2 * MANY)


def test_an_optimizer_that_counts_no_writes(tmp_path: Path) -> None:
    """A fused optimizer moves no version counter: everything seems to stand still, and nothing is linked wrongly."""
    model = nn.Linear(MANY, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    expected = []
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, keep=KeepLast(9)) as ckpt:
        for _ in range(4):
            model(torch.ones(1, MANY)).sum().backward()
            optimizer.step()
            ckpt.step()
            ckpt.save().result(60)
            expected.append(model.weight.tolist())
    assert [c.read("model/weight").tolist() for c in Run(tmp_path)] == expected
    assert sorted(Run(tmp_path).latest().files) == ["model.safetensors", "optimizer.safetensors"]


def test_small_things_are_not_worth_it(tmp_path: Path) -> None:
    """No file of its own for what takes less than a megabyte."""
    model = nn.ModuleList([nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)])
    with Checkpointer(tmp_path, {"model": model}, keep=KeepLast(9)) as ckpt:
        for _ in range(3):
            ckpt.step()
            ckpt.save().result(60)
    assert sorted(Run(tmp_path).latest().files) == ["model.safetensors"]


def test_without_sharing(tmp_path: Path) -> None:
    """Turned off, everything is written each time, in one file."""
    run_adapted(tmp_path, 2, share_unchanged=False)
    first, second = Run(tmp_path)
    assert sorted(first.files) == ["model.safetensors", "optimizer.safetensors"]
    assert not set(inodes(first).values()) & set(inodes(second).values())


def test_a_run_saved_by_hand(tmp_path: Path) -> None:
    """``Run.save`` links too."""
    model, _ = adapted()
    run = Run(tmp_path)
    run.save({"model": model}, step=1)
    nn.init.zeros_(model["adapter"].weight)
    run.save({"model": model}, step=2)
    first, second = run
    assert inodes(first)[FROZEN] == inodes(second)[FROZEN]
    assert second.read("model/adapter.weight").max() == 0


# ------------------------------------------------------------------------------------- what others do with the files


def test_retention_takes_only_its_own(tmp_path: Path) -> None:
    """The checkpoint that wrote the file goes; the others still have it."""
    run_adapted(tmp_path, 4)
    run = Run(tmp_path)
    run.prune(KeepLast(1))
    (last,) = run
    last.verify()
    assert (Path(last.path) / FROZEN).stat().st_nlink == 1


def test_a_copy_is_complete(tmp_path: Path) -> None:
    """A checkpoint that was copied elsewhere needs nothing of its run."""
    model = run_adapted(tmp_path / "run", 2)
    shutil.copytree(Run(tmp_path / "run").latest().path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    holdfast.open(tmp_path / "copy").verify()
    assert torch.equal(holdfast.load(tmp_path / "copy")["model"]["backbone.weight"], model["backbone"].weight)


def test_damage_is_named_in_every_checkpoint(tmp_path: Path) -> None:
    """One copy on the disk: a flipped bit in it damages all that link it, and each says so."""
    run_adapted(tmp_path, 2)
    file = Path(Run(tmp_path)[1].path) / FROZEN
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for checkpoint in Run(tmp_path):
        with pytest.raises(CorruptCheckpointError, match=FROZEN):
            checkpoint.verify()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOENT])
@pytest.mark.parametrize("options", [{}, {"background": False}], ids=str)
def test_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, options: dict[str, Any]
) -> None:
    """The bytes are written again."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    run_adapted(tmp_path, 2, **options)
    first, second = Run(tmp_path)
    second.verify()
    assert sorted(second.files) == sorted(first.files)
    assert not set(inodes(first).values()) & set(inodes(second).values())


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    """The last checkpoint was removed by somebody: the bytes are written again."""
    model, optimizer = adapted()
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, keep=KeepLast(9)) as ckpt:
        train(ckpt, model, optimizer, 1)
        shutil.rmtree(Run(tmp_path)[1].path)
        train(ckpt, model, optimizer, 1)
    (last,) = Run(tmp_path)
    last.verify()
    assert (last.step, (Path(last.path) / FROZEN).stat().st_nlink) == (2, 1)


def test_a_source_of_another_size(tmp_path: Path) -> None:
    """A file that was cut since is not linked."""
    model, optimizer = adapted()
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, keep=KeepLast(9)) as ckpt:
        train(ckpt, model, optimizer, 1)
        os.truncate(Path(Run(tmp_path)[1].path) / FROZEN, 5)
        train(ckpt, model, optimizer, 1)
    (last,) = Run(tmp_path)
    last.verify()
    assert last.step == 2


def test_a_link_whose_save_fails(tmp_path: Path) -> None:
    """Aborting removes the link, not the file."""
    model, optimizer = adapted()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path, state, keep=KeepLast(9)) as ckpt:
        train(ckpt, model, optimizer, 1)
        file = Path(Run(tmp_path)[1].path) / FROZEN
        (tmp_path / "step-000000000002").mkdir()
        (tmp_path / "step-000000000002" / "stranger").write_text("x")
        train(ckpt, model, optimizer, 1)
        assert file.stat().st_nlink == 2
    assert [c.name for c in Run(tmp_path)] == ["step-000000000001", "step-000000000002.g2"]
