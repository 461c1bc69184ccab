"""Picker's own gRPC API (`proto/picker/v1/picker.proto`), translated: what is asked and told in, answers out.

Speaks `Exchange`'s events for requests as their clients sent them, and makes a `Call` of features. Refuses, as
`WireError` with a message that fits a gRPC status, what cannot be understood; keeps nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from picker.errors import WireError
from picker.exchange import Forward, RequestBody, RequestHead, Respond
from picker.types import (
    Call,
    CallKind,
    Candidate,
    Decision,
    Endpoint,
    FailureReason,
    Ranking,
    Rejection,
    UInt64Array,
    Usage,
)
from picker.wire.addresses import plain_address
from picker.wire.pb import picker_pb2 as pb

SERVICE = "picker.v1.Picker"
PICK, REPORT, WATCH = (f"/{SERVICE}/{method}" for method in ("Pick", "Report", "WatchEndpoints"))

# Bytes of prompt that a token stands for where a gateway counts in tokens: only the proportion of its prefix to the
# whole matters, as with token ids in a body.
_TOKEN_BYTES = 4
_MOST = 2**31 - 1  # load is counted in integer columns
_NAME = 256  # characters of a reporter's name
# No text contains these bytes: hashes of a gateway's never look like a prompt.
_NOT_TEXT = np.uint64(2**64 - 1)

_REASONS = {
    pb.FAILURE_REASON_UNSPECIFIED: FailureReason.UNHEARD,
    pb.FAILURE_REASON_CLIENT_GONE: FailureReason.CLIENT_GONE,
    pb.FAILURE_REASON_CONNECT: FailureReason.CONNECT,
    pb.FAILURE_REASON_RESET: FailureReason.RESET,
    pb.FAILURE_REASON_TIMEOUT: FailureReason.TIMEOUT,
    pb.FAILURE_REASON_TRUNCATED: FailureReason.TRUNCATED,
}
_TOO_LARGE = 413


# --- what is asked -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A `PickRequest`. events: for an exchange, up to its question. call: of features, in place of the exchange's own.

    explain: a value of `pb.Explain`.
    """

    events: tuple[RequestHead | RequestBody, ...]
    call: Call | None
    exclude: frozenset[str]
    reporter: str
    explain: int


def asked(message: bytes, *, block_bytes: int, most_bytes: int) -> Asked:
    """Read a `PickRequest`. block_bytes: of the prefix index. most_bytes: that features may claim a prompt to have."""
    request = _read(pb.PickRequest, message)
    subset = frozenset(plain_address(each.strip()) for each in request.subset) if request.subset else None
    kind, call = request.WhichOneof("request"), None
    events: tuple[RequestHead | RequestBody, ...]
    if kind == "http":
        http = request.http
        head = _head(http.path, http.headers, subset, request, end=False)
        events = (head, RequestBody(http.body, end=True))
    elif kind == "features":
        call = _features(request.features, block_bytes, most_bytes, stream=request.reports_first_token)
        events = (_head("", request.features.headers, subset, request, end=True),)
    else:
        raise WireError("give http or features")
    return Asked(events, call, frozenset(request.exclude), _named(request.reporter), request.explain)


def _head(
    path: str, headers: Mapping[str, str], subset: frozenset[str] | None, request: Any, *, end: bool
) -> RequestHead:
    lower = {name.lower(): value for name, value in headers.items()}
    return RequestHead("POST", path, lower, end, subset, followed=request.reports_first_token)


def _features(features: Any, block_bytes: int, most_bytes: int, *, stream: bool) -> Call:
    prefix, whole, tokens = _prefix(features, block_bytes, most_bytes)
    rest = max(whole - len(prefix), 0)
    if tokens is not None and prefix and rest:
        # The rest is counted in bytes, so that the prefix keeps its own proportion of tokens to bytes.
        tokens = round(tokens * len(prefix) / whole)
    hashed = features.WhichOneof("prefix") == "blocks"
    return Call(
        kind=CallKind.OTHER,
        model=features.model or None,
        prompt=prefix,
        extra_bytes=0 if tokens is not None and not prefix else rest,
        prompt_tokens=tokens,
        max_tokens=min(features.max_tokens, _MOST) if features.HasField("max_tokens") else None,
        stream=stream,
        salt=f"\0blocks\0{features.cache_salt}" if hashed else features.cache_salt or None,
        session=features.session or None,
        priority=features.priority,
    )


