"""How the C library handles memory that has been freed, where it can be told.

Bodies of some hundred kilobytes come and go with every request. As glibc does it by itself, each is a mapping of its
own, or grows and shrinks the heap: its pages are given back and faulted in anew, cleared, for every copy. To keep them
costs some megabytes and saves a third of the work of a long prompt (`picker bench proxy`).
"""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h: from which size on memory is mapped by itself, and how much may lie free at the end of the heap.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MAPPED_FROM = 8 << 20
_FREE_AT_MOST = 64 << 20


def keep_freed_memory() -> bool:
    """Have up to 64 MB of it kept for the next request; whether that could be told. For the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has none; what mallopt says is 1 where it has understood.
    return mallopt is not None and all(
        mallopt(name, value) == 1
        for name, value in ((_M_MMAP_THRESHOLD, _MAPPED_FROM), (_M_TRIM_THRESHOLD, _FREE_AT_MOST))
    )
