"""Which core is whose."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from picker.bench.placement import Placement, move, pinned, placement


@pytest.mark.parametrize("cores", [(), (3,)])
def test_nobody_is_pinned_where_there_is_nothing_to_divide(cores: Sequence[int]) -> None:
    assert placement(cores) == Placement(None, None, None)


def test_two_cores_are_one_for_the_subject_and_one_for_the_rest() -> None:
    assert placement((0, 1)) == Placement(subject={1}, gateway={0}, load={0})


def test_with_more_cores_everybody_is_alone() -> None:
    assert placement((0, 1, 4, 5)) == Placement(subject={5}, gateway={4}, load={0, 1})


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_pinning_ends_with_its_block() -> None:
    before = os.sched_getaffinity(0)
    with pinned({min(before)}):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_a_process_that_runs_already_is_moved() -> None:
    one = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        move(process.pid, {one})
        assert os.sched_getaffinity(process.pid) == {one}
        process.communicate(b"\n")
