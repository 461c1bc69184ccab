"""One engine's KV events in the order of their numbers: what is missing, what came twice, and what can be believed.

Takes batches as they arrive, live or replayed, and gives facts. Owns the decision when a replay is needed and what the
stream is worth (`EventState`). No sockets, no clock: `sources.kv_events` brings batches and asks for replays.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

from picker.errors import WireError
from picker.types import BlocksRemoved, BlocksStored, CacheCleared, EventsChanged, EventState
from picker.wire.kv_events import Told, decode_batch, tell

BAD_IN_A_ROW = 3  # unreadable batches until the stream is not believed
# vLLM's ROUTER drops what is beyond 1,000 unsent messages to one client, and keeps 10,000 batches: a whole replay may
# take ten rounds, more while the engine goes on. A client that needs twice that will never catch up.
MAX_ROUNDS = 24
REPLAY_COOLDOWN = 30.0  # after a replay that brought nothing
DISTRUST = 30.0  # after a batch that cannot be true; doubles each time
MAX_DISTRUST = 960.0

_LIVE = frozenset({EventState.WHOLE, EventState.PARTIAL})


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a stream has got to, to go on from there in another process.

    next: the number of the batch that is due. digest: of the last one applied, keyed. ts: when that was made, in unix
    seconds. state, reason: what the stream was worth.
    """

    next: int
    digest: bytes
    ts: float
    rank: int | None
    state: EventState
    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The engine `name` goes on where a mark ended: all that was known then is true, and what follows is new."""

    name: str


Said = BlocksStored | BlocksRemoved | CacheCleared | EventsChanged | Resumed


@dataclass(slots=True)
class StreamStats:
    """Counts of one endpoint's stream, for metrics. They only grow, over restarts, too.

    batches: applied. stored, removed: blocks. gaps: jumps of the sequence. replays: requests. restarts: of the engine.
    bad: unreadable messages. unknown: events of types not known. dropped: events left out as wrong or not believed.
    repeated: batches that came twice, by replay and live. misdirected: batches of another data-parallel rank.
    last_seq: of the last batch applied. lag: seconds from its making to its arrival, by both machines' clocks.
    """

    batches: int = 0
    stored: int = 0
    removed: int = 0
    gaps: int = 0
    replays: int = 0
    restarts: int = 0
    bad: int = 0
    unknown: int = 0
    dropped: int = 0
    repeated: int = 0
    misdirected: int = 0
    last_seq: int | None = None
    lag: float | None = None


class _Phase(enum.Enum):
    LIVE = enum.auto()
    NEW = enum.auto()  # a replay of everything is wanted
    VERIFYING = enum.auto()  # connected again: is it still the engine that sent our last batch?
    CATCHING_UP = enum.auto()  # a replay of what is missing is wanted


@dataclass(slots=True)
class _Round:
    """One request for a replay. start: what was to come first. base: what was due when it was made."""

    start: int
    base: int | None
    heard: bool = False
    holes: bool = False
    stranger: bool = False


@dataclass(slots=True)
class Stream:
    """The stream of the endpoint `name`.

    rank: the data-parallel rank whose batches count; None: that of the first batch that names one. secret: batches are
    told apart by digests under it, so that a mark shows nothing of what they hold.
    After `connected`, and whenever `wants` is a number, a replay from there is to be made before the next `receive`:
    each of its batches goes to `replayed`, and then `replay_ended` says whether its end marker came. `now`: monotonic
    seconds; `wall`: unix seconds.
    """

    name: str
    rank: int | None = None
    stats: StreamStats = field(default_factory=StreamStats)
    secret: bytes = field(default=b"", repr=False)
    state: EventState | None = None
    wants: int | None = None
    _reason: str = ""
    _phase: _Phase = _Phase.LIVE
    _next: int | None = None
    _live: int | None = None
    _last: bytes = b""  # digest of the last payload applied
    _last_ts: float = 0.0
    _resuming: bool = False
    _pending: tuple[int, bytes] | None = None
    _round: _Round | None = None
    _rounds: int = 0
    _offered: bool = False
    _ask_again_at: float = float("-inf")
    _bad: int = 0
    _doubts: int = 0
    _doubted_until: float = 0.0

    # --- another process's stream ---

    def mark(self) -> Mark | None:
        """Where it has got to; None where there is nothing to go on from. Call it between batches."""
        if self.state is None or self.state not in _LIVE or not self._next or not self._last:
            return None
        return Mark(self._next, self._last, self._last_ts, self.rank, self.state, self._reason)

    def resume(self, mark: Mark) -> None:
        """Go on from a mark, if the engine has: says `Resumed`, or begins anew. Before the first `connected`."""
        self._next, self._last, self._last_ts = mark.next, mark.digest, mark.ts
        self.rank, self.state, self._reason = mark.rank, mark.state, mark.reason
        self._resuming = True

    # --- connections ---

    def connected(self, *, replay: bool, now: float) -> list[Said]:
        """A subscription stands. replay: whether the engine offers replays."""
        self._offered, self._live, self._pending, self._rounds = replay, None, None, 0
        if self._next is None or self.state is None:
            return self._anew(now, "it was joined late, and replays nothing")
        if self._can_ask(now) and self._next > 0:
            self._ask(_Phase.VERIFYING, self._next - 1)
            return []
        what = "picker was away" if self._resuming else "its connection was interrupted"
        return self._anew(now, f"{what}, and it replays nothing to tell what was missed")

    def absent(self, reason: str) -> list[Said]:
        """No connection can be had. What was known is void."""
        self._forget()
        if self.state is EventState.ABSENT and reason == self._reason:
            return []
        self.state, self._reason = EventState.ABSENT, reason
        return [EventsChanged(self.name, EventState.ABSENT, reason)]

    # --- batches ---

    def receive(self, seq: int, payload: bytes, *, now: float, wall: float = 0.0) -> list[Said]:
        """A live batch."""
        before, self._live = self._live, seq
        if self._next is None:
            return self._join(seq, payload, now, wall)
        if seq == self._next:
            return self._apply(seq, payload, now, wall)
        if seq > self._next:
            return self._gap(seq, payload, now, wall)
        if (before is not None and seq <= before) or self._is_younger(payload):
            return self._restarted(now, wall, seq, payload)
        self.stats.repeated += 1
        return []

    def replayed(self, seq: int, payload: bytes, *, now: float, wall: float = 0.0) -> list[Said]:
        """A batch of the replay that was wanted."""
        current = self._round
        if current is None or current.stranger:
            return []
        first, current.heard = not current.heard, True
        if first and self._phase is _Phase.VERIFYING:
            current.stranger = seq != current.start or self._digest(payload) != self._last
            return [] if current.stranger or not self._resuming else self._resumed()
        said: list[Said] = []
        if first and seq > current.start:  # the first reply is never dropped: the engine has no older batch
            said = self._begin(
                EventState.PARTIAL, f"batches before number {seq} are no longer replayed", lost=self._next is not None
            )
            self._next = seq
        elif first and self._phase is _Phase.NEW:
            said = self._begin(EventState.WHOLE, "seen from its first batch on")
            self._next = seq
        if seq == self._next:
            return said + self._apply(seq, payload, now, wall)
        current.holes = current.holes or seq > (self._next or 0)
        return said

    @property
    def spoiled(self) -> bool:
        """Whether the rest of this replay is of no use; it may be ended, not complete."""
        return self._round is not None and (self._round.holes or self._round.stranger)

    def replay_ended(self, *, complete: bool, now: float, wall: float = 0.0) -> list[Said]:
        """No more of the replay will come; complete: its end marker was seen."""
        current, self._round, self.wants = self._round, None, None
        if current is None:
            return []
        self.stats.replays += 1
        self._rounds += 1
        if current.stranger or (self._phase is _Phase.VERIFYING and complete and not current.heard):
            return self._restarted(now, wall)
        moved = self._next != current.base
        if not complete and not moved:
            self._ask_again_at = now + REPLAY_COOLDOWN
        said = self._conclude(current, complete, moved)
        return said if self.wants is not None else said + self._settle(now, wall)

    def _conclude(self, current: _Round, complete: bool, moved: bool) -> list[Said]:
        """What the end of a round means; may want another."""
        phase, self._phase = self._phase, _Phase.LIVE
        if (current.holes or not complete) and moved and self._next is not None and self._rounds < MAX_ROUNDS:
            self._ask(_Phase.CATCHING_UP, self._next)
            return []
        if phase is _Phase.NEW and not current.heard:
            if complete:
                self._next = 0
                return self._begin(EventState.WHOLE, "it has sent nothing yet")
            return self._begin(EventState.PARTIAL, "its replay did not answer")
        if phase is _Phase.VERIFYING and not current.heard:
            self._next = None
            what = "picker was away" if self._resuming else "its connection was interrupted"
            return self._begin(EventState.PARTIAL, f"{what}, and its replay did not answer")
        return []

    def _settle(self, now: float, wall: float) -> list[Said]:
        """Go on with the live batch that showed the gap."""
        self._rounds = 0
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        seq, payload = pending
        if self._next is None:
            return self._join(seq, payload, now, wall)
        if seq > self._next:
            return self._lost(seq, payload, now, wall)
        return self._apply(seq, payload, now, wall) if seq == self._next else []

    # --- what is missing ---

    def _can_ask(self, now: float) -> bool:
        return self._offered and now >= self._ask_again_at

    def _ask(self, phase: _Phase, start: int) -> None:
        self._phase, self.wants, self._round = phase, start, _Round(start, self._next)

    def _anew(self, now: float, otherwise: str) -> list[Said]:
        """Learn everything from nothing."""
        self._next = None
        if self._can_ask(now):
            self._ask(_Phase.NEW, 0)
            return []
        return self._begin(EventState.PARTIAL, otherwise)

    def _join(self, seq: int, payload: bytes, now: float, wall: float) -> list[Said]:
        self._next = seq
        said: list[Said] = []
        if seq == 0 and self.state is not EventState.WHOLE:
            said = self._begin(EventState.WHOLE, "seen from its first batch on")
        elif self.state is None or self.state is EventState.ABSENT:
            said = self._begin(EventState.PARTIAL, f"joined at batch number {seq}")
        return said + self._apply(seq, payload, now, wall)

    def _gap(self, seq: int, payload: bytes, now: float, wall: float) -> list[Said]:
        self.stats.gaps += 1
        if not self._can_ask(now) or self._next is None:
            return self._lost(seq, payload, now, wall)
        self._pending = (seq, payload)
        self._ask(_Phase.CATCHING_UP, self._next)
        return []

    def _lost(self, seq: int, payload: bytes, now: float, wall: float) -> list[Said]:
        missing = seq - (self._next or 0)
        self._next = seq
        reason = f"{missing} batches before number {seq} were lost"
        return self._begin(EventState.PARTIAL, reason, lost=True) + self._apply(seq, payload, now, wall)

    def _restarted(self, now: float, wall: float, seq: int = 0, payload: bytes | None = None) -> list[Said]:
        """The numbers began again: a new process, whose cache is empty."""
        self.stats.restarts += 1
        self._forget()
        said: list[Said] = [CacheCleared(self.name)]
        if self._can_ask(now) and self._rounds < MAX_ROUNDS:
            self._pending = None if payload is None else (seq, payload)
            self._ask(_Phase.NEW, 0)
            return said
        if payload is None:
            return said + self._begin(EventState.PARTIAL, "the engine restarted")
        if seq:
            said += self._begin(EventState.PARTIAL, "the engine restarted, and its first batches were missed")
        return said + self._join(seq, payload, now, wall)

    def _resumed(self) -> list[Said]:
        self._resuming = False
        return [Resumed(self.name)]

    def _forget(self) -> None:
        self._resuming = False
        self._next = self._live = self._pending = self._round = self.wants = None
        self._phase, self._bad, self._doubts, self._doubted_until = _Phase.LIVE, 0, 0, 0.0

    def _is_younger(self, payload: bytes) -> bool:
        """Whether a batch with an old number was made after the last one; clocks are seldom set back."""
        try:
            return decode_batch(payload).ts > self._last_ts
        except WireError:
            return False

    # --- what is said ---

    def _begin(self, state: EventState, reason: str, *, lost: bool = False) -> list[Said]:
        """A new stream. lost: of one that was believed, so that somebody should hear of it."""
        said: list[Said] = []
        if lost and self.state in _LIVE:
            said.append(EventsChanged(self.name, EventState.SUSPECT, reason))
        self.state, self._reason, self._bad, self._resuming = state, reason, 0, False
        return [*said, EventsChanged(self.name, state, reason)]

    def _apply(self, seq: int, payload: bytes, now: float, wall: float) -> list[Said]:
        """Read the batch whose turn it is."""
        try:
            batch = decode_batch(payload)
        except WireError as error:
            return self._unreadable(seq, error, now)
        self._note(seq, payload)
        self._last_ts, self.stats.lag = batch.ts, wall - batch.ts
        self._bad = 0
        self.rank = batch.rank if self.rank is None else self.rank
        if batch.rank is not None and batch.rank != self.rank:
            self.stats.misdirected += 1
            return []
        told = tell(batch.events, self.name)
        self.stats.unknown += batch.skipped
        if told.wrong is not None:
            self.stats.dropped += told.dropped
            return self._doubt(f"an event has {told.wrong}", now)
        return self._believe(told, now)

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.blake2b(payload, digest_size=16, key=self.secret[:64], person=b"batch").digest()

    def _note(self, seq: int, payload: bytes) -> None:
        self._next, self._last = seq + 1, self._digest(payload)
        self.stats.batches += 1
        self.stats.last_seq = seq

    def _unreadable(self, seq: int, error: WireError, now: float) -> list[Said]:
        self.stats.bad += 1
        if self._round is None and not self._bad and self.state in _LIVE and self._can_ask(now):
            self._next = seq  # what is kept for replay may be better
            self._ask(_Phase.CATCHING_UP, seq)
            return []
        self._next = seq + 1
        self._bad += 1
        if self._bad < BAD_IN_A_ROW or self.state not in _LIVE:
            return []
        return self._doubt(f"{self._bad} batches in a row could not be read: {error.message}", now)

    def _doubt(self, reason: str, now: float) -> list[Said]:
        """Believe nothing for a while."""
        self._doubted_until = now + min(DISTRUST * 2.0 ** min(self._doubts, 10), MAX_DISTRUST)
        if self.state is EventState.SUSPECT:
            return []
        self._doubts += 1
        self.state = EventState.SUSPECT
        return [EventsChanged(self.name, EventState.SUSPECT, reason)]

    def _believe(self, told: Told, now: float) -> list[Said]:
        said: list[Said] = []
        if self.state is EventState.SUSPECT:
            if now < self._doubted_until:
                self.stats.dropped += len(told.facts)
                return []
            said = self._begin(EventState.PARTIAL, "it is believed again, from here on")
        self.stats.stored += told.stored
        self.stats.removed += told.removed
        for fact in told.facts:
            said.append(fact)
            if isinstance(fact, CacheCleared) and self.state is EventState.PARTIAL:
                said += self._begin(EventState.WHOLE, "its cache was cleared since")
        return said
