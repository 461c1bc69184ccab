"""Streams that break every rule, several at a time: whatever a data plane sends, the service stays up and owes nothing.

Bytes go in and out of the server's own connection, on a transport in memory; the scheduler is the real one, with so
little room that requests queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import fakes
from fakes import ManualClock
from picker.exchange import Limits
from picker.frontends.extproc import Bounds, ExtProc, Mode
from picker.frontends.grpc_server import GrpcServer, _Protocol
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Fact, Failed, Finished
from picker.wire import als
from picker.wire.extproc import SERVICE, ProcessingRequest, ProcessingResponse
from picker.wire.http2 import PREFACE

PROCESS = f"/{SERVICE}/Process"
LOG = f"/{als.SERVICE}/StreamAccessLogs"
STREAMS = (1, 3, 5)
LOG_STREAM = 7
BODY = b'{"model": "m", "prompt": "Once upon a time", "stream": true}'
EVENT = b'data: {"choices": [{"index": 0, "text": "there"}]}\n\n'

Op = Callable[["Wire"], None]


class Wire:
    """The data plane's end of one connection. replies: what came back on each stream, in order."""

    def __init__(self, protocol: _Protocol) -> None:
        self.protocol = protocol
        self.replies: dict[int, list[ProcessingResponse]] = {number: [] for number in STREAMS}
        self.ended: set[int] = set()
        self.closed = False
        self._parts: dict[int, bytes] = {}
        self._rest = b""

    # asyncio.Transport, as far as the server uses it

    def write(self, data: bytes) -> None:
        data = self._rest + data
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3]):
            size, kind, flags, stream = int.from_bytes(data[:3]), data[3], data[4], int.from_bytes(data[5:9])
            self._frame(kind, flags, stream, data[9 : 9 + size])
            data = data[9 + size :]
        self._rest = data

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.protocol.connection_lost(None)

    abort = close

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == 3 or (kind == 1 and flags & 1):  # a reset, or trailers
            self.ended.add(stream)
        if kind != 0 or stream not in self.replies:
            return
        data = self._parts.get(stream, b"") + payload
        while len(data) >= 5 and len(data) >= 5 + (size := int.from_bytes(data[1:5])):
            self.replies[stream].append(ProcessingResponse.FromString(data[5 : 5 + size]))
            data = data[5 + size :]
        self._parts[stream] = data

    # what the data plane does

    def hear(self, data: bytes) -> None:
        if not self.closed:
            self.protocol.data_received(data)

    def begin(self) -> None:
        window = (2**31 - 1).to_bytes(4)
        self.hear(PREFACE + frame(4, 0, 0, b"\0\4" + window) + frame(8, 0, 0, (2**31 - 70_000).to_bytes(4)))
        for stream in (*STREAMS, LOG_STREAM):
            self.open(stream, PROCESS if stream in STREAMS else LOG)

    def open(self, stream: int, path: str) -> None:
        name = path.encode()
        self.hear(frame(1, 4, stream, b"\x83\x86\x04" + bytes((len(name),)) + name))

    def say(self, stream: int, message: bytes) -> None:
        if stream not in self.ended:
            self.hear(frame(0, 0, stream, b"\0" + len(message).to_bytes(4) + message))

    def half_close(self, stream: int) -> None:
        if stream not in self.ended:
            self.ended.add(stream)
            self.hear(frame(0, 1, stream, b""))

    def reset(self, stream: int) -> None:
        self.ended.add(stream)
        self.hear(frame(3, 0, stream, (8).to_bytes(4)))

    def mark(self, stream: int) -> str:
        """What the request of a stream was sent on with, if it was."""
        for reply in self.replies[stream]:
            for option in reply.request_headers.response.header_mutation.set_headers:
                if option.header.key == "x-picker-request-id":
                    return str(option.header.raw_value.decode())
        return "1-nothing"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


# --- what is said ------------------------------------------------------------------------------------------


def message(**fields: Any) -> bytes:
    made = ProcessingRequest()
    for kind, value in fields.items():
        getattr(made, kind).SetInParent()
        if kind.endswith("_headers"):
            headers, end = value
            for name, text in headers.items():
                getattr(made, kind).headers.headers.add(key=name, raw_value=text.encode())
            getattr(made, kind).end_of_stream = end
        elif kind.endswith("_body"):
            getattr(made, kind).body, getattr(made, kind).end_of_stream = value
    return bytes(made.SerializeToString())


def with_subset(data: bytes, hint: str) -> bytes:
    made = ProcessingRequest.FromString(data)
    namespace = made.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    namespace.fields["x-gateway-destination-endpoint-subset"].string_value = hint
    return bytes(made.SerializeToString())


