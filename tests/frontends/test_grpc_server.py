"""The server against gRPC's own client."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from picker.frontends.grpc_server import Call, Code, GrpcServer
from picker.frontends.serving import listen, port_of
from picker.wire.http2 import PREFACE

# A frame of headers that opens a call of "/t/hang" (RFC 7541: literals of the static table's names).
_BLOCK = b"\x83\x86\x44\x07/t/hang"
_HANG = bytes((0, 0, len(_BLOCK), 1, 4, 0, 0, 0, 1)) + _BLOCK


class Rig:
    """A server with a few odd methods, gRPC's client for it, and what the handlers saw."""

    def __init__(self) -> None:
        self.server: GrpcServer
        self.channel: grpc.aio.Channel
        self.port = 0
        self.ended: list[str] = []
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.sent = 0

    def handlers(self) -> dict[str, object]:
        return {f"/t/{name}": getattr(self, name) for name in ("echo", "fail", "refuse", "hang", "pour")}

    async def echo(self, call: Call) -> None:
        while (message := await call.read()) is not None:
            await call.write(message)

    async def fail(self, call: Call) -> None:
        raise ZeroDivisionError

    async def refuse(self, call: Call) -> None:
        call.end(Code.INVALID_ARGUMENT, "not today")

    async def hang(self, call: Call) -> None:
        self.begun.set()
        try:
            await self.go_on.wait()
            await call.write(b"done")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise

    async def pour(self, call: Call) -> None:
        for _ in range(1000):
            await call.write(b"x" * 100_000)
            self.sent += 1

    def look(self) -> None:
        """What the server does at intervals."""
        for connection in self.server.connections:
            connection.look()

    async def heard(self) -> None:
        """Wait until the one peer has said something since we looked."""
        (connection,) = self.server.connections
        async with asyncio.timeout(60):
            while not connection._heard:  # noqa: ASYNC110
                await asyncio.sleep(0)

    def call(self, method: str) -> "grpc.aio.StreamStreamCall[bytes, bytes]":
        return self.channel.stream_stream(f"/t/{method}")()


