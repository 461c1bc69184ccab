"""What a process and its descendants have used, as the operating system counts it. Reads only."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table. cpu: seconds of user and system time. rss: resident bytes."""

    pid: int
    parent: int
    cpu: float
    rss: int


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants; raises ProcessLookupError when it is gone."""
    return sum(_exact(process) for process in family(table(), pid))


def rss_bytes(pid: int) -> int:
    """Resident memory of a process and its living descendants; pages they share count for each."""
    return sum(process.rss for process in family(table(), pid))


def family(processes: Mapping[int, Process], pid: int) -> list[Process]:
    """A process and all its descendants; raises ProcessLookupError when there is none."""
    if pid not in processes:
        raise ProcessLookupError(f"there is no process {pid}")
    found = [processes[pid]]
    for member in found:  # grows while it is walked
        found.extend(process for process in processes.values() if process.parent == member.pid)
    return found


def table() -> dict[int, Process]:
    """Every process that can be seen, by id."""
    if _PROC.joinpath("self", "stat").exists():
        found = [_from_proc(entry) for entry in _PROC.iterdir() if entry.name.isdecimal()]
        return {process.pid: process for process in found if process is not None}
    command = ["ps", "-A", "-o", "pid=,ppid=,time=,rss="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {process.pid: process for process in map(parse_ps, lines)}


def _exact(process: Process) -> float:
    """The process's own CPU clock where there is one: the table counts in hundredths of a second."""
    if not sys.platform.startswith("linux"):
        return process.cpu
    try:
        # clock_getcpuclockid(3) is this arithmetic on Linux (CPUCLOCK_SCHED of the whole process).
        return time.clock_gettime(~process.pid << 3 | 2)
    except OSError:
        return process.cpu


def _from_proc(entry: Path) -> Process | None:
    try:
        return parse_stat((entry / "stat").read_text(errors="replace"), page=resource.getpagesize())
    except OSError:  # it ended meanwhile
        return None


def parse_stat(line: str, *, ticks: int = 100, page: int = 4096) -> Process:
    """A line of /proc/PID/stat (proc(5)). ticks: per second; Linux shows 100 to programs on every machine.

    The command's name, in parentheses, may hold anything.
    """
    pid, _, rest = line.partition(" (")
    fields = rest.rpartition(") ")[2].split()
    return Process(int(pid), int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * page)


def parse_ps(line: str) -> Process:
    """A line of `ps -o pid=,ppid=,time=,rss=`; time is [[days-]hours:]minutes:seconds, rss in KiB."""
    pid, parent, clock, rss = line.split()
    days, _, clock = clock.rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return Process(int(pid), int(parent), int(days or 0) * 86_400 + seconds, int(rss) * 1024)
