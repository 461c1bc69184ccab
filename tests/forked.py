"""Whether this process has copies of itself left: what `os.fork` made and nobody waited for."""

from pathlib import Path

import pytest


def no_children_left() -> bool:
    """Children that run another program, such as multiprocessing's helpers, are somebody else's."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs Linux's /proc to see the children of this process")
    ours = Path("/proc/self/cmdline").read_bytes()
    numbers = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return not any(_runs(pid, ours) for pid in numbers)


def _runs(pid: str, program: bytes) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() in (program, b"")  # empty: a zombie
    except FileNotFoundError:
        return False
