"""What a decision is made of: the candidates of one request as the pool, the indexes and the charges show them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from picker.core.cost_few import FEW
from picker.core.pins import Hold, hold
from picker.core.state import BLOCK_TOKENS, State
from picker.core.view import Handful, Numbers, PoolView, place
from picker.prefix.exact import Known
from picker.types import FloatArray, Int64Array, Reading, Request


class Sight(NamedTuple):
    """What one decision is made of. guessed: (n,) leading blocks that the approximate index believes cached.

    held: what the request will hold where it goes. known: what KV events tell of its prompt.
    """

    view: PoolView
    held: Hold
    guessed: Numbers
    known: Known | None


class Scout:
    """Looks at candidates and changes nothing."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._pool, self._index, self._exact = state.pool, state.index, state.exact
        self._learned, self._charges, self._calibration = state.learned, state.charges, state.calibration
        self._sessions = state.sessions
        self._block_bytes = state.settings.block_bytes
        self._handful = Handful(np.empty(0, dtype=np.int64))

    def look(self, request: Request, rows: Int64Array, now: float, reading: Reading | None) -> Sight:
        """Everything that the decision depends on."""
        if rows.size <= FEW and self._exact is None:
            return self._look_at_few(request, rows, now)
        pick = place(rows)
        guessed = matched = self._index.match(request.block_hashes)[pick].astype(np.float64)
        tokens, per_byte = self._state.tokens(request)
        cached = guessed * (self._block_bytes * per_byte) * self._index.trust[pick]
        held = hold(request.block_hashes, self._block_bytes * per_byte, tokens)
        shared = self._charges.pins.shared(held, self._pool.rows)[pick]
        # The engine always computes the last token of a prompt again.
        cached = np.minimum(cached, max(request.prompt_bytes * per_byte - 1.0, 0.0))
        known = None if self._exact is None else self._exact.match(reading, request)
        if known is not None:
            tokens = _counted(request, reading, tokens, known)
            cached = self._corrected(cached, known, pick, shared)
            matched = cached * (request.block_hashes.size / max(tokens, 1.0))
        view = PoolView(
            self._pool,
            rows,
            now,
            pick=pick,
            matched_blocks=matched,
            total_blocks=request.block_hashes.size,
            prompt_tokens=tokens,
            uncached=tokens - np.minimum(cached, tokens),
            learned=self._learned,
            session_row=self._sessions.row(request.session),
            model=request.model,
            adapters=self._charges.adapters,
            shared=shared,
        )
        return Sight(view, held, guessed, known)

    def _look_at_few(self, request: Request, rows: Int64Array, now: float) -> Sight:
        """The same of a handful of candidates, in plain numbers."""
        tokens, per_byte = self._state.tokens(request)
        block, most = self._block_bytes * per_byte, max(request.prompt_bytes * per_byte - 1.0, 0.0)
        held = hold(request.block_hashes, block, tokens)
        if self._handful.rows is not rows:
            self._handful = Handful(rows)
        places, wanted = self._handful.places, self._handful.bits
        n = len(places)
        guessed, uncached, shared = [0.0] * n, [tokens] * n, [0.0] * n
        for row, blocks in self._index.match_few(request.block_hashes, wanted):
            guessed[places[row]] = float(blocks)
            cached = min(blocks * block * self._index.trust.item(row), most)
            uncached[places[row]] = tokens - min(cached, tokens)
        for row, pinned in self._charges.pins.shared_by(held, wanted):
            shared[places[row]] = float(pinned)
        view = PoolView(
            self._pool,
            rows,
            now,
            pick=self._handful.pick,
            matched_blocks=guessed,
            total_blocks=request.block_hashes.size,
            prompt_tokens=tokens,
            uncached=uncached,
            learned=self._learned,
            session_row=self._sessions.row(request.session),
            model=request.model,
            adapters=self._charges.adapters,
            shared=shared,
        )
        return Sight(view, held, guessed, None)

    def _corrected(self, cached: FloatArray, known: Known, pick: slice | Int64Array, shared: FloatArray) -> FloatArray:
        """(n,) cached tokens: as told where a stream is whole, at least as told where it is not, else as estimated.

        What requests in flight hold there and no event has told yet will be there when this one is looked at.
        """
        block = np.nan_to_num(self._pool.block_size[pick], nan=BLOCK_TOKENS)
        believed, told = ~self._calibration.doubted[pick], np.maximum(known.tokens[pick], shared // block * block)
        cached = np.where(believed & known.partial[pick], np.maximum(cached, told), cached)
        corrected: FloatArray = np.where(believed & known.whole[pick], told, cached)
        return corrected


def _counted(request: Request, reading: Reading | None, tokens: float, known: Known) -> float:
    """Tokens of the whole request: counted, at least as far as it is stored somewhere; estimated behind that."""
    if request.prompt_tokens is not None:
        return tokens
    if reading is not None and reading.tokens is not None:
        return float(reading.tokens)
    return known.depth_tokens + (1.0 - known.depth) * tokens
