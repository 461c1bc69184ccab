"""Bytes as what an engine might send: ZeroMQ frames into the source's stream, its facts into an index of two endpoints.

One endpoint is fuzzed; the other has told the truth before. Whatever the first sends, nothing is raised, its facts are
about itself, the other's answers stay what they were, and memory stays within the budget.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.sources.kv_events import KvEventSource
from picker.sources.kv_stream import Resumed, Stream
from picker.sources.scrape import FetchResult
from picker.types import BlocksStored, EventsChanged, EventState, Reading, Request

BUDGET = 70_000
ROWS = 2
FUZZED, TRUE = 0, 1

_HASHER = PrefixHasher(b"secret", max_units=1 << 14)
_VOCABULARY = Vocabulary([bytes([97 + token]) for token in range(26)])
_TRUTH = (b"abcdefgh", b"abcdxyz!", b"mnop")
_HASHES: tuple[Any, ...] = (*range(12), 2**63, 2**64 - 1, -1, b"", b"\x01" * 8, b"\xff" * 32, None, "x")
_SIZES: tuple[Any, ...] = (4, 2, 1, 0, 16, -1, 1 << 16, 1 << 40, None)
_MEDIA: tuple[Any, ...] = (None, "GPU", "CPU", "STORAGE", "", 7)
_KINDS: tuple[Any, ...] = (None, "full_attention", "sliding_window", "mamba", "")
_TYPES: tuple[Any, ...] = (
    "BlockStored",
    "BlockStored",
    "BlockStored",
    "BlockStored",
    "BlockStored",
    "BlockRemoved",
    "BlockRemoved",
    "AllBlocksCleared",
    "New",
    None,
)


class FindingError(AssertionError):
    """Something that must not be."""


class Dealer:
    """Hands out an input piece by piece; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def bytes(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def of(self, choices: Sequence[Any]) -> Any:
        return choices[self.byte() % len(choices)]


class Story:
    """One input, played."""

    def __init__(self, data: bytes) -> None:
        self._deal = Dealer(data)
        self._index = PreciseIndex(BUDGET, ROWS, secret=b"secret")
        self._exact = Exact(self._index, ByBytes(_HASHER, lambda name: _VOCABULARY), ROWS)
        self._stream = Stream("a", secret=b"secret")
        self._source = KvEventSource(_nobody, clock=lambda: self._now, rng=random.Random(0), wall=lambda: 0.0)
        self._now = 0.0
        self._fresh = 1000
        self._tell_the_truth()
        self._bare = self._index.nbytes
        self._before = self._answers()

    def play(self) -> None:
        """Raises FindingError, or whatever picker raises."""
        self._apply(self._stream.connected(replay=bool(self._deal.byte() & 1), now=self._now))
        while self._deal.more:
            self._now += (0.0, 0.1, 40.0)[self._deal.byte() % 3]
            self._turn()
            if self._index.nbytes > BUDGET:
                raise FindingError(f"{self._index.nbytes} bytes")
            if self._answers() != self._before:
                raise FindingError("another endpoint's answers changed")

    # --- what is sent ---

    def _turn(self) -> None:
        match self._deal.byte() % 32:
            case 0:
                self._apply(self._stream.connected(replay=bool(self._deal.byte() & 1), now=self._now))
            case 1:
                self._apply(self._stream.absent("gone"))
            case 2 | 3:
                self._send([b"", *[self._deal.bytes(self._deal.byte() % 12) for _ in range(self._deal.byte() % 5)]])
            case 4 | 5 | 6 | 7:
                self._apply(self._stream.replay_ended(complete=bool(self._deal.byte() & 1), now=self._now))
            case 8 | 9:
                self._send([b"", self._numbered(), self._deal.bytes(self._deal.byte())])
            case each if each < 20:
                batch = [self._now, [self._flood() for _ in range(6)], 0]
                self._send([b"", (self._stream._next or 0).to_bytes(8, "big"), msgspec.msgpack.encode(batch)])
            case _:
                self._send([b"", self._numbered(), self._damaged(msgspec.msgpack.encode(self._batch()))])

    def _send(self, frames: list[bytes]) -> None:
        """As what is wanted, or live."""
        if self._stream.wants is not None and self._deal.byte() & 3:
            self._apply(self._source._replayed(self._stream, frames))
        else:
            self._apply(self._source._received(self._stream, frames))

    def _numbered(self) -> bytes:
        """Mostly the number that is due."""
        step, due = self._deal.byte(), self._stream._next or 0
        number = due if step < 240 else max(0, due + step - 248) if step < 254 else 0
        return number.to_bytes(8, "big")

    def _damaged(self, payload: bytes) -> bytes:
        if self._deal.byte() < 245 or not payload:
            return payload
        at = int.from_bytes(self._deal.bytes(2), "big") % len(payload)
        return payload[:at] + self._deal.bytes(1) + payload[at + self._deal.byte() % 3 :]

    def _batch(self) -> Any:
        events = [self._event() for _ in range(self._deal.byte() % 5)]
        batch: dict[str, Any] = {
            "ts": self._now,
            "events": events,
            "data_parallel_rank": self._deal.of((0, 0, None, 1)),
        }
        return batch if self._deal.byte() > 240 else list(batch.values())

    def _event(self) -> Any:
        if self._deal.byte() > 150:
            return self._flood()
        kind = self._deal.of(_TYPES)
        hashes = [self._deal.of(_HASHES) for _ in range(self._deal.byte() % 5)]
        if kind == "BlockRemoved":
            event = {"type": kind, "block_hashes": hashes, "medium": self._deal.of(_MEDIA)}
        elif kind == "BlockStored":
            event = self._stored(hashes)
        else:
            event = {"type": kind}
        return event if self._deal.byte() & 1 else list(event.values())

    def _flood(self) -> dict[str, Any]:
        """Blocks that nobody has had, in a chain of their own or behind the last."""
        count, first = self._deal.byte() % 32 + 1, self._fresh
        self._fresh += count
        step = self._deal.byte()
        tokens = [(first + at * step) % 26 for at in range(2 * count)]
        parent = first - 1 if self._deal.byte() & 1 else None
        made = {"type": "BlockStored", "block_hashes": list(range(first, self._fresh)), "parent_block_hash": parent}
        return made | {"token_ids": tokens, "block_size": 2, "cache_salt": self._deal.of((None, str(first)))}

    def _stored(self, hashes: list[Any]) -> dict[str, Any]:
        size = self._deal.of(_SIZES)
        count = len(hashes) * size if isinstance(size, int) and 0 <= size <= 16 else self._deal.byte() % 9
        count = 0 if self._deal.byte() > 235 else count
        return {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": self._deal.of((None, *_HASHES)),
            "token_ids": [self._deal.byte() % 27 for _ in range(count)],
            "block_size": size,
            "lora_id": self._deal.of((None, None, 1, "x")),
            "medium": self._deal.of(_MEDIA),
            "lora_name": self._deal.of((None, None, "lora")),
            "extra_keys": self._deal.of((None, [["salt"]], [None, ["image", 3]], [[[[[["deep"]]]]]], 3)),
            "group_idx": self._deal.of((None, 0, 1)),
            "kv_cache_spec_kind": self._deal.of(_KINDS),
        }

    # --- what comes of it ---

    def _apply(self, said: Sequence[Any]) -> None:
        for fact in said:
            if fact.name != "a":
                raise FindingError("a fact about another endpoint")
            if not isinstance(fact, Resumed):
                self._exact.apply(FUZZED, fact)

    def _tell_the_truth(self) -> None:
        self._exact.apply(TRUE, EventsChanged("b", EventState.WHOLE))
        for number, word in enumerate(_TRUTH):
            ids = tuple(letter - 97 for letter in word if 97 <= letter < 123)[: len(word) // 4 * 4]
            whole = len(ids) // 4
            fact = BlocksStored("b", tuple(range(10 * number, 10 * number + whole)), None, ids[: 4 * whole], 4)
            self._exact.apply(TRUE, fact)

    def _answers(self) -> list[float]:
        """What is known of the other endpoint."""
        found = []
        for word in _TRUTH:
            known = self._exact.match(Reading(_HASHER.hashes(word + b"...")), Request(1, None, 0.0))
            found += [-1.0, -1.0] if known is None else [known.cached.item(TRUE), float(known.whole[TRUE])]
        return [*found, float(self._index.resident(TRUE))]


async def _nobody(url: str) -> FetchResult:
    return FetchResult()


def play(data: bytes) -> None:
    """One input; raises FindingError, or whatever picker raises."""
    Story(data).play()
