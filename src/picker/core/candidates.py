"""What plugins ask about candidates beyond the columns of a view: their names and labels, the request's headers, how
long the request would take there; and a view of fewer of them. Pure, and nothing is remembered.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picker.core.view import PoolView
from picker.types import BoolArray, Endpoint, FloatArray, Request

_MASK = (1 << 64) - 1


def header(request: Request, name: str) -> str | None:
    """A header of the request, stripped; None where it is absent or empty."""
    return request.headers.get(name.lower(), "").strip() or None


def endpoints(view: PoolView) -> list[Endpoint]:
    """The candidates, in the order of the view."""
    pool = view._pool
    return [pool.endpoint(row) for row in view.rows.tolist()]


def names(view: PoolView) -> list[str]:
    """The candidates' names, in the order of the view."""
    return [str(name) for name in view._pool.names[view.rows]]


def name_of(view: PoolView, index: int) -> str:
    """One candidate's name."""
    return str(view._pool.names[view.rows[index]])


def labels(view: PoolView, key: str) -> list[str | None]:
    """One label of each candidate, None where it has none."""
    return [endpoint.labels.get(key) for endpoint in endpoints(view)]


def only(view: PoolView, keep: BoolArray) -> PoolView:
    """The view of those candidates that are kept. keep: (n,)."""
    if keep.all():
        return view
    return PoolView(
        view._pool,
        view.rows[keep],
        view.now,
        matched_blocks=view.matched_blocks[keep],
        total_blocks=view.total_blocks,
        prompt_tokens=view.prompt_tokens,
        uncached=view.uncached[keep],
        learned=view.learned,
        session_row=view.session_row,
        model=view._model,
        shared=view.shared[keep],
        adapters=view._adapters,
    )


def filled(column: NDArray[np.floating], otherwise: float) -> FloatArray:
    """A column in which what nobody observed (NaN) is the mean of the others, `otherwise` where nothing is known."""
    unknown = np.isnan(column)
    if not unknown.any():
        return column.astype(np.float64)
    return np.where(unknown, otherwise if unknown.all() else column[~unknown].mean(), column)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a request would see on each candidate: (n,) seconds to its first token, (n,) seconds a token after it."""

    ttft_s: FloatArray
    tpot_s: FloatArray


def predicted(view: PoolView) -> Predicted:
    """From what the pool's own behaviour has taught: the prefill booked there and the request's, then decode steps."""
    learned, answer = view.learned, view.learned.output_tokens.value
    own = learned.work(view.uncached, view.prompt_tokens)
    decodes = view.inflight - view.prefilling + 1
    context = view.decoding + view.prompt_tokens + decodes * (answer / 2.0)
    return Predicted((view.work + own) / view.prefill_speed, learned.step(decodes, context) / view.decode_speed)


@dataclass(frozen=True, slots=True)
class Headroom:
    """What is left of a request's objectives on each candidate, in seconds; negative where they would be missed."""

    ttft_s: FloatArray
    tpot_s: FloatArray


# The endpoint picker's headers with a request's objectives, in milliseconds; the old names are still accepted.
SLO_TTFT = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
SLO_TPOT = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")


def headroom(view: PoolView, request: Request, *, tokens: bool = True, buffer: float = 1.0) -> Headroom:
    """Objective less prediction; no objective is one of 0, as in the endpoint picker: the soonest is then the best.

    tokens: whether the time per token counts at all; it never does for responses that do not stream. What does not
    count has a headroom of 0. buffer: factor on the objective of the time per token.
    """
    expected = predicted(view)
    ttft = objective(request, SLO_TTFT) - expected.ttft_s
    if not (tokens and request.streaming):
        return Headroom(ttft, np.zeros(view.n))
    return Headroom(ttft, objective(request, SLO_TPOT) * buffer - expected.tpot_s)


def objective(request: Request, headers: tuple[str, ...]) -> float:
    """Seconds, of the first of these headers that is there; 0 where none is or it is no sensible number."""
    text = next((found for name in headers if (found := header(request, name)) is not None), "0")
    try:
        seconds = float(text) / 1000.0
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0.0 else 0.0


def draw(request: Request, salt: int) -> float:
    """A number of [0, 1) that is the same whenever the same request asks with the same salt (SplitMix64).

    Filters have no generator: what they choose by chance must not depend on how often they were asked before.
    """
    word = (request.id * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((word ^ (word >> 31)) >> 11) / float(1 << 53)


def session_candidate(view: PoolView, request: Request, token_header: str = "") -> BoolArray:
    """(n,) whether a candidate is the one that served this session last; nobody, where that is not known.

    token_header: the header with the base64 of "name" or "namespace/name" of an endpoint; by the session's id if empty.
    """
    if token_header:
        told = _told_endpoint(header(request, token_header))
        return np.array([told is not None and told in (name, _qualified(name)) for name in names(view)], dtype=bool)
    if view.session_row is None:
        return np.zeros(view.n, dtype=bool)
    return np.equal(view.rows, view.session_row)


def _told_endpoint(token: str | None) -> str | None:
    try:
        return None if token is None else base64.b64decode(token, validate=True).decode("utf-8")
    except ValueError:  # not base64, or not text: a client made it up
        return None


def _qualified(name: str) -> str:
    """The endpoint picker's identity of an endpoint without a namespace of its own."""
    return name if "/" in name else f"default/{name}"


def context_range(text: str) -> tuple[int, int] | None:
    """The two numbers of "min-max"; None when it says something else."""
    low, dash, high = text.partition("-")
    try:
        numbers = int(low), int(high)
    except ValueError:
        return None
    return numbers if dash and numbers[0] <= numbers[1] else None
