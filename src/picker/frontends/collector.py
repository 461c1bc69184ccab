"""How often Python looks for cyclic garbage while traffic passes: seldom, and never among what was there at the start.

A collection of the oldest generation walks every object of the process: with thousands of open requests that is a
pause for all of them, and it finds next to nothing, because what a request leaves behind is freed by its counts.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

# New objects until the youngest are looked through, which then are few to the many that have died meanwhile; and how
# many such looks until one at the older, and of those until one at all.
_THRESHOLDS = (20_000, 20, 50)


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """Within the block. Collects once at its beginning; afterwards all is as before."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