HEAD = {":method": "POST", ":path": "/v1/completions"}
PLAY = [
    message(request_headers=(HEAD, False)),
    message(request_body=(BODY[:20], False)),
    message(request_body=(BODY[20:], True)),
    message(response_headers=({":status": "200", "content-type": "text/event-stream"}, False)),
    message(response_body=(EVENT, False)),
    message(response_body=(EVENT + b"data: [DONE]\n\n", True)),
]
ODD = [
    b"",
    b"\xff\xff\xff",
    message(request_headers=(HEAD, True)),
    message(request_headers=({}, False)),
    message(request_headers=(HEAD | {"content-length": "9" * 30}, False)),
    message(request_body=(b"{", True)),
    message(request_body=(b"", True)),
    message(request_body=(b"[" * 3000, True)),
    message(request_body=(json.dumps({"model": "m", "prompt": [1, 2, 3]}).encode(), True)),
    message(request_body=(b"x" * 5000, False)),
    message(request_trailers=None),
    message(response_trailers=None),
    message(response_headers=({":status": "503"}, True)),
    message(response_headers=({":status": "no"}, False)),
    message(response_headers=({}, False)),
    message(response_body=(b"", True)),
    with_subset(PLAY[0], "[fd00::1]:8000"),
    with_subset(PLAY[2], "a:8000,,[:::]"),
    with_subset(PLAY[2], ""),
]


@st.composite
def plays(draw: st.DrawFn) -> list[bytes]:
    """A whole exchange with a few messages missing, doubled, spoiled, out of place, or of another one."""
    play = list(PLAY[: draw(st.sampled_from([6, 6, 6, 5, 4, 3, 2, 1]))])
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(play)))
        match draw(st.sampled_from(["drop", "double", "insert", "swap", "spoil"])):
            case "drop" if play[at:]:
                del play[at]
            case "double" if play[at:]:
                play.insert(at, play[at])
            case "insert":
                play.insert(at, draw(st.sampled_from(ODD)))
            case "swap" if play[at + 1 :]:
                play[at], play[at + 1] = play[at + 1], play[at]
            case "spoil" if play[at:] and play[at]:
                byte = draw(st.integers(0, len(play[at]) - 1))
                spoiled = bytearray(play[at])
                spoiled[byte] ^= 1 << draw(st.integers(0, 7))
                play[at] = bytes(spoiled)
            case _:
                pass
    return play


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    """What happens on three streams and a log, interleaved: (what, stream, message)."""
    rest = {stream: draw(plays()) for stream in STREAMS}
    script: list[tuple[str, int, bytes]] = []
    while any(rest.values()):
        stream = draw(st.sampled_from([number for number in STREAMS if rest[number]]))
        script.append(("say", stream, rest[stream].pop(0)))
        if draw(st.integers(0, 4)) == 0:
            what = draw(st.sampled_from(["reset", "half-close", "turns", "log", "wait", "garbage-log", "flags"]))
            script.append((what, draw(st.sampled_from(STREAMS)), b""))
    return script


def logged(wire: Wire, stream: int, *, failed: bool) -> bytes:
    made = als_pb2.StreamAccessLogsMessage()
    entry = accesslog_pb2.HTTPAccessLogEntry()
    entry.request.request_headers["x-picker-request-id"] = wire.mark(stream)
    entry.response.response_code.value = 200
    entry.common_properties.response_flags.upstream_remote_reset = failed
    entry.common_properties.upstream_remote_address.socket_address.address = "b"
    entry.common_properties.upstream_remote_address.socket_address.port_value = 8000
    made.http_logs.log_entry.append(entry)
    return bytes(made.SerializeToString())


# --- the stage ---------------------------------------------------------------------------------------------


