"""The folder where picker and its Envoy meet: nobody else may enter it, and it goes with its owner.

However the owner ends: one that is killed leaves its folder behind, and the next that begins clears it away. Who lives
is told by a lock that the kernel holds for the owner, in whatever container that is; nothing is judged by a process's
number, which another may have by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("picker.envoy")

PREFIX = "picker-proxy-"
_OWNER = "owner"


@contextlib.contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder for the length of the block, once those that are left of others are gone.

    parent: None for where temporary files go.
    """
    parent = parent or Path(tempfile.gettempdir())
    for path in _left(parent):
        log.info("clearing away %s, whose picker is gone", path)
        shutil.rmtree(path, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name,
        (Path(name) / _OWNER).open("w", encoding="ascii") as owner,
    ):
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(f"{os.getpid()}\n")  # for people
        owner.flush()
        yield Path(name)


def _left(parent: Path) -> list[Path]:
    """Our user's folders whose owners do not live any more."""
    found = []
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another picker clears it away at this moment, or it is not ours
            if path.lstat().st_uid == os.getuid() and _ended(path):
                found.append(path)
    return found


def _ended(path: Path) -> bool:
    """Whether its owner has ended; no for one that is about to begin. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW
    descriptor = os.open(path / _OWNER, flags)
    try:
        if not os.fstat(descriptor).st_size:  # its owner has not taken the lock yet
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
