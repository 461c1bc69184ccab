"""What came of requests: charges released, endpoints blamed or cleared, and what their answers teach."""

from __future__ import annotations

import math

from picker.core import filters
from picker.core.bookings import Bookings
from picker.core.charges import Charge
from picker.core.faults import blames
from picker.core.learned import SAME_STEP_S, FirstTokenSample
from picker.core.patience import Patience
from picker.core.state import BLOCK_TOKENS, State
from picker.types import FailureReason, ResponseStarted, Usage

# Shorter answers tell of rounding, not of speed.
_LEARN_FROM_TOKENS = 16


class Outcomes:
    """One method for each fact about a request. Requests that are gone are ignored: facts cross on the way."""

    def __init__(self, state: State, bookings: Bookings, patience: Patience) -> None:
        self._state = state
        self._bookings = bookings
        self._patience = patience
        self._pool, self._index, self._learned = state.pool, state.index, state.learned
        self._charges, self._faults, self._retries = state.charges, state.faults, state.retries
        self._calibration, self._slow_start = state.calibration, state.slow_start
        self._block_bytes = state.settings.block_bytes

    def response_started(self, fact: ResponseStarted, now: float) -> None:
        """The data plane may have gone to a fallback: the charge follows the request."""
        charge = self._charges.get(fact.request_id)
        if charge is None:
            return
        if fact.served_by is None:
            # Somebody has answered, and where nobody can be reached it was not this one.
            row = None if charge.sure or self._answering(charge, now) else self._next_alive(charge, now)
        elif self._is_at(charge, fact.served_by):
            charge.sure = True
            return
        else:
            row = self._pool.row_of_address(fact.served_by)
        if row is not None:
            self._move(charge, row, now, sure=fact.served_by is not None)

    def _answering(self, charge: Charge, now: float) -> bool:
        return self._charges.stands(charge) and bool(filters.alive(self._pool, now)[charge.row])

    def _next_alive(self, charge: Charge, now: float) -> int | None:
        """The first of those behind the choice that can be reached."""
        alive, rows = filters.alive(self._pool, now), map(self._pool.row, charge.others)
        return next((row for row in rows if row is not None and alive[row]), None)

    def _move(self, charge: Charge, row: int, now: float, *, sure: bool) -> None:
        """Another endpoint serves the request: those that were to be tried before it have failed."""
        self._disown(charge, now)
        self._charges.close(charge.request.id, now)
        self._fault_others(charge, row, now)
        self._bookings.move(charge, row, now, sure=sure)

    def _fault_others(self, charge: Charge, served: int, now: float) -> None:
        """Of the fallbacks, those in the order before the one that served; nobody's, where it was not of them."""
        rows = [self._pool.row(name) for name in charge.others]
        for row in rows[: rows.index(served)] if served in rows else ():
            if row is not None:
                self._faults.failed(row, now)

    def _disown(self, charge: Charge, now: float) -> None:
        """An endpoint failed before it answered: a fault, and nothing is cached there that was not before.

        Of one that rests anyway the second is not worth the time: all requests of an outage come by here.
        """
        if self._charges.stands(charge):
            resting = self._pool.ejected_until.item(charge.row) > now
            self._faults.failed(charge.row, now)
            self._take_back(charge, thorough=not resting)

    def _take_back(self, charge: Charge, *, thorough: bool) -> None:
        self._index.take_back(charge.row, charge.request.block_hashes, charge.predicted, thorough=thorough)

    def _is_at(self, charge: Charge, address: str) -> bool:
        # By address, not by row: the ranks of one engine share it, and the data plane does not tell them apart.
        return self._charges.stands(charge) and self._pool.endpoint(charge.row).address == address

    def first_token(self, request_id: int, now: float, *, timed: bool = True) -> None:
        """Its prefill is over. timed: the fact came when it happened, and teaches how long that takes."""
        charge = self._charges.get(request_id)
        if charge is None:
            return
        progress_at = float(self._pool.progress_at[charge.row])
        since = max(charge.booked_at, progress_at)
        if self._charges.stands(charge):
            self._faults.stirred(charge.row, now)
        if self._charges.first_token(request_id, now) is None or not (charge.request.streaming and timed):
            return
        sample = FirstTokenSample(charge.row, now - since, charge.tokens, charge.context, was_idle=charge.was_idle)
        self._learned.first_token(sample, merged=now - progress_at < SAME_STEP_S)

    def finished(self, request_id: int, status: int, usage: Usage | None, now: float) -> None:
        """Answered to the end; a status may still be the endpoint's fault."""
        self._charges.first_token(request_id, now)
        charge = self._charges.close(request_id, now)
        if charge is None or not self._charges.stands(charge):
            return
        if status >= 400:
            self._take_back(charge, thorough=False)
        if blames(status):
            self._fault(charge, now)
            self._grant(charge, now)
        elif status < 400:
            self._answered(charge, now)
        if usage is not None and usage.prompt_tokens > 0:
            self._learn_usage(charge, usage)
            self._learn_decoding(charge, usage, now)

    def failed(self, request_id: int, reason: FailureReason, now: float) -> None:
        """Ended without an answer, or amid it."""
        charge = self._charges.close(request_id, now)
        if charge is None or not reason.blames_endpoint:
            return
        if reason is FailureReason.TIMEOUT and self._patience.silent(charge, now):
            self._faults.hangs(charge.row, now)
            self._take_back(charge, thorough=False)
        elif charge.prefilling:
            self._disown(charge, now)
        else:
            self._fault(charge, now)
        self._grant(charge, now)

    def _grant(self, charge: Charge, now: float) -> None:
        """What was under way when an endpoint failed may move to another, whatever the budget says."""
        if not self._charges.stands(charge) or self._faults.surprised(charge.row, charge.booked_at):
            self._retries.grant(now)

    def _answered(self, charge: Charge, now: float) -> None:
        row = charge.row
        recovered = self._pool.rests.item(row) > 0
        self._faults.answered(row, now, sure=charge.sure)
        if charge.sure:
            self._pool.stirred_at[row] = now
            if recovered and not self._pool.rests.item(row):
                self._slow_start.begin(row, now)

    def _fault(self, charge: Charge, now: float) -> None:
        if self._charges.stands(charge):
            self._faults.failed(charge.row, now)

    def _learn_usage(self, charge: Charge, usage: Usage) -> None:
        request = charge.request
        if request.extra_bytes:
            return  # the counts are of all prompts together
        if request.prompt_bytes and request.prompt_tokens is None:
            self._state.bytes_per_token.add(request.prompt_bytes, usage.prompt_tokens)
        self._compare(charge, usage)
        if usage.cached_tokens is None or not request.block_hashes.size:
            return
        # One engine block of slack: the engine counts whole blocks of its own, at other boundaries than ours.
        block_size = float(self._pool.block_size[charge.row])
        slack = BLOCK_TOKENS if math.isnan(block_size) else block_size
        share = min((usage.cached_tokens + slack) / usage.prompt_tokens, 1.0)
        actual = int(share * request.prompt_bytes) // self._block_bytes
        self._index.correct(charge.row, request.block_hashes, predicted=charge.predicted, actual=actual)

    def _compare(self, charge: Charge, usage: Usage) -> None:
        """Hold a prediction made from events against what came of it."""
        if charge.told is None:
            return
        least, most = charge.told
        if usage.cached_tokens is None:
            self._calibration.silent(charge.row, prompt=usage.prompt_tokens, expected=least)
        elif self._calibration.reported(charge.row, least=least, most=most, cached=usage.cached_tokens):
            self._state.note_verdict(charge.row)

    def _learn_decoding(self, charge: Charge, usage: Usage, now: float) -> None:
        """From a whole stream: its time, less the prefills it waited for, by the company it had on average."""
        if charge.request.extra_bytes:
            return  # the counts are of all prompts together
        self._learned.output_tokens.add(usage.completion_tokens, 1.0)
        took = now - charge.first_at
        if not charge.request.streaming or usage.completion_tokens < _LEARN_FROM_TOKENS or not took > 0:
            return
        row, pool = charge.row, self._pool
        decodes, context, prefill = charge.areas
        waited = (float(pool.prefill_area[row]) - prefill) / float(self._learned.prefill_speed.value[row])
        company = (float(pool.decodes_area[row]) - decodes) / took
        tokens = (float(pool.context_area[row]) - context) / took + company * self._learned.output_tokens.value / 2.0
        steps = usage.completion_tokens - 1
        seconds = max(took - waited, 0.1 * took)
        self._learned.finished(row, seconds=seconds, tokens=steps, decodes=company, context=tokens)