class Stage:
    def __init__(self, mode: Mode) -> None:
        self.clock = ManualClock()
        self.scheduler = fakes.scheduler("a", max_inflight=1, queue_size=1)
        self.telemetry = Telemetry(CollectorRegistry())
        self.runtime = Runtime(
            self.scheduler,
            BlockHasher(b"a secret"),
            self.telemetry,
            clock=self.clock,
            limits=Limits(max_body_bytes=4000),
            queue_timeout=10.0,
        )
        self.ends: list[int] = []
        fakes.Ear(self.runtime, self._note)
        self.service = ExtProc(self.runtime, mode=mode, bounds=Bounds(20.0, 20.0, 20.0), predict=lambda _: 5.0)
        self.wire: Wire

    def _note(self, fact: Fact) -> None:
        if isinstance(fact, Finished | Failed):
            self.ends.append(fact.request_id)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Wire]:
        async with asyncio.TaskGroup() as tasks:
            server = GrpcServer(self.service._handlers(), tasks, max_message_bytes=100_000)
            protocol = _Protocol(server)
            wire = Wire(protocol)
            protocol.connection_made(wire)  # type: ignore[arg-type]
            wire.begin()
            yield wire
            wire.close()
            await server.stop(None)

    def act(self, wire: Wire, what: str, stream: int, data: bytes) -> None:
        match what:
            case "say":
                wire.say(stream, data)
            case "reset":
                wire.reset(stream)
            case "half-close":
                wire.half_close(stream)
            case "log":
                wire.say(LOG_STREAM, logged(wire, stream, failed=False))
            case "flags":
                wire.say(LOG_STREAM, logged(wire, stream, failed=True))
            case "garbage-log":
                wire.say(LOG_STREAM, b"\xff\xff")
            case "wait":
                self.clock.advance(8.0)
                self.service._sweep(self.clock())

    def owes_nothing(self) -> None:
        scheduler = self.scheduler
        assert self.service.open_streams == 0, "a stream outlived its bound"
        assert len(scheduler.charges) == 0, "a charge has leaked"
        assert len(scheduler.queue) == 0, "a request waits that nobody wants"
        assert scheduler.pool.inflight.sum() == 0
        assert not self.runtime._waiting
        assert len(set(self.ends)) == len(self.ends), "a request ended twice"
        assert self.service.feedback is None or not len(self.service.feedback)
        for where in ("extproc", "submit", "apply", "poll"):
            value = self.telemetry.registry.get_sample_value("picker_internal_errors_total", {"where": where})
            assert not value, f"a bug in {where}"


async def turns(count: int = 6) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


ORDER = [
    *("request_headers", "request_body", "request_trailers"),
    *("response_headers", "response_body", "response_trailers", "immediate_response"),
]


def assert_legal(replies: list[ProcessingResponse]) -> None:
    """Headers, body, trailers of a direction in this order, bodies ended once, and nothing after a last word."""
    kinds = [str(reply.WhichOneof("response")) for reply in replies]
    assert kinds == sorted(kinds, key=ORDER.index)
    for only in ("request_headers", "request_trailers", "response_headers", "response_trailers", "immediate_response"):
        assert kinds.count(only) <= 1
    assert not {"immediate_response", "response_headers"} <= set(kinds)
    for direction in ("request_body", "response_body"):
        bodies = [getattr(reply, direction) for reply in replies if reply.WhichOneof("response") == direction]
        ends = [body.response.body_mutation.streamed_response.end_of_stream for body in bodies]
        assert True not in ends[:-1]


SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(mode=st.sampled_from(Mode), script=scripts(), ending=st.sampled_from(["silence", "reset", "half-close", "lost"]))
@SETTINGS
def test_nothing_a_data_plane_says_crashes_leaks_or_hangs(
    mode: Mode, script: list[tuple[str, int, bytes]], ending: str
) -> None:
    async def play() -> None:
        stage = Stage(mode)
        async with stage.serving() as wire:
            for what, stream, data in script:
                stage.act(wire, what, stream, data)
                if what != "say" or len(data) % 2:  # some arrive together, some do not
                    await turns()
            for stream in STREAMS:
                if ending in ("reset", "half-close"):
                    stage.act(wire, ending, stream, b"")
            if ending == "lost":
                wire.close()
            await turns()
            for _ in range(6):
                stage.clock.advance(60.0 if _ < 5 else 2000.0)
                stage.service._sweep(stage.clock())
                await turns()
            stage.owes_nothing()
        for replies in wire.replies.values():
            assert_legal(replies)

    asyncio.run(play())


@given(
    mode=st.sampled_from(Mode),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 7)), max_size=4),
)
@SETTINGS
def test_no_bytes_on_the_wire_crash_leak_or_hang(mode: Mode, cuts: list[int], flips: list[tuple[int, int]]) -> None:
    async def play() -> None:
        sent = Wire(None)  # type: ignore[arg-type]
        said: list[bytes] = []
        sent.hear = said.append  # type: ignore[assignment, method-assign]
        for data in PLAY:
            sent.say(1, data)
        spoiled = bytearray(b"".join(said))
        for at, bit in flips:
            spoiled[at % len(spoiled)] ^= 1 << bit
        stage = Stage(mode)
        async with stage.serving() as wire:
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(spoiled)], strict=True):
                wire.hear(bytes(spoiled[start:end]))
                await turns()
            wire.close()
            await turns()
            stage.service._sweep(stage.clock() + 2000.0)
            stage.owes_nothing()

    asyncio.run(play())