def _prefix(features: Any, block_bytes: int, most_bytes: int) -> tuple[bytes, int, int | None]:
    """(the prefix in bytes to be hashed, bytes of the whole prompt, tokens of it where they are known)."""
    tokens = features.prompt_tokens or None
    if max(features.prompt_bytes, _TOKEN_BYTES * (tokens or 0), len(features.prompt)) > most_bytes:
        raise WireError("features: a prompt beyond the limit")
    kind = features.WhichOneof("prefix")
    if kind != "blocks":
        prompt = bytes(features.prompt)
        return prompt, max(features.prompt_bytes or (tokens or 0) * _TOKEN_BYTES, len(prompt)), tokens
    blocks, unit = features.blocks, features.blocks.WhichOneof("size")
    size = blocks.block_bytes if unit == "block_bytes" else blocks.block_tokens * _TOKEN_BYTES
    if not size:
        raise WireError("give block_tokens or block_bytes")
    covered = len(blocks.hashes) * size
    if covered > most_bytes:
        raise WireError("features: a prompt beyond the limit")
    whole = features.prompt_bytes if unit == "block_bytes" else (tokens or 0) * _TOKEN_BYTES
    # A size of blocks is part of what they are: hashes of other blocks mean something else.
    hashes = np.array(blocks.hashes, dtype=np.uint64) ^ np.uint64(size)
    return _spread(hashes, size, block_bytes), max(whole, covered), tokens


