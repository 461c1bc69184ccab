"""The decision: the single owner of pool, charges, prefix index, queue and generator.

Four verbs, after aioquic: `submit` a request, `apply` a fact, `poll` for what the queue has let go, `next_wakeup` for
when to poll again. Everything the scheduler knows came through `apply` or `submit`; the same sequence of calls with
the same seed gives the same decisions, under a real clock or a virtual one. No IO, no clock, no await.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np

from picker.core import filters, flow, lessons
from picker.core.calibration import Calibration
from picker.core.charges import Charge, Charges
from picker.core.cost_few import FEW
from picker.core.drain_rate import DrainRate
from picker.core.estimate import Ratio
from picker.core.faults import Faults, blames
from picker.core.flow import FlowQueue
from picker.core.learned import SAME_STEP_S, FirstTokenSample, Learned
from picker.core.patience import Patience
from picker.core.pick import Picker, max_score
from picker.core.pins import MARKS, Hold, hold
from picker.core.pool import Pool
from picker.core.profile import Cost, Profile
from picker.core.retry_budget import RetryBudget
from picker.core.saturation import Detector
from picker.core.slow_start import SlowStart
from picker.core.snapshot import EndpointState, endpoint_state
from picker.core.usual import Usual
from picker.core.view import Handful, Numbers, PoolView, place
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact, Known
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    Booked,
    BoolArray,
    CacheCleared,
    Decision,
    Endpoint,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    EventsChanged,
    EventState,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    FloatArray,
    HealthObserved,
    Int64Array,
    LateFirstToken,
    Lessons,
    LoadObserved,
    ModelsObserved,
    PrefixHeld,
    Queued,
    Ranking,
    Reading,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    ScrapeFailed,
    Sleep,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a scheduler is told once.

    block_bytes: bytes per block of `Request.block_hashes`. index_budget: bytes the prefix index may take.
    fallbacks: endpoints named behind the first. max_inflight: requests per endpoint before others must wait (None: no
    limit, the engines queue). queue_size: requests that may wait here then. hold_s: how long one waits when there is no
    endpoint at all, for one to come.
    eject_after: consecutive faults after which an endpoint rests for eject_s, twice as long each further time, at most
    eject_max_s. sessions: how many session ids are remembered.
    retry_ratio: requests sent a second time per request, beside retry_floor of them in ten seconds; None: no limit.
    hang_floor_s: an endpoint that is silent for so long, and a request that has waited hang_factor times as long as
    predicted beyond that, are given up; 0: never. slow_start_s: a newcomer's share of the work grows for so long.
    """

    block_bytes: int = 256
    index_budget: int = 512 * 1024 * 1024
    fallbacks: int = 2
    max_inflight: int | None = None
    queue_size: int = 1000
    hold_s: float = 0.0
    eject_after: int = 3
    eject_s: float = 1.0
    eject_max_s: float = 30.0
    retry_ratio: float | None = None
    retry_floor: float = 10.0
    hang_factor: float = 4.0
    hang_floor_s: float = 0.0
    slow_start_s: float = 0.0
    sessions: int = 100_000
    seed: int = 0


# Prompt bytes per token before anyone has told: about right for English text and a BPE vocabulary.
_BYTES_PER_TOKEN = 4.0
# Shorter answers tell of rounding, not of speed.
_LEARN_FROM_TOKENS = 16
_TYPICAL_TOKENS = 4096.0
_BLOCK_TOKENS = 16.0  # of an engine that does not say
_RETRY_AFTER_S = 1.0
_NOTICES = 100


