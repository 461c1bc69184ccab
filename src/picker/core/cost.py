"""What a request costs on each candidate, in seconds; lower is better. Pure arithmetic over a view.

With W seconds of prefill waiting at an endpoint, x seconds that the request adds, n requests there and a decode step
of t seconds:

    queue       W: prefill booked there and not done, less what has been done since the last sign of life; and as many
                mean prefills as requests wait there that picker did not send (other gateways)
    prefill     x, and the steps it takes
    followers   what W and x delay whoever comes next: one step of policy improvement of a dispatcher that knows sizes
    neighbours  x, for each request already there, at the weight of a token's delay
    decoding    the fixed part of a decode step, as often as the answer will have tokens: slow endpoints decode slowly
    memory      KV blocks as a second server: the share of the cache the request takes, for as long as it takes it
    stall       how much longer an endpoint has been silent than what it had then takes: a hanging one gets dearer by
                the second, and no cheaper by being given more

Work in flight is counted from our own bookings, never from scrapes, which are always late. A value nobody has observed
is taken to be like that of the others, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import FloatArray, Int64Array, Request

_FULLEST = 0.95


@dataclass(frozen=True, slots=True)
class CostModel:
    """The constants left over; none depends on a model or a GPU.

    latency_weight: seconds of first-token delay that one second of delay to an answer's end is worth.
    step_tokens: prompt tokens an engine computes in one step (vLLM's default on large GPUs).
    stall_grace: seconds of silence beyond the expected that count as nothing.
    """

    latency_weight: float = 0.35
    step_tokens: int = 8192
    stall_grace: float = 1.0

    def terms(self, view: PoolView, request: Request) -> dict[str, FloatArray]:
        """Each term of the cost: name -> (n,) seconds, none negative."""
        learned, weight, inflight = view.learned, self.latency_weight, view.inflight
        speed, decode_speed, prefilling = view.prefill_speed, view.decode_speed, view.prefilling
        silence, answer = view.silence(prefilling), learned.output_tokens.value
        own = learned.work(view.uncached, view.prompt_tokens) / speed
        queue = self._queue(view, view.work / speed, prefilling, silence)
        decodes = inflight - prefilling
        step = learned.step(decodes, view.decoding + decodes * (answer / 2.0)) / decode_speed
        steps = np.ceil((view.backlog + view.uncached) / self.step_tokens) + 0.5 * (inflight > 0)
        prefill = own + step * steps
        arrivals, load = learned.rates(view.endpoints, view.now)
        holding = queue + prefill + answer * step
        return {
            "queue": queue,
            "prefill": prefill,
            "followers": own * (2.0 * queue + own) * (arrivals / (2.0 * (1.0 - load))),
            "neighbours": own * inflight * weight,
            "decoding": (weight * answer * learned.step_floor) / decode_speed,
            "memory": self._memory(view, arrivals, answer, inflight, holding),
            "stall": np.maximum(0.0, silence - view.awaited * (2.0 / speed) - self.stall_grace),
        }

    def _queue(self, view: PoolView, booked: FloatArray, prefilling: Int64Array, silence: FloatArray) -> FloatArray:
        """Seconds of prefill ahead: what we booked, less its head's progress, and what others have waiting there."""
        ahead = booked - np.minimum(silence, booked / np.maximum(prefilling, 1))
        waiting = _filled(view.waiting)
        if waiting is None or not np.count_nonzero(waiting > prefilling):
            return ahead
        requests = int(prefilling.sum())
        alone = view.learned.work(view.prompt_tokens, view.prompt_tokens)
        return ahead + np.maximum(0.0, waiting - prefilling) * (booked.sum() / requests if requests else alone)

    def _memory(
        self, view: PoolView, arrivals: float, answer: float, inflight: Int64Array, holding: FloatArray
    ) -> FloatArray:
        """What the share of the KV cache that the request newly takes, and for how long, costs those who come."""
        capacity = _filled(view.kv_capacity)
        if capacity is None:
            return np.zeros(view.n)
        taken = (view.uncached + answer) / capacity * holding
        full = np.minimum((view.distinct + inflight * (answer / 2.0)) / capacity, _FULLEST)
        return taken * taken * arrivals / (1.0 - full)


def _filled(column: FloatArray) -> FloatArray | None:
    """The mean of the known in place of what nobody observed; None where nothing is known."""
    unknown = np.isnan(column)
    if not np.count_nonzero(unknown):
        return column
    return None if unknown.all() else np.where(unknown, column[~unknown].mean(), column)