def _spread(hashes: UInt64Array, size: int, block_bytes: int) -> bytes:
    """Text in our blocks that agrees as far as the gateway's blocks do, which are of `size` bytes.

    A block of ours repeats the hash of the gateway's block that it ends in: that one stands for all before it.
    """
    blocks = hashes.size * size // block_bytes
    last_bytes = np.arange(block_bytes - 1, blocks * block_bytes, block_bytes)
    text = np.zeros((blocks, max(-(-block_bytes // 8), 2)), dtype="<u8")
    text[:, 0] = hashes[last_bytes // size]
    text[:, 1] = _NOT_TEXT
    return text.view(np.uint8)[:, :block_bytes].tobytes()


def _named(reporter: str) -> str:
    if len(reporter) > _NAME:
        raise WireError(f"reporter: longer than {_NAME} characters")
    return reporter


# --- what is answered --------------------------------------------------------------------------------------


def picked(pick_id: str, forward: Forward, explain: int) -> bytes:
    """A `PickResponse` for a request that goes somewhere."""
    decision = forward.decision
    # Filled in place: messages that are made on their own and copied in cost twice as much.
    response = pb.PickResponse()
    message = response.picked
    message.id = pick_id
    message.matched_blocks, message.total_blocks = decision.matched_blocks, decision.total_blocks
    message.matched_tokens, message.prompt_tokens = decision.matched_tokens, decision.prompt_tokens
    message.waited_s, message.charged = decision.waited, decision.charged
    _fill(message.endpoint, decision.endpoint)
    for each in decision.fallbacks:
        _fill(message.fallbacks.add(), each)
    for name, value in forward.set_headers:
        message.set_headers[name] = value
    if (edit := forward.edit) is not None:
        message.rewrite.model, message.rewrite.data = edit.model, edit.data
        message.rewrite.begin, message.rewrite.end = edit.begin, edit.end
    for candidate in _why(decision, explain):
        line = message.candidates.add(endpoint=candidate.endpoint, total=candidate.total)
        parts = line.parts
        for part, score in candidate.parts.items():
            parts[part] = score
    return _bytes(response)


def refused(respond: Respond, rejection: Rejection | None) -> bytes:
    """A `PickResponse` for a request that is to be answered at once. rejection: None where the request was at fault."""
    if rejection is None:
        message = msgspec.json.decode(respond.body)["error"]["message"]
        reason = "too-large" if respond.status == _TOO_LARGE else "bad-request"
        refusal = pb.Refusal(status=respond.status, reason=reason, message=message)
    else:
        retry = rejection.retry_after
        refusal = pb.Refusal(
            status=respond.status, reason=rejection.reason.value, message=rejection.message, retry_after_s=retry
        )
    refusal.headers.update(respond.headers)
    refusal.body = respond.body
    return _bytes(pb.PickResponse(refusal=refusal))


def endpoint(of: Endpoint) -> Any:
    """An `Endpoint` message."""
    message = pb.Endpoint()
    _fill(message, of)
    return message


def _fill(message: Any, of: Endpoint) -> None:
    message.name, message.address, message.scheme = of.name, of.address, of.scheme
    if of.rank is not None:
        message.rank = of.rank


def _why(decision: Decision, explain: int) -> Sequence[Candidate]:
    ranking = decision.ranking
    if ranking is None or explain == pb.EXPLAIN_NONE:
        return ()
    return ranking.candidates() if explain == pb.EXPLAIN_ALL else _chosen(ranking, decision.endpoint.name)


def _chosen(ranking: Ranking, name: str) -> Sequence[Candidate]:
    """The line of one endpoint; without a loop over all where it is the best, which is the rule."""
    at = int(ranking.total.argmax()) if ranking.total.size else -1
    if at < 0 or ranking.names[ranking.rows.item(at)] != name:
        at = next((i for i, row in enumerate(ranking.rows.tolist()) if ranking.names[row] == name), -1)
    if at < 0:
        return ()
    parts = {part: float(values[at]) for part, values in ranking.parts.items()}
    return (Candidate(name, float(ranking.total[at]), parts),)


# --- what is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The stream is that of this client."""

    reporter: str


@dataclass(frozen=True, slots=True)
class Started:
    """endpoint: name or address of who answered, None where that is not said."""

    status: int
    endpoint: str | None


@dataclass(frozen=True, slots=True)
class FirstOutput:
    """The first output token came."""


@dataclass(frozen=True, slots=True)
class Ended:
    """status: 0 where it is not said. failure: why there was no complete answer."""

    status: int = 0
    usage: Usage | None = None
    failure: FailureReason | None = None


Told = Hello | Started | FirstOutput | Ended


def told(message: bytes) -> tuple[str, Told]:
    """Read an `Outcome`: the id of the pick it is about ("" for a hello), and what happened."""
    outcome = _read(pb.Outcome, message)
    match outcome.WhichOneof("event"):
        case "hello":
            return "", Hello(_named(outcome.hello.reporter))
        case "started":
            started = outcome.started
            return outcome.pick_id, Started(_status(started.status), plain_address(started.endpoint) or None)
        case "first_token":
            return outcome.pick_id, FirstOutput()
        case "finished":
            finished = outcome.finished
            usage = _usage(finished.usage) if finished.HasField("usage") else None
            return outcome.pick_id, Ended(_status(finished.status) if finished.status else 0, usage)
        case "failed":
            # A reason that is new to us is nobody's fault.
            return outcome.pick_id, Ended(failure=_REASONS.get(outcome.failed.reason, FailureReason.UNHEARD))
        case _:
            raise WireError("an outcome without an event")


def summary(heard: int, unknown: int) -> bytes:
    """A `ReportSummary`."""
    return _bytes(pb.ReportSummary(heard=heard, unknown=unknown))


def _status(status: int) -> int:
    if not 100 <= status <= 599:
        raise WireError("status: not from 100 to 599")
    return status


def _usage(usage: Any) -> Usage:
    cached = usage.cached_tokens if usage.HasField("cached_tokens") else None
    if max(usage.prompt_tokens, usage.completion_tokens, cached or 0) > _MOST:
        raise WireError("usage: a number beyond all bounds")
    return Usage(usage.prompt_tokens, usage.completion_tokens, cached)


# --- who watches -------------------------------------------------------------------------------------------


def interval(message: bytes) -> float:
    """Read a `WatchEndpointsRequest`: seconds between updates of load."""
    milliseconds = _read(pb.WatchEndpointsRequest, message).interval_ms
    return max(milliseconds or 1000, 100) / 1000


def update(changed: Sequence[Any], removed: Sequence[str], *, snapshot: bool) -> bytes:
    """An `EndpointsUpdate`. changed: `EndpointState` messages."""
    return _bytes(pb.EndpointsUpdate(snapshot=snapshot, changed=changed, removed=removed))


_M = TypeVar("_M")


def _read(kind: type[_M], message: bytes) -> _M:
    try:
        read: _M = kind.FromString(message)  # type: ignore[attr-defined]
    except DecodeError:
        raise WireError("bytes that are no message of the API") from None
    return read


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