class _Sight(NamedTuple):
    """What one decision is made of. guessed: (n,) leading blocks that the approximate index believes cached.

    held: what the request will hold where it goes. known: what KV events tell of its prompt.
    """

    view: PoolView
    held: Hold
    guessed: Numbers
    known: Known | None


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
        self.settings = settings
        self._saturation = saturation
        self.pool = Pool()
        self._usual = Usual()
        self._handful = Handful(np.empty(0, dtype=np.int64))
        self.index = index
        self.exact = exact
        self.calibration = Calibration(self.pool.rows)
        self.notices: deque[str] = deque(maxlen=_NOTICES)
        self.queue = FlowQueue(settings.queue_size)
        self.charges = Charges(self.pool)
        self.faults = Faults(
            self.pool,
            eject_after=settings.eject_after,
            eject_s=settings.eject_s,
            eject_max_s=settings.eject_max_s,
        )
        self.retries = RetryBudget(settings.retry_ratio, settings.retry_floor)
        self._slow_start = SlowStart(self.pool, settings.slow_start_s)
        self._drain_rate = DrainRate()
        self._profile: Profile = profile or Cost()
        self._picker = picker
        self._rng = np.random.default_rng(settings.seed)
        self.learned = Learned(self.pool.rows)
        self._patience = Patience(
            self.pool, self.charges, self.learned, floor=settings.hang_floor_s, factor=settings.hang_factor
        )
        self._bytes_per_token = Ratio(_BYTES_PER_TOKEN, prior_weight=2000.0, keep=0.99)
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._decisions = self._picks = 0  # our own; and with those of other replicas
        self._polled_at = -np.inf
        index.grow_rows(self.pool.rows)

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
        if request.exclude and not self.retries.take(self._decisions, now):
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
                self._first_token(request_id, now)
            case ResponseStarted():
                self._response_started(fact, now)
            case Finished(request_id, status, usage):
                self._finished(request_id, status, usage, now)
            case Failed(request_id, reason):
                self._failed(request_id, reason, now)
            case LoadObserved():
                self._load(fact, now)
            case EndpointAdded(endpoint):
                self._added(endpoint, now)
            case EndpointRemoved(name):
                self._removed(name)
            case ScrapeFailed(name):
                self._unseen(name)
            case BlocksStored() | BlocksRemoved() | EventsChanged():
                self._told(fact)
            case ModelsObserved() | HealthObserved() | EndpointDraining() | CacheCleared():
                self._about_endpoint(fact, now)
            case Booked():
                self._booked_elsewhere(fact, now)
            case PrefixHeld(name, block_hashes):
                if (row := self.pool.row(name)) is not None:
                    self.index.store(row, block_hashes)
            case LateFirstToken(request_id):
                self._first_token(request_id, now, timed=False)
            case Lessons():
                lessons.learn(fact, self.pool, self.learned, self._bytes_per_token, self.index, now)

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
        self.settings = replace(settings, **fixed)
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
        return [
            endpoint_state(
                self.pool,
                row,
                endpoint,
                now,
                speed=self._speed(row),
                index_blocks=self.index.resident(row),
                index_trust=float(self.index.trust[row]),
                events=None if self.exact is None else self.exact.stream(row),
                predictions=self.calibration.record(row),
                doubt=self.calibration.complaint(row) if self.calibration.doubted[row] else None,
            )
            for row, endpoint in self.pool
        ]

    def lessons(self, now: float) -> Lessons:
        """What was learned, for a replica that has just begun: a fact that it is to `apply`."""
        return lessons.teach(self.pool, self.learned, self._bytes_per_token, self.index, now)

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
        sight = self._look(request, rows, now, reading)
        view = sight.view
        total, parts = self._profile.rank(view, request)
        order = self._picker(total, 1 + self.settings.fallbacks, self._rng).tolist()
        if not order:
            message = "No endpoint passes the filters of this request's profile."
            return Rejection(request.id, RejectReason.NO_MATCH, 429, message, _RETRY_AFTER_S)
        best = order[0]
        matched, uncached, _ = view.candidate(best)
        endpoint, *fallbacks = [self.pool.endpoint(rows.item(index)) for index in order]
        self._book(request, sight, best, now, tuple([each.name for each in fallbacks]))
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

    def _look(self, request: Request, rows: Int64Array, now: float, reading: Reading | None) -> _Sight:
        """Everything that the decision depends on."""
        if rows.size <= FEW and self.exact is None:
            return self._look_at_few(request, rows, now)
        pick = place(rows)
        guessed = matched = self.index.match(request.block_hashes)[pick].astype(np.float64)
        tokens, per_byte = self._tokens(request)
        cached = guessed * (self.settings.block_bytes * per_byte) * self.index.trust[pick]
        held = hold(request.block_hashes, self.settings.block_bytes * per_byte, tokens)
        shared = self.charges.pins.shared(held, self.pool.rows)[pick]
        # The engine always computes the last token of a prompt again.
        cached = np.minimum(cached, max(request.prompt_bytes * per_byte - 1.0, 0.0))
        known = None if self.exact is None else self.exact.match(reading, request)
        if known is not None:
            tokens = _counted(request, reading, tokens, known)
            cached = self._corrected(cached, known, pick, shared)
            matched = cached * (request.block_hashes.size / max(tokens, 1.0))
        view = PoolView(
            self.pool,
            rows,
            now,
            pick=pick,
            matched_blocks=matched,
            total_blocks=request.block_hashes.size,
            prompt_tokens=tokens,
            uncached=tokens - np.minimum(cached, tokens),
            learned=self.learned,
            session_row=self._session_row(request),
            model=request.model,
            adapters=self.charges.adapters,
            shared=shared,
        )
        return _Sight(view, held, guessed, known)

    def _look_at_few(self, request: Request, rows: Int64Array, now: float) -> _Sight:
        """The same of a handful of candidates, in plain numbers."""
        tokens, per_byte = self._tokens(request)
        block, most = self.settings.block_bytes * per_byte, max(request.prompt_bytes * per_byte - 1.0, 0.0)
        held = hold(request.block_hashes, block, tokens)
        if self._handful.rows is not rows:
            self._handful = Handful(rows)
        places, wanted = self._handful.places, self._handful.bits
        n = len(places)
        guessed, uncached, shared = [0.0] * n, [tokens] * n, [0.0] * n
        for row, blocks in self.index.match_few(request.block_hashes, wanted):
            guessed[places[row]] = float(blocks)
            cached = min(blocks * block * self.index.trust.item(row), most)
            uncached[places[row]] = tokens - min(cached, tokens)
        for row, pinned in self.charges.pins.shared_by(held, wanted):
            shared[places[row]] = float(pinned)
        view = PoolView(
            self.pool,
            rows,
            now,
            pick=self._handful.pick,
            matched_blocks=guessed,
            total_blocks=request.block_hashes.size,
            prompt_tokens=tokens,
            uncached=uncached,
            learned=self.learned,
            session_row=self._session_row(request),
            model=request.model,
            adapters=self.charges.adapters,
            shared=shared,
        )
        return _Sight(view, held, guessed, None)

    def _corrected(self, cached: FloatArray, known: Known, pick: slice | Int64Array, shared: FloatArray) -> FloatArray:
        """(n,) cached tokens: as told where a stream is whole, at least as told where it is not, else as estimated.

        What requests in flight hold there and no event has told yet will be there when this one is looked at.
        """
        block = np.nan_to_num(self.pool.block_size[pick], nan=_BLOCK_TOKENS)
        believed, told = ~self.calibration.doubted[pick], np.maximum(known.tokens[pick], shared // block * block)
        cached = np.where(believed & known.partial[pick], np.maximum(cached, told), cached)
        corrected: FloatArray = np.where(believed & known.whole[pick], told, cached)
        return corrected

    def _tokens(self, request: Request) -> tuple[float, float]:
        """(tokens of the whole request, tokens per byte of its leading prompt)."""
        learned = 1.0 / self._bytes_per_token.value
        extra = request.extra_bytes * learned
        if request.prompt_tokens is None:
            return request.prompt_bytes * learned + extra, learned
        return request.prompt_tokens + extra, request.prompt_tokens / max(request.prompt_bytes, 1)

    def _book(self, request: Request, sight: _Sight, best: int, now: float, others: tuple[str, ...]) -> None:
        pool, view, known = self.pool, sight.view, sight.known
        row = view.rows.item(best)
        _, uncached, shared = view.candidate(best)
        work = self.learned.work(uncached, view.prompt_tokens)
        speed = self.learned.prefill_speed.value.item(row)
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
            adapter=self.charges.adapters.of(request.model),
            told=None if known is None else self._expected(row, known, shared),
            others=others,
            sure=not others,
        )
        self._decisions += 1
        self._open(charge, work, speed, tied=uncached < 0.5 * view.prompt_tokens, now=now)

    def _booked_elsewhere(self, fact: Booked, now: float) -> None:
        """What `_book` does, of another replica's decision."""
        row, pool, request = self.pool.row(fact.name), self.pool, fact.request
        if row is None or request.id in self.charges:
            return
        per_byte = self._tokens(request)[1]
        work = self.learned.work(fact.uncached, fact.tokens)
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
            held=hold(request.block_hashes, self.settings.block_bytes * per_byte, fact.tokens),
            adapter=self.charges.adapters.of(request.model),
            others=fact.others,
            sure=not fact.others,
        )
        speed = self.learned.prefill_speed.value.item(row)
        self._open(charge, work, speed, tied=fact.uncached < 0.5 * fact.tokens, now=now)

    def _open(self, charge: Charge, work: float, speed: float, *, tied: bool, now: float) -> None:
        """All that follows from a decision. work: seconds of prefill where the speed is 1."""
        row, request = charge.row, charge.request
        self.charges.book(charge, expected_s=(self.pool.work.item(row) * 1e-9 + work) / speed)
        self.learned.booked(work / speed, tied=tied, now=now)
        self._picks += 1
        self.pool.last_pick[row] = self._picks
        self.faults.tried(row, now)
        # Learned at booking: the next request of the same group, a moment later, must already find it.
        self.index.store(row, request.block_hashes)
        self._remember_session(request, row)

    def _speed(self, row: int) -> float:
        """Prefill tokens per second of a prompt of middling length."""
        seconds = self.learned.work(_TYPICAL_TOKENS, _TYPICAL_TOKENS)
        # An engine that answers any prompt at once (a stand-in for one) has no speed; this one is beyond all others.
        return _TYPICAL_TOKENS / max(seconds, 1e-9) * float(self.learned.prefill_speed.value[row])

    def _expected(self, row: int, known: Known, shared: float) -> tuple[float, float] | None:
        """Between how many tokens an engine will find cached if its events tell the truth.

        At most what it was told, or what requests in flight hold there, which is known to within their marks.
        """
        if not known.whole[row]:
            return None
        least, block = known.cached.item(row), float(self.pool.block_size[row])
        slack = shared * (1.0 + 1.0 / MARKS) + (_BLOCK_TOKENS if math.isnan(block) else block)
        return least, least if shared <= least else slack

    # --- sessions ---

    def _session_row(self, request: Request) -> int | None:
        name = self._sessions.get(request.session) if request.session else None
        return None if name is None else self.pool.row(name)

    def _remember_session(self, request: Request, row: int) -> None:
        if not request.session:
            return
        self._sessions[request.session] = self.pool.endpoint(row).name
        self._sessions.move_to_end(request.session)
        if len(self._sessions) > self.settings.sessions:
            self._sessions.popitem(last=False)

    # --- facts about requests ---

    def _response_started(self, fact: ResponseStarted, now: float) -> None:
        """The data plane may have gone to a fallback: the charge follows the request."""
        charge = self.charges.get(fact.request_id)
        if charge is None:
            return
        if fact.served_by is None:
            # Somebody has answered, and where nobody can be reached it was not this one.
            row = None if charge.sure or self._answering(charge, now) else self._next_alive(charge, now)
        elif self._is_at(charge, fact.served_by):
            charge.sure = True
            return
        else:
            row = self.pool.row_of_address(fact.served_by)
        if row is not None:
            self._move(charge, row, now, sure=fact.served_by is not None)

    def _answering(self, charge: Charge, now: float) -> bool:
        return self.charges.stands(charge) and bool(filters.alive(self.pool, now)[charge.row])

    def _next_alive(self, charge: Charge, now: float) -> int | None:
        """The first of those behind the choice that can be reached."""
        alive, rows = filters.alive(self.pool, now), map(self.pool.row, charge.others)
        return next((row for row in rows if row is not None and alive[row]), None)

    def _move(self, charge: Charge, row: int, now: float, *, sure: bool) -> None:
        """Another endpoint serves the request: those that were to be tried before it have failed."""
        self._disown(charge, now)
        self.charges.close(charge.request.id, now)
        self._fault_others(charge, row, now)
        moved = Charge(
            request=charge.request,
            row=row,
            generation=int(self.pool.generation[row]),
            tokens=charge.tokens,
            context=charge.context,
            predicted=0,
            work=charge.work,
            booked_at=now,
            held=charge.held,
            adapter=charge.adapter,
            sure=sure,
        )
        self.charges.book(moved, expected_s=charge.work * 1e-9 / float(self.learned.prefill_speed.value[row]))
        self.index.store(row, charge.request.block_hashes)
        self._remember_session(charge.request, row)

    def _fault_others(self, charge: Charge, served: int, now: float) -> None:
        """Of the fallbacks, those in the order before the one that served; nobody's, where it was not of them."""
        rows = [self.pool.row(name) for name in charge.others]
        for row in rows[: rows.index(served)] if served in rows else ():
            if row is not None:
                self.faults.failed(row, now)

    def _disown(self, charge: Charge, now: float) -> None:
        """An endpoint failed before it answered: a fault, and nothing is cached there that was not before.

        Of one that rests anyway the second is not worth the time: all requests of an outage come by here.
        """
        if self.charges.stands(charge):
            resting = self.pool.ejected_until.item(charge.row) > now
            self.faults.failed(charge.row, now)
            self._take_back(charge, thorough=not resting)

    def _take_back(self, charge: Charge, *, thorough: bool) -> None:
        self.index.take_back(charge.row, charge.request.block_hashes, charge.predicted, thorough=thorough)

    def _is_at(self, charge: Charge, address: str) -> bool:
        # By address, not by row: the ranks of one engine share it, and the data plane does not tell them apart.
        return self.charges.stands(charge) and self.pool.endpoint(charge.row).address == address

    def _first_token(self, request_id: int, now: float, *, timed: bool = True) -> None:
        charge = self.charges.get(request_id)
        if charge is None:
            return
        progress_at = float(self.pool.progress_at[charge.row])
        since = max(charge.booked_at, progress_at)
        if self.charges.stands(charge):
            self.faults.stirred(charge.row, now)
        if self.charges.first_token(request_id, now) is None or not (charge.request.streaming and timed):
            return
        sample = FirstTokenSample(charge.row, now - since, charge.tokens, charge.context, was_idle=charge.was_idle)
        self.learned.first_token(sample, merged=now - progress_at < SAME_STEP_S)

    def _finished(self, request_id: int, status: int, usage: Usage | None, now: float) -> None:
        self.charges.first_token(request_id, now)
        charge = self.charges.close(request_id, now)
        if charge is None or not self.charges.stands(charge):
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

    def _failed(self, request_id: int, reason: FailureReason, now: float) -> None:
        self.queue.remove(request_id)
        charge = self.charges.close(request_id, now)
        if charge is None or not reason.blames_endpoint:
            return
        if reason is FailureReason.TIMEOUT and self._patience.silent(charge, now):
            self.faults.hangs(charge.row, now)
            self._take_back(charge, thorough=False)
        elif charge.prefilling:
            self._disown(charge, now)
        else:
            self._fault(charge, now)
        self._grant(charge, now)

    def _grant(self, charge: Charge, now: float) -> None:
        """What was under way when an endpoint failed may move to another, whatever the budget says."""
        if not self.charges.stands(charge) or self.faults.surprised(charge.row, charge.booked_at):
            self.retries.grant(now)

    def _answered(self, charge: Charge, now: float) -> None:
        row = charge.row
        recovered = self.pool.rests.item(row) > 0
        self.faults.answered(row, now, sure=charge.sure)
        if charge.sure:
            self.pool.stirred_at[row] = now
            if recovered and not self.pool.rests.item(row):
                self._slow_start.begin(row, now)

    def _fault(self, charge: Charge, now: float) -> None:
        if self.charges.stands(charge):
            self.faults.failed(charge.row, now)

    def _learn_usage(self, charge: Charge, usage: Usage) -> None:
        request = charge.request
        if request.extra_bytes:
            return  # the counts are of all prompts together
        if request.prompt_bytes and request.prompt_tokens is None:
            self._bytes_per_token.add(request.prompt_bytes, usage.prompt_tokens)
        self._compare(charge, usage)
        if usage.cached_tokens is None or not request.block_hashes.size:
            return
        # One engine block of slack: the engine counts whole blocks of its own, at other boundaries than ours.
        block_size = float(self.pool.block_size[charge.row])
        slack = _BLOCK_TOKENS if math.isnan(block_size) else block_size
        share = min((usage.cached_tokens + slack) / usage.prompt_tokens, 1.0)
        actual = int(share * request.prompt_bytes) // self.settings.block_bytes
        self.index.correct(charge.row, request.block_hashes, predicted=charge.predicted, actual=actual)

    def _compare(self, charge: Charge, usage: Usage) -> None:
        """Hold a prediction made from events against what came of it."""
        if charge.told is None:
            return
        least, most = charge.told
        if usage.cached_tokens is None:
            self.calibration.silent(charge.row, prompt=usage.prompt_tokens, expected=least)
        elif self.calibration.reported(charge.row, least=least, most=most, cached=usage.cached_tokens):
            self._note_verdict(charge.row)

    def _note_verdict(self, row: int) -> None:
        name = self.pool.endpoint(row).name
        if self.calibration.doubted[row]:
            self.notices.append(f"{name}: its KV events are not believed: {self.calibration.complaint(row)}")
        else:
            self.notices.append(f"{name}: its KV events are believed again: the latest predictions came true")

    def _learn_decoding(self, charge: Charge, usage: Usage, now: float) -> None:
        """From a whole stream: its time, less the prefills it waited for, by the company it had on average."""
        if charge.request.extra_bytes:
            return  # the counts are of all prompts together
        self.learned.output_tokens.add(usage.completion_tokens, 1.0)
        took = now - charge.first_at
        if not charge.request.streaming or usage.completion_tokens < _LEARN_FROM_TOKENS or not took > 0:
            return
        row, pool = charge.row, self.pool
        decodes, context, prefill = charge.areas
        waited = (float(pool.prefill_area[row]) - prefill) / float(self.learned.prefill_speed.value[row])
        company = (float(pool.decodes_area[row]) - decodes) / took
        tokens = (float(pool.context_area[row]) - context) / took + company * self.learned.output_tokens.value / 2.0
        steps = usage.completion_tokens - 1
        seconds = max(took - waited, 0.1 * took)
        self.learned.finished(row, seconds=seconds, tokens=steps, decodes=company, context=tokens)

    # --- facts about endpoints ---

    def _about_endpoint(
        self, fact: ModelsObserved | HealthObserved | EndpointDraining | CacheCleared, now: float
    ) -> None:
        row = self.pool.row(fact.name)
        if row is None:
            return
        match fact:
            case ModelsObserved(models=models, adapters=adapters):
                self.charges.adapters.known |= adapters
                self.pool.set_models(row, models)
            case HealthObserved(healthy=healthy):
                if healthy and not self.pool.healthy[row]:
                    self.faults.reached(row, now)
                    self._slow_start.begin(row, now)
                self.pool.healthy[row] = healthy
            case EndpointDraining(draining=draining):
                self.pool.set_standing(row, leaving=draining)
            case CacheCleared():
                self.index.clear(row)
                if self.exact is not None:
                    self.exact.apply(row, fact)

    def _told(self, fact: BlocksStored | BlocksRemoved | EventsChanged) -> None:
        row = self.pool.row(fact.name)
        if row is None or self.exact is None:
            return
        self.exact.apply(row, fact)
        if isinstance(fact, EventsChanged):
            self.calibration.forget(row)
            if fact.state is EventState.SUSPECT:
                self.notices.append(f"{fact.name}: its KV events cannot be relied on: {fact.reason}")

    def _added(self, endpoint: Endpoint, now: float) -> None:
        row = self.pool.row(endpoint.name)
        if row is not None and self.pool.endpoint(row).address == endpoint.address:
            models = endpoint.models or self.pool.endpoint(row).models
            self.pool.describe(row, _with_models(endpoint, models))
            return
        if row is not None:
            self._removed(endpoint.name)
        rows = self.pool.rows
        row = self.pool.add(endpoint, now)
        self._slow_start.begin(row, now)
        if self.pool.rows != rows:
            self.learned.grow(self.pool.rows)
            self.index.grow_rows(self.pool.rows)
            self.charges.adapters.grow(self.pool.rows)
            self.calibration.grow(self.pool.rows)
            if self.exact is not None:
                self.exact.grow_rows(self.pool.rows)

    def _removed(self, name: str) -> None:
        row = self.pool.row(name)
        if row is None:
            return
        self.pool.remove(row)
        self.index.remove_row(row)
        self.charges.pins.clear(row)
        self.charges.adapters.clear(row)
        self.calibration.forget(row)
        if self.exact is not None:
            self.exact.remove_row(row)
        self.learned.forget(row)

    def _unseen(self, name: str) -> None:
        """Old values stay and age; see `PoolView.age`."""
        if (row := self.pool.row(name)) is not None:
            self.pool.unreachable[row] = True

    def _load(self, fact: LoadObserved, now: float) -> None:
        row = self.pool.row(fact.name)
        if row is None:
            return
        pool, restarted = self.pool, self._restarted(row, fact)
        if restarted:
            self.index.clear(row)
        if restarted or pool.unreachable[row]:
            self.faults.reached(row, now)
            pool.unreachable[row] = False
        if restarted:
            self._slow_start.begin(row, now)
        if fact.sleep is not None:
            self._sleeps(row, fact.sleep, now)
        if self._moves(row, fact):
            pool.stirred_at[row] = now
        pool.observed_at[row] = fact.observed_at
        for column, value in (
            (pool.waiting, fact.waiting),
            (pool.running, fact.running),
            (pool.kv_usage, fact.kv_usage),
            (pool.queries, fact.queries),
            (pool.hits, fact.hits),
            (pool.started_at, fact.started_at),
            (pool.block_size, fact.block_size),
            (pool.max_adapters, fact.max_adapters),
        ):
            column[row] = np.nan if value is None else value
        if fact.kv_capacity_tokens:  # None: not told; 0: an engine that has not measured it yet
            self._set_capacity(row, fact.kv_capacity_tokens)
        if (
            fact.queries is not None
            and fact.hits is not None
            and self.calibration.counted(row, fact.queries, fact.hits)
        ):
            self._note_verdict(row)
        if fact.adapters is not None:
            pool.set_adapters(row, fact.adapters)
            self.charges.adapters.known |= fact.adapters

    def _sleeps(self, row: int, sleep: Sleep, now: float) -> None:
        """An engine that sleeps is well and gets nothing new; of what it forgets nothing is believed."""
        asleep = sleep is not Sleep.AWAKE
        if sleep is Sleep.DEEP:  # each time: what was under way when it fell asleep may have been noted since
            self.index.clear(row)
            if self.exact is not None:
                self.exact.apply(row, CacheCleared(self.pool.endpoint(row).name))
        if asleep != self.pool.asleep.item(row):
            self.pool.set_standing(row, asleep=asleep)
            self.notices.append(f"{self.pool.endpoint(row).name} {'sleeps' if asleep else 'is awake again'}")
            if not asleep:
                self._slow_start.begin(row, now)

    def _moves(self, row: int, fact: LoadObserved) -> bool:
        """Whether the engine has done anything since the last look: its gauges are set at every step, and only then."""
        pool = self.pool
        pairs = ((fact.kv_usage, pool.kv_usage), (fact.queries, pool.queries), (fact.running, pool.running))
        return any(value is not None and value != column.item(row) for value, column in pairs)

    def _restarted(self, row: int, fact: LoadObserved) -> bool:
        """A new process start, or a counter that went back: the cache the index remembers is gone."""
        started, queries = float(self.pool.started_at[row]), float(self.pool.queries[row])
        moved = fact.started_at is not None and fact.started_at > started + 1.0
        return moved or (fact.queries is not None and fact.queries < queries)

    def _set_capacity(self, row: int, tokens: int) -> None:
        """Follow the engine's capacity, and what we learn of bytes per token, in steps that matter."""
        self.pool.kv_capacity[row] = tokens
        if self.exact is not None:
            self.exact.set_capacity(row, tokens)
        blocks = max(1, int(tokens * self._bytes_per_token.value) // self.settings.block_bytes)
        known = float(self.pool.capacity_blocks[row])
        if not abs(blocks - known) <= 0.02 * known:
            self.pool.capacity_blocks[row] = blocks
            self.index.set_capacity(row, blocks)


def _counted(request: Request, reading: Reading | None, tokens: float, known: Known) -> float:
    """Tokens of the whole request: counted, at least as far as it is stored somewhere; estimated behind that."""
    if request.prompt_tokens is not None:
        return tokens
    if reading is not None and reading.tokens is not None:
        return float(reading.tokens)
    return known.depth_tokens + (1.0 - known.depth) * tokens


def _wish(request: Request) -> tuple[object, ...]:
    """All that decides who may take a request: equal wishes have equal candidates."""
    return request.model, request.role, request.subset, request.exclude


def _expired(request: Request, now: float) -> bool:
    return request.deadline is not None and request.deadline <= now


def _with_models(endpoint: Endpoint, models: frozenset[str]) -> Endpoint:
    return Endpoint(
        endpoint.name, endpoint.address, models, endpoint.role, endpoint.scheme, endpoint.rank, endpoint.labels
    )
