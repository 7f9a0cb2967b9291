"""One checkpoint written."""

from __future__ import annotations

import getpass
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

import holdfast
from holdfast.errors import CorruptCheckpointError, StorageError, UnsupportedValueError, UsageError
from holdfast.format import envelope
from holdfast.format.dtypes import DTYPES
from holdfast.format.records import CHUNK_BYTES
from holdfast.storage import durable
from holdfast.storage.local import LocalStore
from holdfast.storage.local_pending import LocalPending

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Tied(torch.nn.Module):
    """Two names for one weight, a buffer, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.out = torch.nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("cache", torch.zeros(9), persistent=False)


def test_what_it_returns(tmp_path: Path) -> None:
    """The checkpoint, reopened, with what was said of it."""
    checkpoint = holdfast.save(tmp_path / "a/b/x", {"c": 1}, step=5, epoch=2, metrics={"loss": 0.5})
    assert (checkpoint.path, checkpoint.step, checkpoint.epoch) == (str(tmp_path / "a/b/x"), 5, 2)
    assert (checkpoint.metrics, checkpoint.generation) == ({"loss": 0.5}, 1)
    checkpoint.verify()


def test_files_are_standard(tmp_path: Path) -> None:
    """One file an entry that has tensors; the safetensors library reads names, bits and metadata of each."""
    model = Tied()
    checkpoint = holdfast.save(tmp_path / "x", {"model": model, "w": torch.ones(2), "c": {"lr": 0.1}})
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert files == ["manifest.json", "model.safetensors", "w.safetensors"]
    loaded = load_file(tmp_path / "x/model.safetensors")
    expected = model.state_dict()
    assert set(loaded) == set(expected) - {"out.weight"}
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    with safe_open(tmp_path / "x/model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "holdfast_checkpoint_id": checkpoint.checkpoint_id,
            "out.weight": "embed.weight",
        }


def test_tied_weights_are_stored_once_and_tied_by_other_tools(tmp_path: Path) -> None:
    """Safetensors' own load_model ties them again."""
    model, other = Tied(), Tied()
    holdfast.save(tmp_path / "x", {"model": model})
    assert load_model(other, tmp_path / "x/model.safetensors") == (set(), [])
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.out.weight is other.embed.weight


def test_tensors_begin_on_a_page(tmp_path: Path) -> None:
    """So that a file can be mapped or read past the cache; and nothing lies between them."""
    state = {"t": {name: torch.zeros(3, dtype=getattr(torch, name)) for name in DTYPES}}
    manifest = holdfast.save(tmp_path / "x", state).manifest
    places = sorted((record.pieces[0].begin, record.nbytes) for record in manifest.tensors["t"].values())
    assert places[0][0] % 4096 == 0
    for (begin, nbytes), (following, _) in itertools.pairwise(places):
        assert begin + nbytes == following
    assert sum(places[-1]) == manifest.files["t.safetensors"].bytes


def test_logical_values_are_saved(tmp_path: Path) -> None:
    """Views, transposed, expanded, channels last, conjugated: what the view shows, and no more."""
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "narrow": base[:, 1:2],
        "transposed": base.permute(3, 2, 1, 0),
        "expanded": torch.arange(3).expand(2, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "conj": complex_.conj(),
        "neg": torch._neg_view(torch.ones(2)),
        "imag": complex_.conj().imag,
        "step": torch.arange(10)[::3],
    }
    checkpoint = holdfast.save(tmp_path / "x", {"t": state})
    for name, tensor in load_file(tmp_path / "x/t.safetensors").items():
        assert torch.equal(tensor, state[name].resolve_conj().resolve_neg()), name
    formats = {name: record.memory_format for name, record in checkpoint.manifest.tensors["t"].items()}
    assert {name for name, found in formats.items() if found != "contiguous"} == {"channels_last"}
    assert checkpoint.tensors["t/narrow"].nbytes == 32


