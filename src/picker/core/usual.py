"""Who may take a request that asks for nothing special, remembered while nothing about it has changed.

Masking every endpoint anew costs a tenth of a decision, and nearly always finds whom it found before. What is kept is
an answer of `core.filters`, never one of its own.
"""

from __future__ import annotations

from picker.core.pool import Pool
from picker.types import BoolArray, Int64Array, Request, Role

_MODELS = 256  # remembered; the names come from clients


class Usual:
    """The latest answers by model and role. They hold as long as all that they depend on is the same, byte for byte.

    Time is no part of it: nothing is remembered of a pool in which somebody is unhealthy or has been ejected and may
    not be tried yet, and an ejection that is over stays so.
    """

    def __init__(self) -> None:
        self._stand = b""
        self._models = -1
        self._found: dict[tuple[str | None, Role], tuple[BoolArray, Int64Array]] = {}

    def find(self, pool: Pool, request: Request) -> tuple[BoolArray, Int64Array] | None:
        """(rows,) mask of the candidates and the rows it sets; None where they have to be looked for."""
        if request.subset is not None or request.exclude:
            return None
        stand = pool.standing.tobytes() + pool.ejected_until.tobytes()
        if stand != self._stand or pool.models_changed != self._models:
            self._stand, self._models = stand, pool.models_changed
            self._found.clear()
        return self._found.get((request.model, request.role))

    def note(self, pool: Pool, request: Request, mask: BoolArray, now: float) -> None:
        """What was found for a request just asked about."""
        ill = pool.present & (~pool.healthy | (pool.ejected_until > now))
        if not ill.any() and request.subset is None and not request.exclude and len(self._found) < _MODELS:
            self._found[request.model, request.role] = mask, mask.nonzero()[0]
