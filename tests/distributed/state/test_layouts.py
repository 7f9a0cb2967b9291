"""State that is cut over the ranks of a group: captured, and restored from what one process saved.

The checks run in ``layouts_driver.py``, on four ranks; each test here looks at what one of them came to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Passed = Callable[[str], None]

LAYOUTS = ("fsdp", "tp", "fsdp+tp", "hsdp", "ddp")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_state_is_restored_bit_for_bit(passed: Passed, layout: str) -> None:
    """Model and optimizer have what one process saved, the optimizer's state is cut as its parameters are."""
    passed(f"restore trained {layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_that_made_no_step_is_restored_as_one(passed: Passed, layout: str) -> None:
    """What it had before is gone."""
    passed(f"restore young {layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_hold_makes_up_each_tensor(passed: Passed, layout: str) -> None:
    """Each element once, or as often as it is replicated; all ranks say the same of names, ties and the tree."""
    passed(f"capture {layout}")


def test_a_tensor_is_restored_into_any_cut_of_it(passed: Passed) -> None:
    """Along either dimension, along both, twice along one, and whole."""
    passed("any_cut")


def test_a_tensor_of_a_part_of_the_ranks(passed: Passed) -> None:
    """Those hold it, and the others do not."""
    passed("part_of_a_mesh")


def test_parameters_that_fsdp_has_gathered(passed: Passed) -> None:
    """After an evaluation the cut ones are saved and restored nevertheless."""
    passed("after_a_forward")


def test_the_estimate_of_a_state_counts_what_is_here(passed: Passed) -> None:
    """Of a tensor of 16 MiB over four ranks, 4."""
    passed("local_sizes")


def test_another_global_shape_is_refused(passed: Passed) -> None:
    """By name, with both shapes, and nothing is touched."""
    passed("another_shape")


def test_a_tensor_that_waits_for_a_reduction_is_refused(passed: Passed) -> None:
    """It says to redistribute it."""
    passed("unreduced")


def test_ties_are_the_same_on_ranks_that_hold_nothing(passed: Passed) -> None:
    """Ranks agree on the names of a state."""
    passed("tied_where_nothing_is")


def test_a_part_is_not_tied_to_its_whole(passed: Passed) -> None:
    """Though both begin at one address."""
    passed("local_beside_whole")


def test_gradients_that_are_cut(passed: Passed) -> None:
    """They are restored as they are cut, and none of them is kept per rank."""
    passed("gradients")


def test_gradients_that_are_not_cut_are_kept_per_rank(passed: Passed) -> None:
    """Beside them, those that are cut stay where all ranks have theirs."""
    passed("plain_gradients")


def test_gradients_that_fsdp_holds_back_are_refused(passed: Passed) -> None:
    """They are no parameter's, and would be lost."""
    passed("gradients_that_wait")


def test_generators_of_one_process_are_not_taken_by_four(passed: Passed) -> None:
    """Without a choice it is an error; seeded anew, all ranks draw different numbers."""
    passed("other_world_size")


def test_optimizer_state_of_another_shape_than_its_parameter(passed: Passed) -> None:
    """Adafactor's rows and columns come back as tensors that it can compute with."""
    passed("factored_slots")
