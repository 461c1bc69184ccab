"""What a request costs on each candidate, in seconds; lower is better. Pure arithmetic over a view.

With W seconds until an endpoint would begin, x seconds of prefill that the request adds, and n requests there:

    queue       W: prefill booked there and not done, less what has been done since the last sign of life; as many mean
                prefills as requests wait there that picker did not send (other gateways); and, where the KV cache is
                full, until as much of it has been given back as the request needs
    prefill     x, and the steps it takes
    followers   what W and x delay whoever comes next: one step of policy improvement of a dispatcher that knows sizes.
                Who comes next is drawn to where others of his kind went lately, as far as requests are drawn at all:
                a pod whose sessions are only pausing is not idle. The rest come to the fast more often than to the slow
    neighbours  x, for each request already there, at the weight of a token's delay
    decoding    the fixed part of a decode step, as often as the answer will have tokens: slow endpoints decode slowly
    memory      KV blocks as a second server. Requests hold them side by side, so none waits until the cache is full;
                then each waits until others have ended, which it does longer by the share of the cache taken here
    adapter     until a slot for the request's LoRA adapter is free and the adapter loaded; or what the request costs
                those that wait for the slot it keeps busy
    stall       how much longer an endpoint has been silent than what it had then takes: a hanging one gets dearer by
                the second, and no cheaper by being given more

Work in flight is counted from our own bookings, never from scrapes, which are always late. A value nobody has observed
is taken to be like that of the others, not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.cost_few import CERTAIN, LOGISTIC, ROOMY
from picker.core.shares import shares
from picker.core.view import PoolView
from picker.types import FloatArray, Int64Array, Request


@dataclass(frozen=True, slots=True)
class CostModel:
    """The constants left over; none depends on a model or a GPU.

    latency_weight: seconds of first-token delay that one second of delay to an answer's end is worth.
    step_tokens: prompt tokens an engine computes in one step (vLLM's default on large GPUs).
    stall_grace: seconds of silence beyond the expected that count as nothing.
    adapter_load: seconds to bring a LoRA adapter to a GPU (0.2 from page cache, 2 from an object store).
    slot_weight: by how much of its life a request prolongs the wait of each adapter that waits for a slot.
    habit: how far those who come next are expected to favour the fast as much as the latest did; else, as speeds say.
    """

    latency_weight: float = 0.35
    step_tokens: int = 8192
    stall_grace: float = 1.0
    adapter_load: float = 0.5
    slot_weight: float = 0.1
    habit: float = 0.75

    def terms(self, view: PoolView, request: Request) -> dict[str, FloatArray]:
        """Each term of the cost: name -> (n,) seconds, none negative."""
        learned, weight, inflight = view.learned, self.latency_weight, view.inflight
        speed, decode_speed, prefilling = view.prefill_speed, view.decode_speed, view.prefilling
        silence, answer = view.silence(prefilling), learned.output_tokens.value
        own = learned.work(view.uncached, view.prompt_tokens) / speed
        decodes = inflight - prefilling
        step = learned.step(decodes, view.decoding + decodes * (answer / 2.0)) / decode_speed
        steps = np.ceil((view.backlog + view.uncached) / self.step_tokens) + 0.5 * (inflight > 0)
        prefill = own + step * steps
        decode = answer * step
        arrivals, load = learned.rates(view.endpoints, view.now)
        recent = view.recent
        free = shares(speed, recent, self.habit)
        drawn = _drawn(recent, free, learned.tied)
        room, memory = self._memory(view, answer, decode, prefill + decode)
        queue = self._queue(view, view.work / speed, prefilling, silence) + room
        terms = {
            "queue": queue,
            "prefill": prefill,
            "followers": own * (2.0 * queue + own) * (drawn * (arrivals / (2.0 * (1.0 - load)))),
            "neighbours": own * inflight * weight,
            "decoding": (weight * answer * learned.step_floor) / decode_speed,
            "memory": memory * arrivals * free,
            "stall": self._stall(view, silence, speed),
        }
        if view.adapter is not None:
            terms["adapter"] = self._slot(view, view.adapter, prefill + decode)
        return terms

    def _stall(self, view: PoolView, silence: FloatArray, speed: FloatArray) -> FloatArray:
        """Silence beyond what the prefills there should take."""
        if not np.count_nonzero(silence > self.stall_grace):  # which is the rule
            return np.zeros(view.n)
        return np.maximum(0.0, silence - view.awaited * (2.0 / speed) - self.stall_grace)

    def _queue(self, view: PoolView, booked: FloatArray, prefilling: Int64Array, silence: FloatArray) -> FloatArray:
        """Seconds of prefill ahead: what we booked, less its head's progress, and what others have waiting there."""
        ahead = booked - np.minimum(silence, booked / np.maximum(prefilling, 1))
        waiting = _filled(view.waiting)
        if waiting is None or not np.count_nonzero(waiting > prefilling):
            return ahead
        requests = int(prefilling.sum())
        alone = view.learned.work(view.prompt_tokens, view.prompt_tokens)
        return ahead + np.maximum(0.0, waiting - prefilling) * (booked.sum() / requests if requests else alone)

    def _slot(self, view: PoolView, adapter: str, life: FloatArray) -> FloatArray:
        """Seconds until an adapter has a slot and is loaded, and what keeping one busy costs those who wait for it.

        A slot becomes free when the last request of its adapter has ended: after about one life, if those that come
        meanwhile go elsewhere. Expecting it as long as if they went on coming (the busy period of M/M/infinity) sends
        rare adapters into ever the same queues, and was worse.
        """
        here, awaited = view.adapter_here(adapter)
        queued, room = view.adapters_queued, np.maximum(np.nan_to_num(view.max_adapters, nan=np.inf), 1.0)
        ahead = np.maximum(0.0, view.adapters_taken + queued - awaited + 1.0 - room)
        comes = np.where(awaited, 0.0, self.adapter_load) + life * ahead / room
        return np.where(here, self.slot_weight * queued * life, comes)

    def _memory(
        self, view: PoolView, answer: float, decode: FloatArray, holding: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Seconds until there is room for the prompt; and what taking it costs each request a second that comes.

        The cache fills and empties with requests that come and go by chance, so with n of them its filling varies by a
        share of 1 / sqrt(n): the chance that it is full is a normal tail (as a logistic, within 0.01).
        """
        capacity = _filled(view.kv_capacity)
        if capacity is None:
            return np.zeros(view.n), np.zeros(view.n)
        prompt, inflight = view.prompt_tokens - view.shared, view.inflight
        held = view.pinned + inflight * (answer / 2.0)
        needed = held + prompt
        filled = np.maximum(needed + answer, 1.0)
        spare = (capacity - filled) * np.sqrt(inflight + 1.0) / filled
        taken = (prompt + answer) / capacity * holding * holding
        if not np.count_nonzero(spare < CERTAIN):  # no cache is near its end, so there is room everywhere
            return np.zeros(view.n), taken * ROOMY
        room = np.maximum(0.0, needed - capacity) / np.maximum(held, 1.0) * decode
        full = 1.0 / (1.0 + np.exp(LOGISTIC * np.clip(spare, -CERTAIN, CERTAIN)))
        return room, taken * full


def _drawn(recent: FloatArray, free: FloatArray, tied: float) -> FloatArray:
    """How many of those who come next come here, relative to the mean endpoint; free: of those not drawn."""
    mean = float(recent.sum()) / max(recent.size, 1)
    return (1.0 - tied) * free + recent / mean * tied if mean > 0.0 else free


def _filled(column: FloatArray) -> FloatArray | None:
    """The mean of the known in place of what nobody observed; None where nothing is known."""
    unknown = np.isnan(column)
    if not np.count_nonzero(unknown):
        return column
    return None if unknown.all() else np.where(unknown, column[~unknown].mean(), column)
