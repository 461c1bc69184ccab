"""What replicas say to each other, to bytes and back. Pure; knows neither wires nor who says what when.

A batch is a MessagePack array of words. There are hashes, sizes and names in it, and no prompt. What becomes of a
request is told under the id that it was routed under.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from picker.core.charges import Charge
from picker.types import (
    NO_BLOCKS,
    Booked,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Request,
    ResponseStarted,
    UInt64Array,
    Usage,
)

VERSION = 1
_LARGEST = 2**63 - 1
_ARRAY = b"\xdd"  # MessagePack's array with a length of four bytes


class Word(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """As an array of its fields behind its tag."""


class Greeting(Word, frozen=True, tag=30):
    """Who speaks. name: for people. block_bytes: of its prefix hashes. held: blocks that its index knows of.

    marks: by which requests of its own are known in access logs, "" where it has none. logs: see `Alive`.
    """

    version: int
    name: str
    block_bytes: int
    held: int = 0
    marks: str = ""
    logs: int = 0


class Routed(Word, frozen=True, tag=31):
    """A request was sent to the endpoint `name`; see `types.Booked`. hashes: little-endian, eight bytes a block.

    fresh: just now. begun: its first token has come.
    """

    id: int
    name: str
    model: str | None
    hashes: bytes
    prompt_bytes: int
    extra_bytes: int
    prompt_tokens: int | None
    session: str | None
    streaming: bool
    uncached: int
    tokens: int
    matched: int
    others: list[str]
    fresh: bool = True
    begun: bool = False

    def __repr__(self) -> str:
        return f"Routed(id={self.id})"


class Began(Word, frozen=True, tag=38):
    """See `types.ResponseStarted`."""

    id: int
    status: int
    served_by: str | None


class Token(Word, frozen=True, tag=39):
    """Its first token has come."""

    id: int


class Ended(Word, frozen=True, tag=40):
    """usage: tokens of the prompt, completed and cached, as the engine reported them."""

    id: int
    status: int
    usage: tuple[int, int, int | None] | None


class Broke(Word, frozen=True, tag=41):
    id: int
    reason: FailureReason


class Standing(Word, frozen=True, tag=32):
    """All that the speaker has routed and that has not ended."""

    routed: list[Routed]


class Alive(Word, frozen=True, tag=33):
    """A sign of life. logs: access logs that are open at the speaker. at: its clock. echoes: see `lateness`."""

    held: int = 0
    logs: int = 0
    at: float | None = None
    echoes: dict[str, tuple[float, float]] = {}


class Wanted(Word, frozen=True, tag=34):
    """The speaker wants to be told what is cached where. lessons: and what was learned, which it understands."""

    lessons: bool = False


class Node(Word, frozen=True, tag=35):
    """A piece of prompts. parent: number of the one that it goes on from, 0: it begins a prompt."""

    number: int
    parent: int
    hashes: bytes


class Held(Word, frozen=True, tag=36):
    """The endpoint holds a prompt that ends with this piece."""

    name: str
    number: int


class Taught(Word, frozen=True, tag=43):
    """What was learned; see `types.Lessons`. Said only to who has asked for it.

    prefill, decode: samples of each size: little-endian, eight bytes a number. endpoints: name, then the numbers in the
    order of `types.EndpointLessons`.
    """

    prefill: dict[int, bytes]
    decode: dict[int, bytes]
    ratios: dict[str, tuple[float, float]]
    rates: dict[str, tuple[float, float]]
    endpoints: list[tuple[str, float, float, float, float, float, float, float, float]]


class Handed(Word, frozen=True, tag=37):
    """That was all that was wanted."""


class Logged(Word, frozen=True, tag=42):
    """An access log tells of a request of whoever is told; see `wire.als.Ended`. Said only to those with marks."""

    mark: str | None
    request_id: str
    status: int
    upstream: str | None
    failure: FailureReason | None
    first_byte: float | None
    duration: float | None
    attempts: int | None


FromReplica = (
    Greeting
    | Routed
    | Standing
    | Alive
    | Wanted
    | Node
    | Held
    | Taught
    | Handed
    | Began
    | Token
    | Ended
    | Broke
    | Logged
)

_encoder = msgspec.msgpack.Encoder()
encode: Callable[[Word], bytes] = _encoder.encode
_decode = msgspec.msgpack.Decoder(list[FromReplica]).decode


def batch(words: Sequence[bytes]) -> bytes:
    """Encoded words as one piece."""
    return b"".join((_ARRAY, len(words).to_bytes(4, "big"), *words))


def unbatch(data: bytes) -> list[FromReplica]:
    """The words of a piece; raises ValueError for what is none."""
    return _decode(data)


# --- nouns to words and back -------------------------------------------------------------------------------


def routed(charge: Charge, name: str, *, fresh: bool) -> Routed:
    """A booking in words. name: of the endpoint it is with."""
    request = charge.request
    return Routed(
        id=request.id,
        name=name,
        model=request.model,
        hashes=request.block_hashes.astype("<u8", copy=False).tobytes(),
        prompt_bytes=request.prompt_bytes,
        extra_bytes=request.extra_bytes,
        prompt_tokens=None if request.prompt_tokens is None else _bounded(request.prompt_tokens),
        session=request.session,
        streaming=request.streaming,
        uncached=_bounded(charge.tokens),
        tokens=_bounded(charge.context),
        matched=charge.predicted,
        others=list(charge.others),
        fresh=fresh,
        begun=not charge.prefilling,
    )


def booked(word: Routed, request_id: int) -> Booked:
    """The fact, under an id of ours. Of what was under way already nobody knows how long it has taken."""
    request = Request(
        id=request_id,
        model=word.model,
        arrived_at=0.0,
        block_hashes=blocks(word.hashes),
        prompt_bytes=word.prompt_bytes,
        extra_bytes=word.extra_bytes,
        prompt_tokens=word.prompt_tokens,
        session=word.session,
        streaming=word.streaming and word.fresh,
    )
    return Booked(word.name, request, word.uncached, word.tokens, word.matched, tuple(word.others))


def told(fact: Fact) -> Began | Token | Ended | Broke | None:
    """A fact of one request in words; None for others, which replicas see by themselves."""
    match fact:
        case ResponseStarted(request_id, status, served_by):
            return Began(request_id, status, served_by)
        case FirstToken(request_id):
            return Token(request_id)
        case Finished(request_id, status, usage):
            return Ended(request_id, status, None if usage is None else _counts(usage))
        case Failed(request_id, reason):
            return Broke(request_id, reason)
        case _:
            return None


def _counts(usage: Usage) -> tuple[int, int, int | None]:
    cached = usage.cached_tokens
    return (
        _bounded(usage.prompt_tokens),
        _bounded(usage.completion_tokens),
        None if cached is None else _bounded(cached),
    )


def _bounded(number: int) -> int:
    """JSON has integers of any length, MessagePack of 64 bits."""
    return max(-_LARGEST, min(number, _LARGEST))


def fact_of(word: Began | Token | Ended | Broke, request_id: int) -> Fact:
    """The fact, under an id of ours."""
    match word:
        case Began(_, status, served_by):
            return ResponseStarted(request_id, status, served_by)
        case Token():
            return FirstToken(request_id)
        case Ended(_, status, usage):
            return Finished(request_id, status, None if usage is None else Usage(*usage))
        case Broke(_, reason):
            return Failed(request_id, reason)


def blocks(hashes: bytes) -> UInt64Array:
    """(b,) hashes; raises ValueError for a length that is none."""
    return np.frombuffer(hashes, dtype="<u8").astype(np.uint64, copy=False) if hashes else NO_BLOCKS
