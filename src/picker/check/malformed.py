"""EPP-10 and SEC-6: what nobody should send, and what nobody should repeat.

Bad input is the client's fault and is answered so, or passed on; it never costs the next request anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from picker.check import frames
from picker.check.framing import API
from picker.check.gateway import Ask, Heard
from picker.check.prompts import MARKER
from picker.check.subject import Subject, Try, unrouted
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

_DEEP = 20_000
_PRACTICE = "practice"
_PRIVACY = "prompt privacy"


def bodies(subject: Subject) -> Mapping[str, bytes]:
    """Bodies that are no proper request, by what is wrong with them."""
    good = subject.prompts.body()
    return {
        "truncated JSON": good[:-5],
        "an empty body": b"",
        "no JSON": b"model=m&prompt=hello",
        "a JSON number": b"42",
        "a JSON list": b"[]",
        "invalid UTF-8": good.replace(b"max_tokens", b"\xff\xfe\xc0"),
        "deep nesting": b'{"model":"m","prompt":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
        "wrong types": b'{"model": {"a": 1}, "prompt": 7, "max_tokens": "many"}',
        "a huge model name": json.dumps({"model": "m" * 200_000, "prompt": "hello"}).encode(),
        "duplicate keys": b'{"model":"a","model":"b","prompt":"x","prompt":"y"}',
        "a huge number": b'{"model":"m","prompt":"x","max_tokens":1' + b"0" * 400 + b"}",
        "a null byte": b'{"model":"m\\u0000","prompt":"\\u0000"}',
    }


def _mishandled(heard: Heard) -> str | None:
    """A bad request may be forwarded (the engine answers) or refused as the client's fault."""
    if heard.named or (heard.immediate is not None and 400 <= heard.immediate < 500):
        return None
    return heard.said()


async def bad_bodies(subject: Subject) -> Finding:
    for name, body in bodies(subject).items():
        for path in ("/v1/completions", "/v1/chat/completions"):
            if wrong := _mishandled(await subject.decide(Ask(path=path, body=body))):
                return failed(f"{name} at {path}: {wrong}")
    return passed(f"{len(bodies(subject))} kinds of bad bodies were forwarded or answered 4xx")


async def tiny_frames(subject: Subject) -> Finding:
    body = subject.prompts.body()
    heard = await subject.decide(Ask(body=body, piece=1))
    if violation := unrouted(heard):
        return failed(violation)
    return held(None if heard.body("request_body") == body else "a body sent byte by byte came back different")


async def empty_last_frame(subject: Subject) -> Finding:
    """A body whose end is told by a frame of its own, as gateways do that learn of it late."""
    body = subject.prompts.body()
    async with subject.gateway.talk() as talk:
        await talk.send(frames.request_headers("/v1/completions"), frames.request_body(body, end=False))
        await talk.send(frames.request_body(b"", end=True))
        heard = talk.heard
        while await talk.reply() is not None and not (heard.named and heard.body("request_body") == body):
            pass
    return held(unrouted(heard) or (None if heard.body("request_body") == body else "the body came back different"))


async def broken_frames(subject: Subject) -> Finding:
    """Bytes that are no message, and messages in no order: the stream may fail, the picker may not."""
    for data in (b"\xff" * 64, b"\x0a\x04", b""):
        await subject.gateway.throw(data)
    for messages in _out_of_order(subject):
        async with subject.gateway.talk() as talk:
            subject.trace.send("; ".join(frames.told_request(message) for message in messages))
            await talk.send(*messages)
            await talk.half_close()
            while await talk.reply() is not None:
                pass
            subject.trace.receive(talk.heard.said())
            if talk.heard.silent:
                return failed(f"frames in no order, then the end, are met with silence: {talk.heard.said()}")
    return held(unrouted(await subject.decide()))


def _out_of_order(subject: Subject) -> list[list[frames.ProcessingRequest]]:
    head = frames.request_headers("/v1/completions")
    body = frames.request_body(subject.prompts.body(), end=True)
    return [
        [frames.response_body(b"{}", end=True)],
        [frames.request_trailers()],
        [body, head],
        [head, frames.response_body(b"{}", end=True)],
    ]


async def half_closed(subject: Subject) -> Finding:
    """An end without a status of failure, before the verdict, has Envoy serve the request unscheduled."""
    async with subject.gateway.talk() as talk:
        subject.trace.send("request_headers; request_body (not the last); end of the gateway's side")
        await talk.send(frames.request_headers("/v1/completions"), frames.request_body(b'{"mo', end=False))
        early = await talk.reply(min(0.2, subject.patience))
    subject.trace.receive(talk.heard.said())
    clean = early is None and talk.heard.end == "OK"
    return held("the picker ends a stream with OK while its verdict is due" if clean else None)


async def private_errors(subject: Subject) -> Finding:
    for body in _marked(subject):
        heard = await subject.decide(Ask(body=body))
        told = f"{heard.immediate_body!r} {heard.immediate_headers} {heard.details}"
        if MARKER in told:
            return failed("an error quotes the prompt")
    return passed()


async def private_logs(subject: Subject) -> Finding:
    if not subject.sinks:
        return skipped("no log is known; name it with --log")
    for body in _marked(subject):
        await subject.decide(Ask(body=body))
    leaking = [path for path in subject.sinks if MARKER in _text(path)]
    return held(f"{leaking[0]} quotes the prompt" if leaking else None)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _marked(subject: Subject) -> list[bytes]:
    """Requests, good and bad, that carry the marker."""
    good = subject.prompts.body(f"{MARKER} {subject.prompts.fresh()}")
    unknown = json.dumps({"model": "no-such-model", "prompt": MARKER}).encode()
    return [good, good[:-5], unknown, MARKER.encode(), json.dumps({"prompt": {MARKER: 1}}).encode()]


def _check(
    name: str, requirement: str, run: Try, *, source: str = _PRACTICE, level: Level = Level.MUST
) -> Check[Subject]:
    return Check(name, Tier.T1, requirement, source, run, level)


CHECKS: Sequence[Check[Subject]] = (
    _check("EPP-10.bodies", "Bodies that are no request are forwarded or answered 4xx.", bad_bodies),
    _check("EPP-10.frames", "A body that comes byte by byte is a body.", tiny_frames, source=API),
    _check("EPP-10.late-end", "The end of a body may come in a frame of its own.", empty_last_frame, source=API),
    _check("EPP-10.order", "Frames that break the protocol cost their own stream only.", broken_frames, source=API),
    _check("EPP-10.early-end", "No stream is ended with OK before its verdict.", half_closed, source=API),
    _check("SEC-6.errors", "Errors do not quote the prompt.", private_errors, source=_PRIVACY),
    _check("SEC-6.logs", "Logs do not quote the prompt.", private_logs, source=_PRIVACY),
)
