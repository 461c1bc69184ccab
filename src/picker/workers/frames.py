"""The words between workers and the decider, to bytes and back. Pure; knows neither sockets nor who says what when.

A frame is four bytes of length and a MessagePack array of messages: all that one turn of a loop had to say. Both ends
are of one version, started by one parent, and trust each other; requests travel as hashes and sizes. Only where the
decider has to read prompts itself does the body go along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from picker.rewrites import Rule
from picker.types import (
    NO_BLOCKS,
    NO_HEADERS,
    Call,
    CallKind,
    Decision,
    Endpoint,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Outcome,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Rewritten,
    Usage,
)
from picker.wire.als import Ended

# A worker numbers its requests within a range of its own: ids are unique among all that a decider ever hears of.
ID_BITS = 36
_LARGEST = 2**63 - 1
_HEAD = 4  # bytes of length
_ARRAY = b"\xdd"  # MessagePack's array with a length of four bytes


class Word(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A message, as an array of its fields behind its tag."""


# --- from workers ------------------------------------------------------------------------------------------


class Hello(Word, frozen=True, tag=1):
    """A worker has come. index: its number, 0 and up, kept over restarts."""

    index: int


class Ask(Word, frozen=True, tag=2):
    """A request to be decided; see `types.Request`. hashes: little-endian, eight bytes a block.

    kind, salt and body are of the call, for a decider that reads prompts. rewritten: see `types.Rewritten`.
    """

    id: int
    model: str | None
    hashes: bytes
    prompt_bytes: int
    extra_bytes: int
    prompt_tokens: int | None
    max_tokens: int | None
    priority: int
    session: str | None
    streaming: bool
    subset: list[str] | None
    exclude: list[str]
    headers: dict[str, str]
    kind: str = ""
    salt: str | None = None
    body: bytes = b""
    rewritten: tuple[str | None, str] | None = None

    def __repr__(self) -> str:
        return f"Ask(id={self.id})"


class Started(Word, frozen=True, tag=3):
    id: int
    status: int
    served_by: str | None


class Token(Word, frozen=True, tag=4):
    id: int


class Done(Word, frozen=True, tag=5):
    """usage: tokens of the prompt, completed and cached, as the engine reported them."""

    id: int
    status: int
    usage: tuple[int, int, int | None] | None


class Broke(Word, frozen=True, tag=6):
    id: int
    reason: FailureReason


class HandedOn(Word, frozen=True, tag=7):
    """A request is in the hands of the data plane, whose access log tells the rest. alias: its `x-request-id`."""

    id: int
    alias: str


class Logged(Word, frozen=True, tag=8):
    """An entry of the access log; see `wire.als.Ended`."""

    mark: str | None
    request_id: str
    status: int
    upstream: str | None
    failure: FailureReason | None
    first_byte: float | None
    duration: float | None
    attempts: int | None


class LogOpened(Word, frozen=True, tag=9):
    pass


class LogLost(Word, frozen=True, tag=10):
    pass


class Trouble(Word, frozen=True, tag=11):
    """An error of picker's own; where: the label it is counted under."""

    where: str


class Pulse(Word, frozen=True, tag=12):
    """A sign of life, which is answered by one. streams: open now. cpu: seconds used since the process began."""

    streams: int = 0
    cpu: float = 0.0


# --- from the decider --------------------------------------------------------------------------------------

Place = tuple[str, str, int | None, str]
"""An endpoint as far as a front end needs it: name, address, rank, scheme."""


class Welcome(Word, frozen=True, tag=21):
    """What a worker has to know. first_id: of its range. secret: of prefix hashes. mark: secret of lean mode's marks.

    headers: those that decisions depend on. reads: the decider wants bodies.
    """

    first_id: int
    secret: bytes
    block_bytes: int
    headers: list[str]
    mark: str
    reads: bool

    def __repr__(self) -> str:
        return f"Welcome(first_id={self.first_id})"


class Picked(Word, frozen=True, tag=22):
    """See `types.Decision`."""

    id: int
    endpoint: Place
    fallbacks: list[Place]
    matched_blocks: int
    total_blocks: int
    matched_tokens: float
    prompt_tokens: float
    waited: float
    charged: bool


class Refused(Word, frozen=True, tag=23):
    """See `types.Rejection`."""

    id: int
    reason: RejectReason
    status: int
    message: str
    retry_after: float | None


class Serving(Word, frozen=True, tag=24):
    """Whether new requests are wanted. part: gateways are to be asked to connect anew, and find somebody else."""

    serving: bool
    part: bool = False


class Settled(Word, frozen=True, tag=25):
    """Nothing is left of which the access log could tell."""


class Rules(Word, frozen=True, tag=26):
    """Which models requests get instead of those they name: all that an origin has now, see `rewrites.Rewriting`."""

    origin: str
    rules: list[Rule]


FromWorker = (
    Hello | Ask | Started | Token | Done | Broke | HandedOn | Logged | LogOpened | LogLost | Trouble | Pulse
)  # fmt: skip
FromDecider = Welcome | Picked | Refused | Serving | Settled | Pulse | Rules

_encoder = msgspec.msgpack.Encoder()
encode: Callable[[Word], bytes] = _encoder.encode
from_worker = msgspec.msgpack.Decoder(list[FromWorker]).decode
from_decider = msgspec.msgpack.Decoder(list[FromDecider]).decode


# --- frames ------------------------------------------------------------------------------------------------


def frame(messages: Sequence[bytes]) -> bytes:
    """Encoded messages as one frame."""
    size = 5 + sum(map(len, messages))
    return b"".join((size.to_bytes(_HEAD, "big"), _ARRAY, len(messages).to_bytes(4, "big"), *messages))