def test_large_tensors_in_many_chunks(tmp_path: Path) -> None:
    """Whole chunks are read and written side by side: however the tensors lie, the bits are the same."""
    base = torch.arange(3 * CHUNK_BYTES // 8, dtype=torch.int64)[: 3 * CHUNK_BYTES // 8 // 105 * 105].reshape(5, 7, -1)
    state = {"a": base.permute(2, 0, 1), "b": base[:, ::2], "c": base.double(), "n": base[..., 1:].numpy().T}
    checkpoint = holdfast.save(tmp_path / "x", {"t": state})
    assert len(checkpoint.manifest.files["t.safetensors"].xxh3_128) > 6
    live = {
        "a": torch.zeros_like(base).permute(2, 0, 1),
        "b": torch.zeros(5, 8, base.shape[2], dtype=torch.int64)[:, ::2],
        "c": torch.zeros_like(state["c"]),
        "n": np.zeros_like(base[..., 1:].numpy()).T,
    }
    holdfast.restore(checkpoint, {"t": live}, generators=False)
    for found in (holdfast.load(tmp_path / "x")["t"], live):
        assert {name: np.array_equal(found[name], state[name]) for name in state} == dict.fromkeys(state, True)


def test_the_manifest_tells_nothing_of_the_user(tmp_path: Path) -> None:
    """No path, no host, no user, no variables, no arguments."""
    os.environ["HOLDFAST_TEST_SECRET"] = "s3cr3t-value"
    try:
        holdfast.save(tmp_path / "x", {"c": 1})
    finally:
        del os.environ["HOLDFAST_TEST_SECRET"]
    inner = json.loads(bytes(envelope.unseal("manifest", (tmp_path / "x/manifest.json").read_bytes())))
    assert set(inner["environment"]) == {"holdfast", "python", "torch", "numpy", "cuda", "system", "world_size"}
    del inner["state"]["_rng"]  # 2,500 random bytes may spell anything
    text = json.dumps(inner)
    secrets = [str(tmp_path), "s3cr3t-value", socket.gethostname(), str(Path.home()), *sys.argv[:1]]
    assert [secret for secret in secrets if len(secret) > 3 and secret in text] == []
    assert f'"{getpass.getuser()}"' not in text


def test_saving_draws_nothing(tmp_path: Path) -> None:
    """The generators go on as if nothing had happened."""

    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.random(), torch.rand(1).item()

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    model = Tied()
    seed()
    expected = draw()
    seed()
    holdfast.save(tmp_path / "x", {"model": model})
    assert draw() == expected


METRICS: list[tuple[Any, Any]] = [
    (1, 1),
    (0.5, 0.5),
    (True, True),
    ("good", "good"),
    (math.inf, math.inf),
    (torch.tensor(0.5), 0.5),
    (torch.tensor([2]), 2),
    (np.float32(0.5), 0.5),
    (np.array([[3]]), 3),
    (10**30, 10**30),
]


@pytest.mark.parametrize(("given", "kept"), METRICS, ids=repr)
def test_metrics_become_plain(tmp_path: Path, given: Any, kept: Any) -> None:
    """Numbers and text; tensors and arrays of one element give theirs."""
    found = holdfast.save(tmp_path / "x", {"c": 1}, metrics={"m": given}).metrics["m"]
    assert (found, type(found)) == (kept, type(kept))


def test_a_metric_that_is_not_a_number(tmp_path: Path) -> None:
    """Nan is what was measured, and is kept."""
    assert math.isnan(holdfast.save(tmp_path / "x", {"c": 1}, metrics={"m": math.nan}).metrics["m"])


@pytest.mark.parametrize(
    "metrics", [{"m": None}, {"m": [1]}, {"m": torch.ones(2)}, {"m": 1j}, {1: 1}, {"$m": 1}], ids=str
)
def test_bad_metrics(tmp_path: Path, metrics: Any) -> None:
    """Refused before anything is written."""
    with pytest.raises(UsageError, match="metrics"):
        holdfast.save(tmp_path / "x", {"c": 1}, metrics=metrics)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"step": -1}, {"step": 1.5}, {"step": True}, {"epoch": -1}, {"epoch": None}], ids=str
)
def test_bad_steps(tmp_path: Path, arguments: Any) -> None:
    """Refused before anything is written."""
    with pytest.raises(UsageError, match="expected an int"):
        holdfast.save(tmp_path / "x", {"c": 1}, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "state", [{"a/b": 1}, {"": 1}, {"_rng": 1}, {1: 1}, {"A": 1, "a": 2}, [1], None, torch.ones(1)], ids=str
)
def test_bad_states(tmp_path: Path, state: Any) -> None:
    """A state is a mapping of names that can be files'."""
    with pytest.raises(UsageError, match="state"):
        holdfast.save(tmp_path / "x", state)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_found_before_anything_is(tmp_path: Path) -> None:
    """The error names the path; not even a directory is made."""
    with pytest.raises(UnsupportedValueError, match=r"c\.f\[0\]: function") as caught:
        holdfast.save(tmp_path / "new/x", {"w": torch.ones(3), "c": {"f": [lambda: 1]}})
    assert caught.value.key == "c.f[0]"
    assert list(tmp_path.iterdir()) == []


