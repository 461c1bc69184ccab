"""What follows from a decision, ours or another replica's: its charge, and what the next decision has to know of it."""

from __future__ import annotations

import math

from picker.core.charges import Charge
from picker.core.pins import MARKS, Hold, hold
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
        view, known = sight.view, sight.known
        row = view.rows.item(best)
        _, uncached, shared = view.candidate(best)
        told = None if known is None else self._expected(row, known, shared)
        matched, tokens = int(sight.guessed[best]), view.prompt_tokens
        self.decided += 1
        self._open(request, row, uncached, tokens, matched, sight.held, now, others=others, told=told)

    def book_elsewhere(self, fact: Booked, now: float) -> None:
        """What `book` does, of another replica's decision."""
        row, request = self._pool.row(fact.name), fact.request
        if row is None or request.id in self._charges:
            return
        held = hold(request.block_hashes, self._block_bytes * self._state.tokens(request)[1], fact.tokens)
        self._open(request, row, fact.uncached, fact.tokens, fact.matched, held, now, others=fact.others)

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

    def _open(
        self,
        request: Request,
        row: int,
        uncached: float,
        tokens: float,
        matched: int,
        held: Hold,
        now: float,
        *,
        others: tuple[str, ...],
        told: tuple[float, float] | None = None,
    ) -> None:
        """All that follows from a decision."""
        pool = self._pool
        work, speed = self._learned.work(uncached, tokens), self._learned.prefill_speed.value.item(row)
        charge = Charge(
            request=request,
            row=row,
            generation=pool.generation.item(row),
            tokens=round(uncached),
            context=round(tokens),
            predicted=matched,
            work=round(work * 1e9),
            booked_at=now,
            was_idle=not pool.inflight.item(row),
            held=held,
            adapter=self._charges.adapters.of(request.model),
            told=told,
            others=others,
            sure=not others,
        )
        self._charges.book(charge, expected_s=(pool.work.item(row) * 1e-9 + work) / speed)
        self._learned.booked(work / speed, tied=uncached < 0.5 * tokens, now=now)
        self._picks += 1
        pool.last_pick[row] = self._picks
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
