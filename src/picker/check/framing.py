"""EPP-1: the frames of full-duplex streaming, request and response side. Looks at frames only, not at choices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from picker.check import frames
from picker.check.frames import ProcessingResponse
from picker.check.gateway import ANSWER, Ask, Heard
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed

API = "Envoy ext_proc API, FULL_DUPLEX_STREAMED"
PROTOCOL = "endpoint-picker protocol (GIE proposal 004)"

# Envoy takes no more in one streamed body reply.
MAX_CHUNK = 65_536
SIZES = (120, 61_999, 62_000, 62_001, 300_000)
# What Envoy hands over at a time.
PIECE = 16_384

EVENTS = tuple(
    b'data: {"choices":[{"index":0,"text":"token %d","finish_reason":null}]}\n\n' % number for number in range(4)
)
DONE = b"data: [DONE]\n\n"


async def _large(subject: Subject, *, trailers: bool = False) -> Heard:
    """The whole conversation about a request of several chunks and its answer."""
    ask = Ask(body=subject.prompts.body_of(200_000), piece=PIECE, trailers=trailers)
    async with subject.gateway.talk() as talk:
        heard = await talk.verdict(ask)
        if heard.named and not heard.silent:
            await talk.respond(ANSWER[:40], ANSWER[40:])
        return heard


def _kinds(heard: Heard) -> list[str]:
    return [str(reply.WhichOneof("response")) for reply in heard.replies]


async def order(subject: Subject) -> Finding:
    heard = await _large(subject)
    if violation := unrouted(heard):
        return failed(violation)
    rank = {"request_headers": 0, "request_body": 1, "request_trailers": 2, "response_headers": 3, "response_body": 4}
    ranks = [rank.get(kind, 9) for kind in _kinds(heard)]
    if ranks.count(0) != 1:
        return failed(f"{ranks.count(0)} replies to the request headers, not one")
    return held(None if ranks == sorted(ranks) else f"replies out of order: {heard.said()}")


async def streamed(subject: Subject) -> Finding:
    heard = await _large(subject)
    bodies = [*heard.of("request_body"), *heard.of("response_body")]
    if not bodies:
        return failed(f"no body came back: {heard.said()}")
    wrong = [reply for reply in bodies if frames.chunk(reply) is None]
    return held(f"{len(wrong)} of {len(bodies)} body replies are no streamed_response" if wrong else None)


async def chunk_size(subject: Subject) -> Finding:
    heard = await _large(subject)
    sizes = [_size(reply) for reply in (*heard.of("request_body"), *heard.of("response_body"))]
    if not sizes:
        return failed(f"no body came back: {heard.said()}")
    return held(None if max(sizes) <= MAX_CHUNK else f"a body reply of {max(sizes)} bytes; at most {MAX_CHUNK} may be")


def _size(reply: ProcessingResponse) -> int:
    streamed = frames.chunk(reply)
    if streamed is not None:
        return len(streamed[0])
    return len(getattr(reply, reply.WhichOneof("response")).response.body_mutation.body)


async def end_mark(subject: Subject) -> Finding:
    heard = await _large(subject)
    for kind in ("request_body", "response_body"):
        marks = [streamed[1] for reply in heard.of(kind) if (streamed := frames.chunk(reply)) is not None]
        if marks and (not marks[-1] or any(marks[:-1])):
            return failed(f"{kind}: end_of_stream on {sum(marks)} of {len(marks)} chunks, not on the last one alone")
    return passed()


async def request_bytes(subject: Subject) -> Finding:
    for size in SIZES:
        body = subject.prompts.body_of(size)
        async with subject.gateway.talk() as talk:
            heard = await talk.verdict(Ask(body=body, piece=PIECE))
        if violation := unrouted(heard):
            return failed(violation)
        if violation := _differs(body, heard.body("request_body")):
            return failed(f"a request of {size} bytes: {violation}")
    return passed(f"{len(SIZES)} sizes up to {SIZES[-1]} bytes came back to the byte")


def _differs(sent: bytes, back: bytes) -> str | None:
    if sent == back:
        return None
    at = next((i for i, (x, y) in enumerate(zip(sent, back, strict=False)) if x != y), min(len(sent), len(back)))
    digests = [hashlib.sha256(data).hexdigest()[:12] for data in (sent, back)]
    return f"sent {len(sent)} B ({digests[0]}), got back {len(back)} B ({digests[1]}), different from byte {at} on"


async def request_trailers(subject: Subject) -> Finding:
    heard = await _large(subject, trailers=True)
    if violation := unrouted(heard):
        return failed(violation)
    kinds = [kind for kind in _kinds(heard) if kind.startswith("request")]
    if kinds.count("request_trailers") != 1 or kinds[-1] != "request_trailers":
        return failed(f"request trailers were not answered after the body: {heard.said()}")
    marked = any(streamed[1] for reply in heard.of("request_body") if (streamed := frames.chunk(reply)))
    return held("a chunk before the trailers carries end_of_stream" if marked else None)


async def bodyless(subject: Subject) -> Finding:
    heard = await subject.decide(Ask(path="/v1/models"))
    if heard.named:
        return held("a request without a body got a body back" if heard.of("request_body") else None)
    return failed(f"a request whose headers end the stream got no endpoint: {heard.said()}")


async def response_head(subject: Subject) -> Finding:
    async with subject.gateway.talk() as talk:
        heard = await talk.verdict(subject.completion())
        if violation := unrouted(heard):
            return failed(violation)
        await talk.send(frames.response_headers())
        reply = await talk.reply()
    answered = reply is not None and reply.WhichOneof("response") == "response_headers"
    return held(None if answered else f"response headers were not answered before the body: {heard.said()}")


async def response_bytes(subject: Subject) -> Finding:
    chunks = (b'{"object":"text_completion", "choices":[', b"x" * 70_000, b'],"usage":null}')
    async with subject.gateway.talk() as talk:
        heard = await talk.verdict(subject.completion())
        if violation := unrouted(heard):
            return failed(violation)
        await talk.respond(*chunks)
    return held(_differs(b"".join(chunks), heard.body("response_body")))


async def events_at_once(subject: Subject) -> Finding:
    ask = subject.completion(stream=True)
    async with subject.gateway.talk() as talk:
        heard = await talk.verdict(ask)
        if violation := unrouted(heard):
            return failed(violation)
        await talk.respond(*EVENTS, DONE, content_type="text/event-stream")
    if heard.silent:
        return failed(f"an event was held back while the next had not been sent: {heard.said()}")
    return held(_differs(b"".join((*EVENTS, DONE)), heard.body("response_body")))


async def response_trailers(subject: Subject) -> Finding:
    async with subject.gateway.talk() as talk:
        heard = await talk.verdict(subject.completion())
        if violation := unrouted(heard):
            return failed(violation)
        await talk.respond(ANSWER, trailers=True)
    kinds = _kinds(heard)
    if "response_trailers" not in kinds:
        return failed(f"response trailers were not answered: {heard.said()}")
    marked = any(streamed[1] for reply in heard.of("response_body") if (streamed := frames.chunk(reply)))
    return held("a chunk before the trailers carries end_of_stream" if marked else None)


def _must(name: str, requirement: str, run: Try, source: str = API) -> Check[Subject]:
    return Check(f"EPP-1.{name}", Tier.T1, requirement, source, run, Level.MUST)


CHECKS: Sequence[Check[Subject]] = (
    _must("order", "One reply to the headers, then the body, then what follows, never out of this order.", order),
    _must("streamed", "Bodies are given back by the streamed mutation, in both directions.", streamed),
    _must("chunk", "No body reply is longer than 64 KiB.", chunk_size),
    _must("end", "end_of_stream stands on the last chunk of a body and on no other.", end_mark),
    _must("bytes", "A request body comes back to the byte when nothing asks to rewrite it.", request_bytes),
    _must("trailers", "Request trailers are answered after the body, which has no end mark.", request_trailers),
    _must("bodyless", "A request without a body is routed on its headers, and gets none.", bodyless, PROTOCOL),
    _must("response-head", "Response headers are answered at once, not when the body is over.", response_head),
    _must("response-bytes", "A response body comes back to the byte.", response_bytes),
    _must("sse", "Each event of a stream is given back before the next one is there.", events_at_once, PROTOCOL),
    _must(
        "response-trailers", "Response trailers are answered after the body, which has no end mark.", response_trailers
    ),
)
