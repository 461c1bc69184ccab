"""What each open decision has booked, and what of it is still to be released."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import msgspec

from picker.core.adapters import Adapters
from picker.core.pins import NOTHING, Hold, Pins
from picker.core.pool import Pool
from picker.types import Request


class Charge(msgspec.Struct, eq=False, gc=False):
    """One booking. A row under another generation has been left by its endpoint: nothing is released there.

    tokens: uncached prompt tokens expected at booking. context: all prompt tokens. predicted: matched blocks.
    work: nanoseconds of prefill expected at the pool's mean speed. was_idle: nothing was in flight there. first_at,
    areas: when the first token came, and the row's integrals then.
    held: what of the KV cache the prompt takes. adapter: the LoRA adapter it needs.
    told: between how many tokens of the prompt KV events let expect to be cached, None where they do not say.
    expected_at: when the prefill is taken as done although nothing will tell; set for requests that do not stream.
    others: names of the endpoints to be tried after this one, in order. sure: whoever answers, it is this one.
    """

    request: Request
    row: int
    generation: int
    tokens: int
    context: int
    predicted: int
    work: int
    booked_at: float
    was_idle: bool = False
    prefilling: bool = True
    expected_at: float = math.inf
    first_at: float = math.inf
    areas: tuple[float, float, float] = (0.0, 0.0, 0.0)
    held: Hold = NOTHING
    adapter: str | None = None
    told: tuple[float, float] | None = None
    others: tuple[str, ...] = ()
    sure: bool = False


class Charges:
    """The table of open charges; books and releases them in the pool, each exactly once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.pins = Pins()
        self.adapters = Adapters(pool.rows)
        self._open: dict[int, Charge] = {}
        self._expected: list[tuple[float, int]] = []  # (when a silent prefill should be over, request id)

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    def __iter__(self) -> Iterator[Charge]:
        return iter(self._open.values())

    @property
    def own(self) -> int:
        """How many are of requests that were routed here; other replicas' have negative ids."""
        return sum(number > 0 for number in self._open)

    def get(self, request_id: int) -> Charge | None:
        return self._open.get(request_id)

    def book(self, charge: Charge, *, expected_s: float) -> None:
        """Open a charge. expected_s: after so long the prefill of a request that does not stream is taken as done."""
        assert charge.request.id not in self._open, "a request was booked twice"
        self._open[charge.request.id] = charge
        row, pinned = charge.row, self.pins.take(charge.row, charge.held)
        self._pool.book(
            row, tokens=charge.tokens, context=charge.context, pinned=pinned, work=charge.work, now=charge.booked_at
        )
        if charge.adapter is not None:
            self.adapters.book(charge.adapter, row)
        if not charge.request.streaming:
            charge.expected_at = charge.booked_at + expected_s
            heapq.heappush(self._expected, (charge.expected_at, charge.request.id))

    def first_token(self, request_id: int, now: float) -> Charge | None:
        """The prefill is done; None when there is nothing to release any more."""
        charge = self._open.get(request_id)
        if charge is None or not charge.prefilling:
            return None
        charge.prefilling = False
        if not self.stands(charge):
            return None
        row, pool = charge.row, self._pool
        if charge.adapter is not None:
            self.adapters.begin(charge.adapter, row)
        pool.prefilled(row, tokens=charge.tokens, context=charge.context, work=charge.work, now=now)
        charge.first_at = now
        charge.areas = float(pool.decodes_area[row]), float(pool.context_area[row]), float(pool.prefill_area[row])
        return charge

    def close(self, request_id: int, now: float) -> Charge | None:
        """Release all that is left; None when the request has no open charge."""
        charge = self._open.pop(request_id, None)
        if charge is not None and self.stands(charge):
            row, decoding = charge.row, not charge.prefilling
            if charge.prefilling:
                self._pool.abandoned(row, tokens=charge.tokens, work=charge.work)
            if charge.adapter is not None:
                self.adapters.end(charge.adapter, row, begun=decoding)
            pinned = self.pins.give_back(row, charge.held)
            self._pool.release(row, context=charge.context, pinned=pinned, decoding=decoding, now=now)
        return charge

    def stands(self, charge: Charge) -> bool:
        """Whether the endpoint that was charged is still the one in that row."""
        return bool(self._pool.generation[charge.row] == charge.generation)

    def expire_silent(self, now: float) -> None:
        """Take the prefills of requests that do not stream as done when their time is over."""
        while self._expected and self._expected[0][0] <= now:
            _, request_id = heapq.heappop(self._expected)
            charge = self._open.get(request_id)
            # After a retry the same id has another charge, with its own time.
            if charge is not None and charge.expected_at <= now:
                self.first_token(request_id, now)
