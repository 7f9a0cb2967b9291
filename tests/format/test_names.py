"""The grammar of names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.format import names
from holdfast.format.names import CheckpointName, TemporaryName

NONCE = "0123456789abcdef"


@given(st.integers(0, names.MAX_STEP), st.integers(1, 10**9 - 1))
def test_checkpoint_names_round_trip(step: int, generation: int) -> None:
    """Every step and generation is read back from the name that it gives."""
    name = CheckpointName(step, generation)
    assert CheckpointName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "step-12",
        "step-0000000000012",
        "step-00000000001x",
        "step-000000000012.g1",
        "step-000000000012.g0",
        "step-000000000012.g02",
        "step-000000000012.g2 ",
        "step-000000000012\n",
        "step-000000000012.g",
        "step-" + 12 * "\u0660",
        "Step-000000000012",
        ".tmp-000000000012",
        "",
    ],
)
def test_names_outside_the_grammar_are_strangers(text: str) -> None:
    """What is not exactly a checkpoint's name is nobody's."""
    assert CheckpointName.parse(text) is None


def test_names_sort_by_number() -> None:
    """Step 10 comes after step 9, generation 10 after generation 9."""
    ordered = [CheckpointName(9), CheckpointName(10), CheckpointName(10, 9), CheckpointName(10, 10), CheckpointName(11)]
    backwards = ordered[::-1]
    assert sorted(backwards) == ordered


@given(
    st.integers(0, names.MAX_STEP),
    st.text(min_size=0, max_size=100),
    st.integers(0, 2**31),
    st.text("0123456789abcdef", min_size=16, max_size=16),
)
def test_temporary_names_round_trip(step: int, hostname: str, pid: int, nonce: str) -> None:
    """Whatever the host is called, its temporary names are read back."""
    name = TemporaryName(step, names.host_label(hostname), pid, nonce)
    assert TemporaryName.parse(str(name)) == name
    assert "/" not in str(name)


@pytest.mark.parametrize(
    "text", [".tmp-1-h-1-" + NONCE, ".tmp-000000000001-h-1-abc", ".tmp-", f".tmp-000000000001--1-{NONCE}"]
)
def test_other_temporary_names_are_strangers(text: str) -> None:
    """A directory that merely begins like one of ours is not taken for one."""
    assert TemporaryName.parse(text) is None


def test_trash_and_aside_names() -> None:
    """Names under which checkpoints wait are recognised, and only those."""
    assert names.is_trash(names.trash_name("step-000000000001", NONCE))
    assert not names.is_trash(".trash-x")
    assert names.parse_aside(names.aside_name("best.pt", NONCE)) == "best.pt"
    assert names.parse_aside(".aside-x-best.pt") is None


def test_auxiliary_names() -> None:
    """Only the manifest and the annotations, staged or not, may be there without being listed."""
    found = [
        n for n in ("manifest.json", "annotations.json", names.staged_annotations_name(NONCE)) if names.is_auxiliary(n)
    ]
    assert len(found) == 3
    assert not any(map(names.is_auxiliary, (".annotations.json.x", "model.safetensors", "manifest.json.bak")))


@pytest.mark.parametrize("name", ["model", "a", "A-b_c.d", "0", "x" * 100])
def test_good_entry_names(name: str) -> None:
    """Letters, digits, '_', '-' and single dots."""
    names.check_entry_names([name])
    assert names.is_data_file_name(names.data_file_name(name))


@pytest.mark.parametrize(
    "name", ["", ".a", "_a", "-a", "a/b", "..", "a..b", "a b", "ä", "x" * 101, "a\n", "a\0", 3, None]
)
def test_bad_entry_names(name: object) -> None:
    """A name that could not be a file's everywhere is refused, with the name in the error."""
    with pytest.raises(UsageError, match="becomes the name of a file") as caught:
        names.check_entry_names([name])
    assert caught.value.key == str(name)


def test_entry_names_that_differ_in_case_alone() -> None:
    """Two entries may not become one file on a file system that ignores case."""
    with pytest.raises(UsageError, match="ignores case"):
        names.check_entry_names(["Model", "model"])


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", ".x.safetensors", "x", "a/../b.safetensors", ".safetensors"]
)
def test_data_file_names_that_would_leave_the_directory(name: str) -> None:
    """No data file's name leads out of its checkpoint or hides in it."""
    assert not names.is_data_file_name(name)


@pytest.mark.parametrize("step", [-1, 10**12, 1.0, "1", True, None])
def test_bad_steps(step: object) -> None:
    """A step is an int that a name can hold."""
    with pytest.raises(UsageError, match="step: expected an int"):
        names.check_step(step)