def test_tensors_as_keys_are_refused(tmp_path: Path) -> None:
    """They are keys by identity, which no file keeps; also deep within a key."""
    tensor = torch.ones(1)
    for value in ({tensor: 1}, {tensor}, {(1, tensor): 1}):
        with pytest.raises(UnsupportedValueError, match="by identity"):
            holdfast.save(tmp_path / "x", {"c": value})


def test_an_interrupt_during_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves nothing behind."""

    def interrupted(fd: int, views: Any, offset: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwritev", interrupted)
    with pytest.raises(KeyboardInterrupt):
        holdfast.save(tmp_path / "x", {"w": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data first: a manifest speaks only of what is durable."""
    synced: list[str] = []
    sync = os.fsync

    def spy(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        sync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    holdfast.save(tmp_path / "x", {"a": torch.ones(1), "b": torch.ones(1)})
    synced = synced[-5:]  # before, the directories above
    temporary = synced[3]
    assert temporary.startswith(".tmp-")
    assert sorted(synced[:2]) == ["a.safetensors", "b.safetensors"]  # side by side
    assert synced[2:] == ["manifest.json", temporary, tmp_path.name]


def test_the_save_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be opened under its final name is not acknowledged."""
    opened = LocalStore.open

    def lose_a_file(store: LocalStore, name: str) -> Any:
        (Path(store.path) / name / "w.safetensors").unlink()
        return opened(store, name)

    monkeypatch.setattr(LocalStore, "open", lose_a_file)
    with pytest.raises(holdfast.errors.CorruptCheckpointError, match=r"w\.safetensors: is missing"):
        holdfast.save(tmp_path / "x", {"w": torch.ones(3)})


def test_an_error_of_the_storage_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and nothing left behind."""

    def fails(file: durable.Descriptor) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(durable, "sync_file", fails)
    with pytest.raises(StorageError, match=r"cannot write .*w\.safetensors: Input/output error"):
        holdfast.save(tmp_path / "run/x", {"w": torch.ones(3)})
    assert list((tmp_path / "run").iterdir()) == []


def test_more_entries_than_files_may_be_open(tmp_path: Path) -> None:
    """Files are written, verified and read some at a time."""
    script = """
import resource, sys, torch, holdfast
state = {f"entry{number}": torch.full((3,), float(number)) for number in range(100)}
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
holdfast.save(sys.argv[1], state)
holdfast.open(sys.argv[1]).verify()
loaded = holdfast.load(sys.argv[1])
assert all(loaded[name].tolist() == state[name].tolist() for name in state)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_manifest_that_is_another_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed is looked at again: a valid manifest that is not the one written is damage, not success."""
    other = Path(holdfast.save(tmp_path / "other", {"w": torch.zeros(3)}).path) / "manifest.json"
    commit = LocalPending.commit

    def tampered(pending: LocalPending, name: str, manifest: bytes) -> None:
        commit(pending, name, manifest)
        (tmp_path / name / "manifest.json").write_bytes(other.read_bytes())

    monkeypatch.setattr(LocalPending, "commit", tampered)
    with pytest.raises(CorruptCheckpointError, match="is not what was just written"):
        holdfast.save(tmp_path / "x", {"w": torch.ones(3)})
