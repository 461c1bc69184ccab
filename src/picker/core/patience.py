"""How long a request may be waited for before its endpoint must be taken to hang. Reads what others write."""

from __future__ import annotations

import math

import numpy as np

from picker.core.charges import Charge, Charges
from picker.core.learned import Learned
from picker.core.pool import Pool

_LONG_ANSWERS = 8.0  # times the mean length: few answers are longer


class Patience:
    """floor: seconds of silence, of a request and of its endpoint, that are nothing; 0: nobody is ever given up.

    factor: on what was predicted. An endpoint that gives signs of life is busy, however long a request has waited: to
    send it elsewhere would add to an overload what it has waited already.
    """

    def __init__(self, pool: Pool, charges: Charges, learned: Learned, *, floor: float, factor: float) -> None:
        self._pool = pool
        self._charges = charges
        self._learned = learned
        self._floor = floor
        self._factor = factor

    def tune(self, *, floor: float, factor: float) -> None:
        """Other numbers from here on, for requests under way, too."""
        self._floor, self._factor = floor, factor

    def left(self, request_id: int, now: float) -> float:
        """Seconds; infinite where nothing lets expect how long it takes."""
        charge = self._charges.get(request_id)
        if charge is None or not self._floor or not charge.context or not self._charges.stands(charge):
            return math.inf
        due_at = charge.booked_at + self._floor + self._factor * self._first_byte_s(charge)
        return max(due_at, self._pool.stirred_at.item(charge.row) + self._floor) - now

    def silent(self, charge: Charge, now: float) -> bool:
        """Whether nothing at all has come from its endpoint for too long."""
        if not self._floor or not self._charges.stands(charge):
            return False
        return now - max(charge.booked_at, self._pool.stirred_at.item(charge.row)) >= self._floor

    def _first_byte_s(self, charge: Charge) -> float:
        """Seconds to the first byte, as predicted: of a stream to its first token, else to the end of the answer."""
        row, request, learned, pool = charge.row, charge.request, self._learned, self._pool
        seconds: float = max(pool.work.item(row), charge.work) * 1e-9 / learned.prefill_speed.of(row)
        if request.streaming:
            return seconds
        tokens = request.max_tokens or _LONG_ANSWERS * learned.output_tokens.value
        context = np.array([pool.context.item(row)], dtype=np.float64)
        step = float(learned.step(pool.inflight[row : row + 1], context)[0])
        return seconds + tokens * step / learned.decode_speed.of(row)
