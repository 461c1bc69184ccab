"""What each endpoint caches, as its engine tells it: KV events kept as an index, and how far they can be relied on.

Joins a speller (what a block is in a prompt) with an index (who holds which block). Owns the state of each endpoint's
stream and nothing else; whether predictions come true is judged by whoever made them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByHash, Place, Speller
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    BoolArray,
    CacheCleared,
    EventsChanged,
    EventState,
    FloatArray,
    Reading,
    Request,
    Tier,
)

# Whose blocks depend on nothing but all tokens before them: the longest stored prefix is what is found again.
_PLAIN = frozenset({"full_attention", "mla_attention", "sink_full_attention", "unknown", ""})
_LIVE = frozenset({EventState.WHOLE, EventState.PARTIAL})


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known of one prompt.

    tokens: (rows,) what the leading tokens stored are worth, those in lower tiers less; cached: (rows,) how many they
    are, which is what an engine will report. whole: (rows,) nothing more can be; partial: (rows,) at least these are.
    depth, depth_tokens: where the longest stored prefix of any row ends, as a share of the prompt and in tokens.
    """

    tokens: FloatArray
    cached: FloatArray
    whole: BoolArray
    partial: BoolArray
    depth: float
    depth_tokens: float


@dataclass(slots=True)
class Stream:
    """One endpoint's events. stored_tokens: in the first tier, since the stream began. unread: blocks that could not be
    spelled or placed; nameless: of lower tiers, told by hashes that nobody had told of in the first.

    tiered: blocks are told of in lower tiers, too. refused: why this engine's events cannot be used whatever state they
    are in; None where they can.
    """

    state: EventState = EventState.ABSENT
    reason: str = "no KV events have been seen"
    refused: str | None = None
    stored_tokens: int = 0
    unread: int = 0
    nameless: int = 0
    tiered: bool = False


