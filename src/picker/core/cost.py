"""What a request costs on each candidate, in seconds; lower is better. Pure arithmetic over a view.

    queue      prefill work booked there and not done, over the endpoint's learned speed, less what it did since
    stall      how much longer it has been silent than what it had then takes: a hanging endpoint gets dearer by the
               second, and no cheaper by being given more
    prefill    the request's own uncached tokens over the learned speed
    neighbours the same prefill seen by the requests already decoding there: each of them waits for it
    foreign    requests waiting there that picker did not send (other gateways), as many mean prefills
    memory     tokens beyond what the KV cache holds: they must wait for room, or be computed again later

Work in flight is counted from our own bookings, never from scrapes, which are always late; a scrape only adds what we
cannot know ourselves. A value nobody has observed is taken to be like that of the others, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.view import PoolView
from picker.types import FloatArray, Request


@dataclass(frozen=True, slots=True)
class CostModel:
    """The constants left over; none depends on a model or a GPU.

    neighbour_weight: seconds of first-token delay that one second of delay to another request's tokens is worth.
    kv_headroom: share of the KV cache that may be filled before memory has a price.
    stall_grace: seconds of silence beyond the expected that count as nothing.
    """

    neighbour_weight: float = 0.35
    kv_headroom: float = 0.9
    stall_grace: float = 1.0

    def terms(self, view: PoolView, request: Request) -> dict[str, FloatArray]:
        """Each term of the cost: name -> (n,) seconds, none negative."""
        own = view.uncached / view.speed
        booked = view.backlog / view.speed
        progress = np.minimum(view.idle_for, booked / np.maximum(view.prefilling, 1))
        return {
            "queue": booked - progress,
            "stall": np.maximum(0.0, view.idle_for - 2.0 * view.awaited / view.speed - self.stall_grace),
            "prefill": own,
            "neighbours": self.neighbour_weight * own * view.inflight,
            "foreign": self._foreign(view),
            "memory": self._memory(view),
        }

    def _foreign(self, view: PoolView) -> FloatArray:
        """Requests queued there beyond the ones we sent, each as long as the mean booking of the pool."""
        waiting = _filled(view.waiting)
        if waiting is None:
            return np.zeros(view.n)
        beyond = np.maximum(0.0, waiting - view.prefilling)
        prefilling = int(view.prefilling.sum())
        mean_tokens = view.backlog.sum() / prefilling if prefilling else view.prompt_tokens
        return beyond * mean_tokens / view.speed

    def _memory(self, view: PoolView) -> FloatArray:
        """Tokens that do not fit beside what is in flight, at the price of computing them again."""
        capacity, usage = _filled(view.kv_capacity), _filled(view.kv_usage)
        if capacity is None:
            return np.zeros(view.n)
        ours = (view.context + view.prompt_tokens) / capacity
        full = ours if usage is None else np.maximum(ours, usage)
        return np.maximum(0.0, full - self.kv_headroom) * capacity / view.speed


def _filled(column: FloatArray) -> FloatArray | None:
    """The mean of the known in place of what nobody observed; None where nothing is known."""
    known = ~np.isnan(column)
    return np.where(known, column, column[known].mean()) if known.any() else None
