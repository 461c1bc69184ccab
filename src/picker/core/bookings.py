"""What follows from a decision, ours or another replica's: its charge, and what the next decision has to know of it."""

from __future__ import annotations

import math

from picker.core.charges import Charge
from picker.core.pins import MARKS, hold
from picker.core.scout import Sight
from picker.core.state import BLOCK_TOKENS, State
from picker.prefix.exact import Known
from picker.types import Booked, Request


class Bookings:
    """decided: how many decisions were our own."""

    def __init__(self, state: State) -> None:
        self.decided = 0
        self._state = state
        self._pool, self._index, self._learned = state.pool, state.index, state.learned
        self._charges, self._faults, self._sessions = state.charges, state.faults, state.sessions
        self._block_bytes = state.settings.block_bytes
        self._picks = 0  # ours and those of other replicas

    def book(self, request: Request, sight: Sight, best: int, now: float, others: tuple[str, ...]) -> None:
        """Charge a decision. best: which of the candidates. others: names of the fallbacks behind it."""
        pool, view, known = self._pool, sight.view, sight.known
        row = view.rows.item(best)
        _, uncached, shared = view.candidate(best)
        work = self._learned.work(uncached, view.prompt_tokens)
        speed = self._learned.prefill_speed.value.item(row)
        charge = Charge(
            request=request,
            row=row,
            generation=pool.generation.item(row),
            tokens=round(uncached),
            context=round(view.prompt_tokens),
            predicted=int(sight.guessed[best]),
            work=round(work * 1e9),
            booked_at=now,
            was_idle=not pool.inflight.item(row),
            held=sight.held,
            adapter=self._charges.adapters.of(request.model),
            told=None if known is None else self._expected(row, known, shared),
            others=others,
            sure=not others,
        )
        self.decided += 1
        self._open(charge, work, speed, tied=uncached < 0.5 * view.prompt_tokens, now=now)

    def book_elsewhere(self, fact: Booked, now: float) -> None:
        """What `book` does, of another replica's decision."""
        row, pool, request = self._pool.row(fact.name), self._pool, fact.request
        if row is None or request.id in self._charges:
            return
        per_byte = self._state.tokens(request)[1]
        work = self._learned.work(fact.uncached, fact.tokens)
        charge = Charge(
            request=request,
            row=row,
            generation=pool.generation.item(row),
            tokens=round(fact.uncached),
            context=round(fact.tokens),
            predicted=fact.matched,
            work=round(work * 1e9),
            booked_at=now,
            was_idle=not pool.inflight.item(row),
            held=hold(request.block_hashes, self._block_bytes * per_byte, fact.tokens),
            adapter=self._charges.adapters.of(request.model),
            others=fact.others,
            sure=not fact.others,
        )
        speed = self._learned.prefill_speed.value.item(row)
        self._open(charge, work, speed, tied=fact.uncached < 0.5 * fact.tokens, now=now)

    def move(self, charge: Charge, row: int, now: float, *, sure: bool) -> None:
        """Another endpoint serves a request whose charge has been closed: charged there, with nothing cached."""
        moved = Charge(
            request=charge.request,
            row=row,
            generation=int(self._pool.generation[row]),
            tokens=charge.tokens,
            context=charge.context,
            predicted=0,
            work=charge.work,
            booked_at=now,
            held=charge.held,
            adapter=charge.adapter,
            sure=sure,
        )
        self._charges.book(moved, expected_s=charge.work * 1e-9 / float(self._learned.prefill_speed.value[row]))
        self._index.store(row, charge.request.block_hashes)
        self._sessions.note(charge.request.session, row)

    def _open(self, charge: Charge, work: float, speed: float, *, tied: bool, now: float) -> None:
        """All that follows from a decision. work: seconds of prefill where the speed is 1."""
        row, request = charge.row, charge.request
        self._charges.book(charge, expected_s=(self._pool.work.item(row) * 1e-9 + work) / speed)
        self._learned.booked(work / speed, tied=tied, now=now)
        self._picks += 1
        self._pool.last_pick[row] = self._picks
        self._faults.tried(row, now)
        # Learned at booking: the next request of the same group, a moment later, must already find it.
        self._index.store(row, request.block_hashes)
        self._sessions.note(request.session, row)

    def _expected(self, row: int, known: Known, shared: float) -> tuple[float, float] | None:
        """Between how many tokens an engine will find cached if its events tell the truth.

        At most what it was told, or what requests in flight hold there, which is known to within their marks.
        """
        if not known.whole[row]:
            return None
        least, block = known.cached.item(row), float(self._pool.block_size[row])
        slack = shared * (1.0 + 1.0 / MARKS) + (BLOCK_TOKENS if math.isnan(block) else block)
        return least, least if shared <= least else slack