class Exact:
    """Knowledge from events, by row. See `Known`."""

    def __init__(self, index: PreciseIndex, speller: Speller, rows: int = 64) -> None:
        self.index = index
        self.speller = speller
        self._by_hash = isinstance(speller, ByHash)  # whose blocks come without tokens
        self._streams = [Stream() for _ in range(rows)]
        self._whole: BoolArray = np.zeros(rows, dtype=bool)
        self._partial: BoolArray = np.zeros(rows, dtype=bool)
        self._capacity: FloatArray = np.full(rows, np.inf)
        self._evictions = 0
        self._resting: dict[int, Stream] = {}
        self.grow_rows(rows)

    def stream(self, row: int) -> Stream:
        return self._streams[row]

    # --- learning ---

    def apply(self, row: int, fact: BlocksStored | BlocksRemoved | CacheCleared | EventsChanged) -> None:
        """Learn from an endpoint's events; what comes outside of a stream is ignored."""
        match fact:
            case BlocksStored():
                self._stored(row, fact)
            case BlocksRemoved(hashes=hashes, tier=tier, group=group):
                if self._streams[row].state in _LIVE and group == 0:
                    self.index.removed(row, hashes, tier)
            case CacheCleared():
                self.index.clear(row)
            case EventsChanged(state=state, reason=reason):
                self._changed(row, state, reason)

    def set_capacity(self, row: int, tokens: int) -> None:
        """What the engine's cache holds: a stream that has stored as much is whole whenever it began."""
        self._capacity[row] = tokens

    def remove_row(self, row: int) -> None:
        """The endpoint left; whoever gets the row next starts from nothing."""
        self.index.remove_row(row)
        self._resting.pop(row, None)
        self._streams[row] = Stream()
        self._capacity[row] = np.inf
        self._mark(row)

    def grow_rows(self, rows: int) -> None:
        extra = rows - len(self._streams)
        self.index.grow_rows(rows)
        if extra <= 0:
            return
        self._streams += [Stream() for _ in range(extra)]
        self._whole = np.concatenate([self._whole, np.zeros(extra, dtype=bool)])
        self._partial = np.concatenate([self._partial, np.zeros(extra, dtype=bool)])
        self._capacity = np.concatenate([self._capacity, np.full(extra, np.inf)])

    def _changed(self, row: int, state: EventState, reason: str) -> None:
        self.index.clear(row)
        self._resting.pop(row, None)
        stream = self._streams[row]
        self._streams[row] = Stream(state, reason, refused=stream.refused if state in _LIVE else None)
        self._mark(row)

    def _stored(self, row: int, fact: BlocksStored) -> None:
        stream = self._streams[row]
        if stream.state not in _LIVE:
            return
        if fact.attention not in _PLAIN or fact.group != 0:
            self._refuse(row, fact)
            return
        if self._is_named(fact):
            stream.unread += len(fact.hashes) - self._enter(row, _readable(fact))
        else:
            stream.nameless += len(fact.hashes) - self.index.stored_again(row, fact.hashes, fact.tier)
        if self.index.evictions != self._evictions:  # perhaps from other rows
            self._evictions = self.index.evictions
            for each in range(len(self._streams)):
                self._mark(each)
        stream.tiered = stream.tiered or fact.tier is not Tier.GPU
        stream.stored_tokens += len(fact.tokens) if fact.tier is Tier.GPU else 0
        full = stream.stored_tokens >= self._capacity[row] and not stream.tiered
        if stream.state is EventState.PARTIAL and full:
            stream.state, stream.reason = EventState.WHOLE, "as much as the cache holds has been stored since we joined"
            self._mark(row)

    def _is_named(self, fact: BlocksStored) -> bool:
        """Whether a block is told by more than its hash, and can be placed where nobody knew it.

        Connectors that offload tell no tokens, or leave out salts and media (vLLM's `OffloadingEventsTracker`), without
        which a block of a salted prompt looks like anybody's: of lower tiers, only blocks that are known are believed.
        """
        return self._by_hash or (fact.tier is Tier.GPU and bool(fact.tokens))

    def _enter(self, row: int, fact: BlocksStored) -> int:
        """How many of the blocks could be placed."""
        start: Place | None = self.speller.origin
        if fact.parent is not None:
            found = self.index.parent_of(row, fact.parent)
            start = None if found is None else Place(*found)
        spelled = None if start is None else self.speller.spell(fact, start)
        if spelled is None:
            return 0
        size = fact.block_size or 1
        chain = _identity(fact.adapter, fact.salt), size
        return self.index.stored(row, chain, fact.hashes, fact.parent, spelled.ends, spelled.keys, size, fact.tier)

    def _refuse(self, row: int, fact: BlocksStored) -> None:
        stream = self._streams[row]
        if stream.refused is None:
            kind = fact.attention if fact.attention not in _PLAIN else "several"
            stream.refused = f"its KV cache has {kind} groups, of which a stored prefix is no promise to find it again"
            self._mark(row)

    def _mark(self, row: int) -> None:
        stream = self._streams[row]
        usable = stream.refused is None
        self._whole[row] = usable and stream.state is EventState.WHOLE and not self.index.truncated(row)
        self._partial[row] = usable and stream.state in _LIVE and not self._whole[row]

    # --- what was saved ---

    def kept(self, row: int) -> Stream | None:
        """How a stream stands, to be saved with the index; None where there is nothing worth it."""
        stream = self._streams[row]
        return replace(stream) if stream.state in _LIVE else None

    def adopt(self, index: PreciseIndex, streams: Mapping[int, Stream]) -> None:
        """Take a saved index in place of one that knows nothing. By row: how its streams stood, until `resume`."""
        index.grow_rows(len(self._streams))
        self.index, self._evictions = index, index.evictions
        self._resting = dict(streams)
        for row in streams:
            self._streams[row] = Stream(EventState.ABSENT, "what was saved of it is held against its engine's events")
            self._mark(row)

    def resume(self, row: int) -> None:
        """The engine has gone on where its saved stream ended: what was saved of it is true."""
        stream = self._resting.pop(row, None)
        if stream is not None:
            self._streams[row] = stream
            self._mark(row)

    # --- reading ---

    def match(self, reading: Reading | None, request: Request) -> Known | None:
        """What is stored of a prompt, everywhere at once; None where nothing can be said. Reads only."""
        reading = reading or self.speller.read(request)
        if reading is None or not (self._whole.any() or self._partial.any()):
            return None
        units = max(reading.hashes.size - 1, 1)
        # An engine always computes the last token of a prompt: a block that ends with it is of no use.
        open_end = replace(reading, hashes=reading.hashes[:-1]) if reading.whole else reading
        found = self.index.match(open_end, _identity(reading.adapter, reading.salt))
        return Known(found.tokens, found.cached, self._whole, self._partial, found.position / units, found.depth_tokens)


def _readable(fact: BlocksStored) -> BlocksStored:
    """The blocks before the first image: readings end there, too, and nothing behind it is ever asked for."""
    end = next((at for at, medium in enumerate(fact.media) if medium is not None), None)
    if end is None:
        return fact
    return replace(fact, hashes=fact.hashes[:end], tokens=fact.tokens[: end * fact.block_size], media=())


def _identity(adapter: str | None, salt: str | None) -> Hashable:
    """What the root of a chain of blocks covers beside tokens."""
    return adapter, salt
