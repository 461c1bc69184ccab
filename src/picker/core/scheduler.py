"""The decision: the single owner of pool, charges, prefix index, queue and generator.

Four verbs, after aioquic: `submit` a request, `apply` a fact, `poll` for what the queue has let go, `next_wakeup` for
when to poll again. Everything the scheduler knows came through `apply` or `submit`; the same sequence of calls with
the same seed gives the same decisions, under a real clock or a virtual one. No IO, no clock, no await.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np

from picker.core import filters, flow, lessons
from picker.core.bookings import Bookings
from picker.core.drain_rate import DrainRate
from picker.core.flow import FlowQueue
from picker.core.observations import Observations
from picker.core.outcomes import Outcomes
from picker.core.patience import Patience
from picker.core.pick import Picker, max_score
from picker.core.profile import Cost, Profile
from picker.core.saturation import Detector
from picker.core.scout import Scout
from picker.core.settings import Settings
from picker.core.snapshot import EndpointState, snapshot
from picker.core.state import State
from picker.core.usual import Usual
from picker.core.view import PoolView
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact
from picker.types import (
    Booked,
    BoolArray,
    Decision,
    Fact,
    Failed,
    Finished,
    FirstToken,
    Int64Array,
    LateFirstToken,
    Lessons,
    Queued,
    Ranking,
    Reading,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
)

__all__ = ["Scheduler", "Settings"]

_RETRY_AFTER_S = 1.0


class Scheduler:
    """Decides where requests go. See the module's text for the verbs."""

    def __init__(
        self,
        settings: Settings,
        index: ApproximateIndex,
        profile: Profile | None = None,
        picker: Picker = max_score,
        exact: Exact | None = None,
        saturation: Detector | None = None,
    ) -> None:
        state = State(settings, index, exact)
        self._state = state
        self.pool, self.index, self.exact = state.pool, state.index, state.exact
        self.charges, self.faults, self.retries = state.charges, state.faults, state.retries
        self.learned, self.calibration, self.notices = state.learned, state.calibration, state.notices
        self.sessions, self.bytes_per_token = state.sessions, state.bytes_per_token
        self.queue = FlowQueue(settings.queue_size)
        self._usual, self._drain_rate = Usual(), DrainRate()
        self._slow_start = state.slow_start
        self._saturation = saturation
        self._profile: Profile = profile or Cost()
        self._picker = picker
        self._rng = np.random.default_rng(settings.seed)
        self._patience = Patience(
            self.pool, self.charges, self.learned, floor=settings.hang_floor_s, factor=settings.hang_factor
        )
        self._scout, self._bookings = Scout(state), Bookings(state)
        self._outcomes, self._observations = Outcomes(state, self._bookings, self._patience), Observations(state)
        self._polled_at = -np.inf

    @property
    def settings(self) -> Settings:
        return self._state.settings

    @property
    def decided(self) -> int:
        """Decisions of our own, other replicas' left out."""
        return self._bookings.decided

    @property
    def wants_events(self) -> bool:
        """Whether KV events change anything."""
        return self.exact is not None

    # --- the verbs ---

    def submit(self, request: Request, now: float, reading: Reading | None = None) -> Decision | Rejection | Queued:
        """Pick an endpoint and book the charge in the same call, or say why not, or queue the request.

        reading: the prompt as its engine will read it, if anybody could read it so. It is not kept: a request that has
        to wait is decided by what was sent where.

        Every `Decision` must be followed by exactly one `Finished` or `Failed` fact of that id; so must `Queued`, once
        it has become a decision, or when its client leaves before.
        """
        self.charges.expire_silent(now)
        if request.exclude and not self.retries.take(self.decided, now):
            message = "The endpoint failed before it answered, and so many others have that this is not tried again."
            return Rejection(request.id, RejectReason.SATURATED, 503, message, _RETRY_AFTER_S)
        found = self._usual.find(self.pool, request)
        candidates = filters.candidates(self.pool, request, now) if found is None else found[0]
        if isinstance(candidates, Rejection):
            return self._held(request, candidates, now)
        if found is None:
            self._usual.note(self.pool, request, candidates, now)
        if request.priority < 0 and self._saturated(request, candidates, now):
            message = "The endpoints are saturated, and this request may be dropped."
            return self._saturated_by(request, message, now)
        if self._slow_start:
            candidates, found = self._slow_start.admit(candidates, now), None
        free = filters.below_limit(self.pool, self.settings.max_inflight)
        open_to = candidates if free is None else candidates & free
        rows = open_to.nonzero()[0] if found is None or free is not None else found[1]
        if rows.size and not (len(self.queue) and self._must_wait_behind(request, open_to, now)):
            return self._decide(request, rows, now, reading)
        if self.queue.full:
            return self._saturated_by(request, "The endpoints are saturated and the queue is full.", now)
        self._drain_rate.waiting(now)
        self.queue.add(flow.with_own_deadline(request))
        return Queued(request.id)

    def apply(self, fact: Fact, now: float) -> None:
        """Learn a fact. Facts about requests or endpoints that are gone are ignored: they cross on the way."""
        match fact:
            case FirstToken(request_id):
                self._outcomes.first_token(request_id, now)
            case ResponseStarted():
                self._outcomes.response_started(fact, now)
            case Finished(request_id, status, usage):
                self._outcomes.finished(request_id, status, usage, now)
            case Failed(request_id, reason):
                self.queue.remove(request_id)
                self._outcomes.failed(request_id, reason, now)
            case LateFirstToken(request_id):
                self._outcomes.first_token(request_id, now, timed=False)
            case Booked():
                self._bookings.book_elsewhere(fact, now)
            case Lessons():
                lessons.learn(fact, self.pool, self.learned, self.bytes_per_token, self.index, now)
            case _:
                self._observations.apply(fact, now)

    def poll(self, now: float) -> list[Decision | Rejection]:
        """What the queue lets go: decisions for whom there is room, rejections for whom it is too late."""
        self.charges.expire_silent(now)
        self._polled_at = now
        outcomes: list[Decision | Rejection] = []
        barred = set()  # wishes nobody has room for; decisions only make room scarcer
        for request in self.queue:
            if _wish(request) in barred and not _expired(request, now):
                continue
            outcome = self._retry(request, now)
            if outcome is None:
                barred.add(_wish(request))
                continue
            if isinstance(outcome, Decision):
                self.queue.serve(request.id)
                self._drain_rate.served(now, empty=not len(self.queue))
            else:
                self.queue.remove(request.id)
            outcomes.append(outcome)
        return outcomes

    def next_wakeup(self) -> float | None:
        """The next instant at which `poll` has something to do by itself; None when only facts can change anything."""
        if not len(self.queue):
            return None
        deadline = self.queue.next_deadline()
        pool, after = self.pool, self._polled_at
        resting = pool.present & (pool.ejected_until > after)
        instants = [] if deadline is None else [deadline]
        for column in (pool.ejected_until, pool.probe_at):
            instants += column[resting & (column > after)].tolist()
        return min(instants, default=None)

    @property
    def headers(self) -> frozenset[str]:
        """Names of the request headers that its policy and its queue ask for, in lower case."""
        asked_for = frozenset(getattr(self._profile, "headers", ()))
        return asked_for if self.settings.max_inflight is None else asked_for | flow.HEADERS

    def tune(self, settings: Settings, now: float) -> None:
        """Go by other numbers; block_bytes, index_budget, sessions and seed stay those it began with.

        Requests that wait, charges, counted faults, rests and retries of late are kept; who waits is looked at with the
        next `poll`.
        """
        before = self.settings
        fixed = {name: getattr(before, name) for name in ("block_bytes", "index_budget", "sessions", "seed")}
        self._state.settings = replace(settings, **fixed)
        self.queue.capacity = settings.queue_size
        ejecting = (settings.eject_after, settings.eject_s, settings.eject_max_s)
        if ejecting != (before.eject_after, before.eject_s, before.eject_max_s):
            self.faults.tune(now, *ejecting)
        self.retries.tune(settings.retry_ratio, settings.retry_floor)
        self._patience.tune(floor=settings.hang_floor_s, factor=settings.hang_factor)
        self._slow_start.tune(settings.slow_start_s)

    def watch_saturation(self, detector: Detector | None) -> None:
        """Have another detector tell how full the pool is; None: nobody does."""
        self._saturation = detector

    def is_adapter(self, model: str) -> bool:
        """Whether an engine has said that this is a LoRA adapter."""
        return self.charges.adapters.of(model) is not None

    def patience(self, request_id: int, now: float) -> float:
        """How many more seconds a request may wait for its first byte before its endpoint must be taken to hang."""
        return self._patience.left(request_id, now)

    def fallback(self, request: Request) -> Decision | Rejection:
        """A random endpoint that may take the request, uncharged: for when deciding itself has failed."""
        mask = filters.alive(self.pool, request.arrived_at) & self.pool.serving(request.model)
        rows = np.flatnonzero(mask & filters.asked_for(self.pool, request))
        if rows.size == 0:
            return filters.nobody(self.pool, request)
        endpoint = self.pool.endpoint(int(self._rng.choice(rows)))
        return Decision(request.id, endpoint, charged=False)

    def snapshot(self, now: float) -> list[EndpointState]:
        """Every endpoint as it looks at this moment."""
        return snapshot(self._state, now)

    def lessons(self, now: float) -> Lessons:
        """What was learned, for a replica that has just begun: a fact that it is to `apply`."""
        return lessons.teach(self.pool, self.learned, self.bytes_per_token, self.index, now)

    def _saturated(self, request: Request, candidates: BoolArray, now: float) -> bool:
        """Whether those who may take it are as full as the policy lets them be."""
        if self._saturation is None:
            return False
        return (
            self._saturation.saturation(PoolView(self.pool, candidates.nonzero()[0], now, model=request.model)) >= 1.0
        )

    def _saturated_by(self, request: Request, message: str, now: float) -> Rejection:
        """Come back when those who wait have gone, at the pace of late."""
        seconds = self._drain_rate.seconds_for(len(self.queue), now)
        return Rejection(request.id, RejectReason.SATURATED, 429, message, seconds)

    # --- waiting ---

    def _must_wait_behind(self, request: Request, open_to: BoolArray, now: float) -> bool:
        """Whether someone at least as urgent waits for one of these endpoints: a newcomer does not overtake."""
        asked_for = set()
        for waiting in self.queue:
            if waiting.priority < request.priority:
                return False
            if _wish(waiting) not in asked_for:
                asked_for.add(_wish(waiting))
                theirs = filters.candidates(self.pool, waiting, now)
                if not isinstance(theirs, Rejection) and (theirs & open_to).any():
                    return True
        return False

    def _held(self, request: Request, nobody: Rejection, now: float) -> Rejection | Queued:
        """A request that nobody can take waits for somebody to come, if that is wanted: a pool may grow from none."""
        if not self._may_come(nobody) or request.exclude or self.queue.full:
            return nobody
        until = now + self.settings.hold_s
        if request.deadline is None or until < request.deadline:
            request = msgspec.structs.replace(request, deadline=until)
        self.queue.add(flow.with_own_deadline(request))
        return Queued(request.id)

    def _may_come(self, nobody: Rejection) -> bool:
        return self.settings.hold_s > 0 and nobody.reason is RejectReason.NO_ENDPOINTS

    def _retry(self, request: Request, now: float) -> Decision | Rejection | None:
        candidates = filters.candidates(self.pool, request, now)
        if isinstance(candidates, Rejection) and self._may_come(candidates):
            return candidates if _expired(request, now) else None
        if _expired(request, now):
            message = f"No endpoint had room within {now - request.arrived_at:.1f} s."
            seconds = self._drain_rate.seconds_for(len(self.queue), now)
            return Rejection(request.id, RejectReason.EXPIRED, 429, message, seconds)
        if isinstance(candidates, Rejection):
            return candidates
        if self._slow_start:
            candidates = self._slow_start.admit(candidates, now)
        free = filters.below_limit(self.pool, self.settings.max_inflight)
        rows = np.flatnonzero(candidates if free is None else candidates & free)
        return self._decide(request, rows, now) if rows.size else None

    # --- deciding ---

    def _decide(
        self, request: Request, rows: Int64Array, now: float, reading: Reading | None = None
    ) -> Decision | Rejection:
        sight = self._scout.look(request, rows, now, reading)
        view = sight.view
        total, parts = self._profile.rank(view, request)
        order = self._picker(total, 1 + self.settings.fallbacks, self._rng).tolist()
        if not order:
            message = "No endpoint passes the filters of this request's profile."
            return Rejection(request.id, RejectReason.NO_MATCH, 429, message, _RETRY_AFTER_S)
        best = order[0]
        matched, uncached, _ = view.candidate(best)
        endpoint, *fallbacks = [self.pool.endpoint(rows.item(index)) for index in order]
        self._bookings.book(request, sight, best, now, tuple([each.name for each in fallbacks]))
        return Decision(
            request_id=request.id,
            endpoint=endpoint,
            fallbacks=tuple(fallbacks),
            matched_blocks=int(matched),
            total_blocks=view.total_blocks,
            matched_tokens=view.prompt_tokens - uncached,
            prompt_tokens=view.prompt_tokens,
            waited=now - request.arrived_at,
            ranking=Ranking(self.pool.names, rows, total, parts),
        )


def _wish(request: Request) -> tuple[object, ...]:
    """All that decides who may take a request: equal wishes have equal candidates."""
    return request.model, request.role, request.subset, request.exclude


def _expired(request: Request, now: float) -> bool:
    return request.deadline is not None and request.deadline <= now