class Frames:
    """Cuts a stream of bytes into the payloads of frames. largest: bytes; a longer frame raises ValueError."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        buffer, found, at = self._buffer, [], 0
        buffer += data
        while len(buffer) >= at + _HEAD:
            size = int.from_bytes(buffer[at : at + _HEAD], "big")
            if size > self._largest:
                raise ValueError(f"a frame of {size} bytes")
            end = at + _HEAD + size
            if len(buffer) < end:
                break
            found.append(bytes(memoryview(buffer)[at + _HEAD : end]))
            at = end
        del buffer[:at]
        return found


# --- nouns to words and back -------------------------------------------------------------------------------


def ask(request: Request, call: Call | None) -> Ask:
    """call: where the decider reads prompts."""
    return Ask(
        id=request.id,
        model=request.model,
        hashes=request.block_hashes.astype("<u8", copy=False).tobytes(),
        prompt_bytes=request.prompt_bytes,
        extra_bytes=request.extra_bytes,
        prompt_tokens=_bounded(request.prompt_tokens),
        max_tokens=_bounded(request.max_tokens),
        priority=_bounded(request.priority) or 0,
        session=request.session,
        streaming=request.streaming,
        subset=None if request.subset is None else list(request.subset),
        exclude=list(request.exclude),
        headers=dict(request.headers),
        kind="" if call is None else call.kind.value,
        salt=None if call is None else call.salt,
        body=b"" if call is None else call.body,
        rewritten=None if request.rewritten is None else (request.rewritten.asked, request.rewritten.by),
    )


def _bounded(number: int | None) -> int | None:
    """JSON has integers of any length, MessagePack of 64 bits."""
    return None if number is None else max(-_LARGEST, min(number, _LARGEST))


def request_of(ask: Ask, now: float, deadline: float | None) -> Request:
    return Request(
        id=ask.id,
        model=ask.model,
        arrived_at=now,
        block_hashes=np.frombuffer(ask.hashes, dtype="<u8").astype(np.uint64, copy=False) if ask.hashes else NO_BLOCKS,
        prompt_bytes=ask.prompt_bytes,
        extra_bytes=ask.extra_bytes,
        prompt_tokens=ask.prompt_tokens,
        max_tokens=ask.max_tokens,
        priority=ask.priority,
        session=ask.session,
        streaming=ask.streaming,
        subset=None if ask.subset is None else frozenset(ask.subset),
        exclude=frozenset(ask.exclude),
        deadline=deadline,
        headers=ask.headers or NO_HEADERS,
        rewritten=None if ask.rewritten is None else Rewritten(*ask.rewritten),
    )


def call_of(ask: Ask) -> Call:
    """As much of a call as reading it takes."""
    return Call(kind=CallKind(ask.kind), model=ask.model, salt=ask.salt, body=ask.body)


def answer(outcome: Outcome) -> Picked | Refused:
    if isinstance(outcome, Rejection):
        return Refused(outcome.request_id, outcome.reason, outcome.status, outcome.message, outcome.retry_after)
    return Picked(
        id=outcome.request_id,
        endpoint=_place(outcome.endpoint),
        fallbacks=[_place(endpoint) for endpoint in outcome.fallbacks],
        matched_blocks=int(outcome.matched_blocks),
        total_blocks=int(outcome.total_blocks),
        matched_tokens=float(outcome.matched_tokens),
        prompt_tokens=float(outcome.prompt_tokens),
        waited=float(outcome.waited),
        charged=outcome.charged,
    )


def outcome_of(answer: Picked | Refused) -> Outcome:
    if isinstance(answer, Refused):
        return Rejection(answer.id, answer.reason, answer.status, answer.message, answer.retry_after)
    return Decision(
        request_id=answer.id,
        endpoint=_endpoint(answer.endpoint),
        fallbacks=tuple(map(_endpoint, answer.fallbacks)),
        matched_blocks=answer.matched_blocks,
        total_blocks=answer.total_blocks,
        matched_tokens=answer.matched_tokens,
        prompt_tokens=answer.prompt_tokens,
        waited=answer.waited,
        charged=answer.charged,
    )


def _place(endpoint: Endpoint) -> Place:
    return endpoint.name, endpoint.address, endpoint.rank, endpoint.scheme


def _endpoint(place: Place) -> Endpoint:
    name, address, rank, scheme = place
    return Endpoint(name, address, rank=rank, scheme=scheme)


def logged(ended: Ended) -> Logged:
    return Logged(**msgspec.structs.asdict(ended))


def ended_of(message: Logged) -> Ended:
    return Ended(**msgspec.structs.asdict(message))


def told(fact: Fact) -> Started | Token | Done | Broke | None:
    """A fact of one request; None for others, which are not a front end's."""
    match fact:
        case ResponseStarted(request_id, status, served_by):
            return Started(request_id, status, served_by)
        case FirstToken(request_id):
            return Token(request_id)
        case Finished(request_id, status, usage):
            return Done(request_id, status, None if usage is None else _counts(usage))
        case Failed(request_id, reason):
            return Broke(request_id, reason)
        case _:
            return None


def _counts(usage: Usage) -> tuple[int, int, int | None]:
    prompt, completed = _bounded(usage.prompt_tokens) or 0, _bounded(usage.completion_tokens) or 0
    return prompt, completed, _bounded(usage.cached_tokens)


def fact_of(message: Started | Token | Done | Broke) -> ResponseStarted | FirstToken | Finished | Failed:
    match message:
        case Started(id, status, served_by):
            return ResponseStarted(id, status, served_by)
        case Token(id):
            return FirstToken(id)
        case Done(id, status, usage):
            return Finished(id, status, None if usage is None else Usage(*usage))
        case Broke(id, reason):
            return Failed(id, reason)