@asynccontextmanager
async def rig(keepalive: float = 20.0) -> AsyncIterator[Rig]:
    this = Rig()
    listener = listen("127.0.0.1", 0)
    this.port = port_of(listener)
    async with asyncio.TaskGroup() as tasks:
        handlers: Any = this.handlers()
        this.server = GrpcServer(handlers, tasks, max_message_bytes=10_000_000, keepalive=keepalive)
        await this.server.serve(listener)
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.bdp_probe", 0),  # else its window grows with its appetite
        ]
        this.channel = grpc.aio.insecure_channel(f"127.0.0.1:{this.port}", options=options)
        async with this.channel:
            yield this
        await this.server.stop(None)


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 65_530, 65_531, 1_000_000, 9_999_999])
async def test_messages_of_any_size_come_back(size: int) -> None:
    message = bytes(range(256)) * (size // 256 + 1)
    async with rig() as this:
        call = this.call("echo")
        for _ in range(2):
            await call.write(message[:size])
            assert await call.read() == message[:size]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_many_calls_share_a_connection() -> None:
    async def one(this: Rig, number: int) -> bool:
        call = this.call("echo")
        message = f"message {number}".encode() * 5000
        await call.write(message)
        await call.done_writing()
        return [reply async for reply in call] == [message]

    async with rig() as this:
        assert all(await asyncio.gather(*(one(this, number) for number in range(100))))


async def test_a_message_beyond_the_limit_ends_its_call() -> None:
    async with rig() as this:
        call = this.call("echo")
        await call.write(b"x" * 10_000_001)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_handler_ends_its_call_with_a_status() -> None:
    async with rig() as this:
        call = this.call("refuse")
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await call.details() == "not today"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with rig() as this:
        assert await this.call("nothing").code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_handler_that_fails_ends_its_call_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with rig() as this:
        assert await this.call("fail").code() is grpc.StatusCode.INTERNAL
        assert await this.call("refuse").code() is grpc.StatusCode.INVALID_ARGUMENT
    # gRPC's client complains of events of the loops of earlier tests.
    assert [record.name for record in caplog.records if record.name != "asyncio"] == ["picker.grpc"]


async def test_a_client_that_cancels_cancels_the_handler() -> None:
    async with rig() as this:
        call = this.call("hang")
        await this.begun.wait()
        call.cancel()
        while not this.ended:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_lost_connection_cancels_its_handlers() -> None:
    async with rig() as this:
        call = this.call("hang")
        await this.begun.wait()
        await this.channel.close()
        assert call.done()
        while not this.ended:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_writer_waits_for_one_who_does_not_read() -> None:
    async with rig() as this:
        call = this.call("pour")
        assert await call.read() == b"x" * 100_000
        sent = 0
        while not sent or sent != this.sent:
            sent = this.sent
            await asyncio.sleep(0.05)
        assert sent < 900
        for _ in range(999):
            assert await call.read() == b"x" * 100_000
        assert await call.read() is grpc.aio.EOF


async def test_stopping_lets_calls_end_within_the_grace() -> None:
    async with rig() as this:
        call = this.call("hang")
        await this.begun.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(this.server.stop(10))
            await asyncio.sleep(0)
            this.go_on.set()
            assert await call.read() == b"done"
            assert await call.code() is grpc.StatusCode.OK


async def test_stopping_cancels_what_outlives_the_grace() -> None:
    async with rig() as this:
        call = this.call("hang")
        await this.begun.wait()
        await this.server.stop(0.01)
        assert this.ended == ["cancelled"]
        assert await call.code() is not grpc.StatusCode.OK


async def test_a_peer_that_says_nothing_any_more_is_given_up_with_its_calls() -> None:
    async with rig() as this:
        reader, writer = await asyncio.open_connection("127.0.0.1", this.port)
        writer.write(PREFACE + _HANG)
        await this.begun.wait()
        for _ in range(3):
            this.look()
        assert await reader.read()  # our settings, and what we ask before we go
        while not this.ended:  # noqa: ASYNC110
            await asyncio.sleep(0)
        writer.close()


async def test_a_peer_that_never_speaks_is_given_up() -> None:
    async with rig(keepalive=0.02) as this:
        reader, writer = await asyncio.open_connection("127.0.0.1", this.port)
        assert await reader.read()
        writer.close()


async def test_a_peer_that_answers_pings_is_kept() -> None:
    async with rig() as this:
        call = this.call("hang")
        await this.begun.wait()
        for _ in range(3):
            this.look()
            this.look()
            await this.heard()
        this.look()
        this.go_on.set()
        assert await call.read() == b"done"


async def test_a_peer_that_speaks_something_else_is_cut_off() -> None:
    async with rig() as this:
        reader, writer = await asyncio.open_connection("127.0.0.1", this.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert len(await reader.read()) > 0  # our settings and a farewell, then the end
        writer.close()


# --- calls that are answered without a task ----------------------------------------------------------------


async def test_a_call_may_be_answered_by_its_first_message_or_be_left_to_its_handler() -> None:
    def early(call: Call, message: bytes) -> bool:
        if message == b"now":
            call.answer(b"early " + message)
            return True
        return False

    async with rig() as this:
        this.server.early = {"/t/echo": early}
        for message, reply in ((b"now", b"early now"), (b"later", b"later"), (b"now", b"early now")):
            call = this.call("echo")
            await call.write(message)
            assert await call.read() == reply
            await call.done_writing()
            assert await call.code() is grpc.StatusCode.OK
        assert not [each for connection in this.server.connections for each in connection.calls]


async def test_a_call_that_ends_before_its_first_message_is_the_handlers_or_nobodys() -> None:
    async with rig() as this:
        this.server.early = {"/t/echo": lambda call, message: False, "/t/hang": lambda call, message: False}
        call = this.call("echo")
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK
        given_up = this.call("hang")
        await given_up.wait_for_connection()
        async with asyncio.timeout(60):
            while not any(connection.calls for connection in this.server.connections):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            given_up.cancel()
            while any(connection.calls for connection in this.server.connections):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert this.ended == []
