"""Freed memory is kept: a buffer that comes and goes is not faulted in each time."""

import subprocess
import sys

import pytest

_COPIES = """
import resource
from picker.heap import keep_freed_memory
told = {told}
assert not told or keep_freed_memory()
def churn():
    for _ in range(50):
        bodies = [bytes(600_000) + b"x" for _ in range(4)]
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, told: bool) -> int:
    done = subprocess.run([sys.executable, "-c", _COPIES.format(told=told)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_buffers_that_come_and_go_are_not_faulted_in_each_time() -> None:
    kept = faults(told=True)
    assert kept < 5_000
    assert kept < faults(told=False) or kept < 500
