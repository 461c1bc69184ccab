"""All checks there are, tier by tier, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from picker.check import (
    admin_port,
    affinity,
    capacity,
    cluster_checks,
    destination,
    failing,
    framing,
    health,
    malformed,
    manifests,
    routing,
    sources,
    subset,
    timing,
    tls,
    wiring,
)
from picker.check.papers import Papers
from picker.check.rig import Rig
from picker.check.subject import Subject
from picker.check.verdict import Check

T0: Sequence[Check[Papers]] = (*manifests.CHECKS, *wiring.CHECKS)

# Those that take endpoints away or overload the picker come last.
T1: Sequence[Check[Subject]] = (
    *health.CHECKS,
    *framing.CHECKS,
    *destination.CHECKS,
    *subset.CHECKS,
    *malformed.CHECKS,
    *tls.CHECKS,
    *affinity.CHECKS,
    *timing.CHECKS,
    *capacity.CHECKS,
)

T2: Sequence[Check[Rig]] = (*routing.CHECKS, *failing.CHECKS)

T3: Sequence[Check[Any]] = (*admin_port.CHECKS, *sources.CHECKS)

T4: Sequence[Check[Any]] = cluster_checks.CHECKS

ALL: Sequence[Check[Any]] = (*T0, *T1, *T2, *T3, *T4)
