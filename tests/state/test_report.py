"""What a restore tells."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.state.report import Misshapen, RestoreReport, likely_renames

FORM = "float32 [2]"


@pytest.mark.parametrize(
    ("saved", "live", "forms", "expected"),
    [
        (["m/old.w"], ["m/new.w"], {}, []),  # nothing is known of their shapes
        (["m/old.w"], ["m/new.w"], {"m/old.w": FORM, "m/new.w": FORM}, [("m/old.w", "m/new.w")]),
        (["m/old.w"], ["m/new.w"], {"m/old.w": FORM, "m/new.w": "float32 [3]"}, []),
        (["m/a"], ["m/zzzzzzzzzz"], {"m/a": FORM, "m/zzzzzzzzzz": FORM}, []),  # not similar enough
        (
            ["m/enc.0.w", "m/enc.1.w"],
            ["m/encoder.1.w", "m/encoder.0.w"],
            dict.fromkeys(["m/enc.0.w", "m/enc.1.w", "m/encoder.0.w", "m/encoder.1.w"], FORM),
            [("m/enc.0.w", "m/encoder.0.w"), ("m/enc.1.w", "m/encoder.1.w")],
        ),
        (  # each name once
            ["m/layer.w"],
            ["m/layer1.w", "m/layer22.w"],
            dict.fromkeys(["m/layer.w", "m/layer1.w", "m/layer22.w"], FORM),
            [("m/layer.w", "m/layer1.w")],
        ),
    ],
)
def test_likely_renames(saved: Any, live: Any, forms: Any, expected: Any) -> None:
    """Of one dtype and shape, the most similar names first."""
    assert likely_renames(saved, live, forms) == expected


def test_thousands_of_names_end_soon() -> None:
    """Only so many names are compared: two models that have nothing in common still get an answer."""
    saved = [f"m/old.{i}" for i in range(3000)]
    live = [f"m/new.{i}" for i in range(3000)]
    assert len(likely_renames(saved, live, dict.fromkeys([*saved, *live], FORM))) <= 200


def test_in_words() -> None:
    """Every finding is listed under a title, with its number; long lists are cut."""
    report = RestoreReport(
        path="run/x",
        step=3,
        epoch=1,
        restored=2,
        missing=tuple(f"m/{i}" for i in range(14)),
        misshapen=(Misshapen("m/w", "float32 [2]", "float32 [3]"),),
        renames=(("m/a", "m/b"),),
        notes=("a note",),
    )
    assert str(report).splitlines() == [
        "run/x (step 3, epoch 1): 2 tensors match",
        "  in the live objects, but not in the checkpoint (14):",
        *(f"    m/{i}" for i in range(12)),
        "    and 2 more",
        "  of another shape (1):",
        "    m/w: live float32 [2], saved float32 [3]",
        "  likely renamed (1):",
        "    m/a -> m/b",
        "  note (1):",
        "    a note",
    ]


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({}, False),
        ({"skipped": ("optimizer",), "fresh": ("optimizer: model.w",), "dropped": ("x",), "notes": ("x",)}, False),
        ({"missing": ("m/w",)}, True),
        ({"unexpected": ("m/w",)}, True),
        ({"misshapen": (Misshapen("m/w", "", ""),)}, True),
        ({"converted": (Misshapen("m/w", "", ""),)}, True),
    ],
)
def test_what_a_strict_restore_refuses(fields: Any, differs: bool) -> None:
    """Names and shapes; what an optimizer starts afresh is reported and allowed."""
    assert RestoreReport("x", 0, 0, **fields).differs is differs
