"""The gateway's side of ext-proc: opens streams to a picker, sends what it is told and keeps every frame that returns.

Owns the conversation and its evidence; judges nothing. One `Talk` is one gRPC stream is one HTTP request.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from picker.check import frames
from picker.check.frames import ProcessingRequest, ProcessingResponse, Subset
from picker.check.verdict import Trace

_LARGE: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A picker that is restarted between two checks is found again at once.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a picker serves. tls: over TLS. ca: PEM file to verify it with; without one the certificate is taken as is.

    name: the name its certificate is for, when that is not the host.
    """

    address: str
    tls: bool = False
    ca: Path | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One HTTP request to decide about. body None: there is none. pieces: bytes in one frame, None for a single one."""

    path: str = "/v1/completions"
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    subset: Subset = None
    trailers: bool = False
    piece: int | None = None

    def messages(self) -> list[ProcessingRequest]:
        """Everything the gateway sends before the verdict."""
        method = "GET" if self.body is None else "POST"
        head = frames.request_headers(
            self.path, end=self.body is None, method=method, headers=self.headers, subset=self.subset
        )
        if self.body is None:
            return [head]
        pieces = _pieces(self.body, self.piece)
        last = len(pieces) - 1
        bodies = [
            frames.request_body(data, end=i == last and not self.trailers, subset=self.subset)
            for i, data in enumerate(pieces)
        ]
        return [head, *bodies, *([frames.request_trailers(subset=self.subset)] if self.trailers else [])]


def _pieces(body: bytes, size: int | None) -> list[bytes]:
    if size is None or len(body) <= size:
        return [body]
    return [body[start : start + size] for start in range(0, len(body), size)]


@dataclass(slots=True)
class Heard:
    """What came back on one stream. end: the status it ended with. silent: nothing came within the patience."""

    replies: list[ProcessingResponse] = field(default_factory=list)
    end: str | None = None
    details: str = ""
    silent: bool = False
    seconds: float = 0.0

    def of(self, kind: str) -> list[ProcessingResponse]:
        return [reply for reply in self.replies if reply.WhichOneof("response") == kind]

    @property
    def immediate(self) -> int | None:
        """The status of an immediate response."""
        found = self.of("immediate_response")
        return int(found[0].immediate_response.status.code) if found else None

    @property
    def immediate_headers(self) -> dict[str, str]:
        found = self.of("immediate_response")
        return frames.set_headers(found[0].immediate_response.headers) if found else {}

    @property
    def immediate_body(self) -> bytes:
        found = self.of("immediate_response")
        return bytes(found[0].immediate_response.body) if found else b""

    @property
    def in_header(self) -> str | None:
        """The destination by header."""
        for reply in self.of("request_headers"):
            return frames.set_headers(reply.request_headers.response.header_mutation).get(frames.DESTINATION)
        return None

    @property
    def in_metadata(self) -> str | None:
        """The destination by dynamic metadata."""
        for reply in self.replies:
            fields = reply.dynamic_metadata.fields
            if frames.LB_NAMESPACE in fields:
                inner = fields[frames.LB_NAMESPACE].struct_value.fields
                if frames.DESTINATION in inner:
                    return str(inner[frames.DESTINATION].string_value)
        return None

    @property
    def named(self) -> list[str]:
        """The endpoints named, best first, by whichever way they were."""
        return [entry.strip() for entry in (self.in_metadata or self.in_header or "").split(",") if entry.strip()]

    @property
    def first(self) -> str | None:
        return self.named[0] if self.named else None

    def body(self, kind: str) -> bytes:
        """The bytes that came back for "request_body" or "response_body", by whichever mutation."""
        parts = []
        for reply in self.of(kind):
            mutation = getattr(reply, kind).response.body_mutation
            streamed = frames.chunk(reply)
            parts.append(streamed[0] if streamed is not None else mutation.body)
        return b"".join(parts)

    def said(self) -> str:
        """In a few words."""
        words = [frames.told_reply(reply) for reply in self.replies]
        if len(words) > 6:
            words = [*words[:3], f"... {len(words) - 5} more ...", *words[-2:]]
        if self.end is not None:
            words.append(f"stream ended {self.end}" + (f" ({self.details[:80]})" if self.details else ""))
        if self.silent:
            words.append(f"nothing more for {self.seconds:.2f} s")
        return "; ".join(words) or "nothing"


class Talk:
    """One stream. patience: seconds to wait for a reply that is due."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[ProcessingRequest, ProcessingResponse],
        patience: float,
        trace: Trace,
    ) -> None:
        self.heard = Heard()
        self.patience = patience
        self._call = call
        self._trace = trace
        self._read: asyncio.Task[object] | None = None

    async def send(self, *messages: ProcessingRequest) -> None:
        """Write frames; a stream that has ended meanwhile swallows them, `heard.end` then says how."""
        for message in messages:
            try:
                await self._call.write(message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return

    async def half_close(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()

    async def reply(self, patience: float | None = None) -> ProcessingResponse | None:
        """The next frame; None when the stream has ended or nothing came in time, and `heard` says which."""
        heard, started = self.heard, time.monotonic()
        if heard.end is not None or heard.silent:  # a read given up takes its call along
            return None
        patience = self.patience if patience is None else patience
        try:
            async with asyncio.timeout(patience):
                message = await self._call.read()
        except TimeoutError:
            heard.silent, heard.seconds = True, time.monotonic() - started
            return None
        except grpc.aio.AioRpcError as error:
            heard.end, heard.details = error.code().name, error.details() or ""
            return None
        if message is grpc.aio.EOF:
            code = await self._call.code()
            heard.end, heard.details = code.name, await self._call.details() or ""
            return None
        heard.replies.append(message)
        return message

    async def verdict(self, ask: Ask) -> Heard:
        """Send a whole request and read until the picker has decided and given the body back."""
        self._trace.send("; ".join(_few([frames.told_request(message) for message in ask.messages()])))
        started = time.monotonic()
        await self.send(*ask.messages())
        await self._read_request_phase(ask)
        if not self.heard.silent:
            self.heard.seconds = time.monotonic() - started
        self._trace.receive(self.heard.said())
        return self.heard

    async def _read_request_phase(self, ask: Ask) -> None:
        decided = returned = False
        while not (decided and returned):
            message = await self.reply()
            if message is None:
                return
            kind = message.WhichOneof("response")
            if kind == "immediate_response":
                return
            decided = decided or kind == "request_headers"
            returned = returned or ask.body is None or _ends_request(message, trailers=ask.trailers)
            # Replies that are no streamed mutation cannot say that they are the last.
            returned = returned or (
                not ask.trailers and 0 < len(ask.body or b"") <= len(self.heard.body("request_body"))
            )

    async def respond(
        self,
        *chunks: bytes,
        content_type: str = "application/json",
        served: str | None = None,
        trailers: bool = False,
        status: int = 200,
    ) -> Heard:
        """Have the endpoint answer with these chunks, each sent when the one before has come back."""
        self._trace.send(f"response {status} {content_type} in {len(chunks)} chunks")
        before = len(self.heard.replies)
        await self.send(frames.response_headers(status, content_type=content_type, served=served, end=not chunks))
        await self._until("response_headers")
        for number, data in enumerate(chunks):
            last = number == len(chunks) - 1
            await self.send(frames.response_body(data, end=last and not trailers))
            if "event-stream" in content_type and not last:
                await self._until("response_body")
        if trailers:
            await self.send(frames.response_trailers())
        if chunks:
            await self._until_response_ends(trailers=trailers)
        self._trace.receive(replace(self.heard, replies=self.heard.replies[before:]).said())
        return self.heard

    async def _until(self, kind: str) -> None:
        while (message := await self.reply()) is not None and message.WhichOneof("response") != kind:
            pass

    async def _until_response_ends(self, *, trailers: bool) -> None:
        while (message := await self.reply()) is not None:
            if trailers and message.WhichOneof("response") == "response_trailers":
                return
            streamed = frames.chunk(message)
            if message.WhichOneof("response") == "response_body" and (streamed is None or streamed[1]):
                return

    def cancel(self) -> None:
        """Hang up, as a gateway does whose client has gone."""
        self._call.cancel()


def _ends_request(message: ProcessingResponse, *, trailers: bool) -> bool:
    kind = message.WhichOneof("response")
    if kind == "request_trailers":
        return True
    streamed = frames.chunk(message)
    return kind == "request_body" and not trailers and streamed is not None and streamed[1]


def _few(words: Sequence[str]) -> Sequence[str]:
    return words if len(words) <= 5 else [*words[:2], f"... {len(words) - 3} more ...", words[-1]]


class Gateway:
    """A connection to one picker. patience: seconds to wait for each reply that is due."""

    def __init__(self, target: Target, *, patience: float, trace: Trace) -> None:
        self.target = target
        self.patience = patience
        self.trace = trace
        self._channel = open_channel(target)
        self._process = self._channel.stream_stream(
            frames.PROCESS,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )
        self._raw = self._channel.stream_stream(frames.PROCESS)

    async def close(self) -> None:
        await self._channel.close()

    @contextlib.asynccontextmanager
    async def talk(self, patience: float | None = None) -> AsyncIterator[Talk]:
        """A stream for the length of the block; hung up at its end."""
        talk = Talk(self._process(), self.patience if patience is None else patience, self.trace)
        try:
            yield talk
        finally:
            talk.cancel()

    async def ask(self, ask: Ask, *, status: int = 200) -> Heard:
        """The verdict on one request, which the endpoint named then answers with this status.

        503: a gateway's own answer, which no endpoint gave.
        """
        async with self.talk() as talk:
            heard = await talk.verdict(ask)
            if heard.first is not None and not heard.silent:
                await talk.respond(ANSWER, served=None if status == 503 else heard.first, status=status)
            return heard

    async def throw(self, data: bytes) -> str:
        """Send bytes that need be no message; the status the stream ends with, or what else happens."""
        self.trace.send(f"{len(data)} bytes that are no ext-proc message")
        call = self._raw()
        try:
            async with asyncio.timeout(self.patience):
                await call.write(data)
                await call.done_writing()
                told = await call.read()
                said = (await call.code()).name if told is grpc.aio.EOF else "a reply"
        except TimeoutError:
            said = "silence"
        except grpc.aio.AioRpcError as error:
            said = str(error.code().name)
        finally:
            call.cancel()
        self.trace.receive(said)
        return said

    async def health(self, service: str) -> str:
        """The word of the health service, or the name of the gRPC status it ends with."""
        self.trace.send(f"health Check({service!r})")
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=self.patience)
            said = str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        except grpc.aio.AioRpcError as error:
            said = str(error.code().name)
        self.trace.receive(said)
        return said

    async def watch(self, service: str) -> str:
        """The first word of a watch on the health service, or the name of the gRPC status it ends with."""
        self.trace.send(f"health Watch({service!r})")
        call = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest(service=service))
        try:
            async with asyncio.timeout(self.patience):
                answer = await call.read()
            if answer is grpc.aio.EOF:
                said = str((await call.code()).name)
            else:
                said = str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        except TimeoutError:
            said = "silence"
        except grpc.aio.AioRpcError as error:
            said = str(error.code().name)
        finally:
            call.cancel()
        self.trace.receive(said)
        return said


# What an OpenAI server says to a short completion.
ANSWER = (
    b'{"id":"cmpl-check","object":"text_completion","created":1,"model":"check",'
    b'"choices":[{"index":0,"text":"there","finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":4,"completion_tokens":1,"total_tokens":5}}'
)


def open_channel(target: Target) -> grpc.aio.Channel:
    """A connection to a picker. Without a CA the certificate that it shows is trusted, whoever signed it.

    Raises OSError when the picker cannot be asked for its certificate.
    """
    options: list[tuple[str, int | str]] = [*_LARGE]
    if not target.tls:
        return grpc.aio.insecure_channel(target.address, options=options)
    if target.name is not None:
        options.append(("grpc.ssl_target_name_override", target.name))
    pem = target.ca.read_bytes() if target.ca is not None else shown_certificate(target.address)
    return grpc.aio.secure_channel(target.address, grpc.ssl_channel_credentials(pem), options=options)


def shown_certificate(address: str) -> bytes:
    """The certificate that a server shows, as PEM; raises OSError."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=5.0).encode()
