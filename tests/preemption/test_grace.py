"""How much time is left, and how much a save takes."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.preemption.grace import Flag, Request, SaveTimes, usable_s


class Clock:
    """Stands still unless it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """What it shows."""
        return self.now_s


@pytest.mark.parametrize(("grace_s", "usable"), [(0.5, 0.25), (2.0, 1.0), (10.0, 9.0), (20.0, 19.0), (100.0, 95.0)])
def test_what_can_be_used(grace_s: float, usable: float) -> None:
    """All but a second, or a twentieth if that is more, or half if that is less."""
    assert usable_s(grace_s) == usable


@pytest.mark.parametrize(
    ("grace_s", "passed_s", "left_s"),
    [
        (None, 5.0, None),  # nobody said when
        (10.0, 0.0, 9.0),
        (10.0, 4.0, 5.0),
        (4.0, 2.5, 1.0),  # whoever still lives may try
        (4.0, 60.0, 1.0),
    ],
)
def test_what_is_left(grace_s: float | None, passed_s: float, left_s: float | None) -> None:
    """The deadline, less what leaving takes, less what has passed."""
    clock = Clock()
    flag = Flag(grace_s, clock)
    flag.put_up("SIGTERM")
    clock.now_s += passed_s
    assert flag.request is not None
    assert flag.request.left_s(clock.now_s) == left_s


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ([("a", None, False)], ("a", 130.0, False)),
        ([("a", 20.0, False)], ("a", 120.0, False)),  # a notice that knows better
        ([("a", 40.0, False)], ("a", 130.0, False)),  # the grace period holds for whatever comes first
        ([("a", -5.0, False)], ("a", 100.0, False)),  # it is too late already
        ([("a", None, False), ("b", 20.0, False)], ("a", 120.0, False)),
        ([("a", 20.0, False), ("b", None, False)], ("a", 120.0, False)),
        ([("SIGINT", None, True)], ("SIGINT", None, True)),  # a person waits
        ([("SIGINT", None, True), ("a", None, False)], ("a", 130.0, False)),  # and then the machine goes
        ([("a", None, False), ("SIGINT", None, True)], ("a", 130.0, False)),
    ],
)
def test_several_requests(
    requests: list[tuple[str, float | None, bool]], expected: tuple[str, float | None, bool]
) -> None:
    """The first reason counts, the earliest deadline, and a preemption before a person."""
    flag = Flag(30.0, Clock())
    for reason, in_seconds, interrupt in requests:
        flag.put_up(reason, in_seconds=in_seconds, interrupt=interrupt)
    reason, deadline_s, interrupt = expected
    assert flag.request == Request(reason, 100.0, deadline_s, interrupt)


def costs(seconds: float, **others: Any) -> dict[str, Any]:
    """What a log says of a save that took ``seconds``."""
    parts = {"capture_s": 0.0, "plan_s": 0.0, "stage_s": 0.0, "write_s": seconds - 0.25, "commit_s": 0.25}
    return {"event": "save", "stall_s": 9.0, "waited_s": 9.0, **parts, **others}


@pytest.mark.parametrize(
    ("events", "expected_s"),
    [
        ([], None),
        ([costs(2.0)], 2.0),
        ([costs(2.0), costs(3.0), costs(1.0)], 3.0),
        ([costs(9.0), *[costs(1.0)] * 5], 1.0),  # the last five
        ([costs(2.0), {"event": "note"}, costs(1.0, write_s="long"), {}], 2.0),  # what is no save
    ],
)
def test_how_long_a_save_takes(events: list[dict[str, Any]], expected_s: float | None) -> None:
    """The slowest of the last five, from the call until it was durable."""
    assert SaveTimes(events).expected_s == expected_s
