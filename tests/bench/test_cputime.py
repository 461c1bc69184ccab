"""What processes have used, read from the tables of two kinds of system."""

import os

import pytest

from picker.bench.cputime import Process, cpu_seconds, family, parse_ps, parse_stat, rss_bytes, table

STAT = "812 (odd) name (x) S 7 812 812 0 -1 4194304 99 0 0 0 250 50 11 12 20 0 4 0 4242 5000000 300 1 2 3"


def test_a_stat_line_is_read_behind_a_name_with_parentheses() -> None:
    assert parse_stat(STAT, ticks=100, page=4096) == Process(pid=812, parent=7, cpu=3.0, rss=300 * 4096)


@pytest.mark.parametrize(
    ("clock", "seconds"), [("0:07.25", 7.25), ("1:02:03", 3723.0), ("2-01:00:00", 2 * 86_400 + 3600.0)]
)
def test_a_ps_line_is_read_with_every_form_of_time(clock: str, seconds: float) -> None:
    assert parse_ps(f"  81   7 {clock}  2048") == Process(pid=81, parent=7, cpu=seconds, rss=2048 * 1024)


def test_a_family_is_a_process_with_its_children_and_theirs() -> None:
    parents = {1: 0, 2: 1, 3: 1, 4: 2, 5: 4, 6: 3}
    processes = {pid: Process(pid, parent, 0.0, 0) for pid, parent in parents.items()}
    assert sorted(process.pid for process in family(processes, 2)) == [2, 4, 5]


def test_a_process_that_is_gone_is_an_error() -> None:
    with pytest.raises(ProcessLookupError):
        family({}, 4)


def test_this_process_is_in_the_table_and_has_used_something() -> None:
    assert table()[os.getpid()].parent == os.getppid()
    assert cpu_seconds(os.getpid()) > 0
    assert rss_bytes(os.getpid()) > 1_000_000


def test_cpu_time_never_runs_backwards() -> None:
    before = cpu_seconds(os.getpid())
    assert cpu_seconds(os.getpid()) > before
