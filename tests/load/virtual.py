"""An event loop whose clock jumps to the next timer, and a server inside it that answers after exactly known delays.

What is measured against it has one true value, whatever the speed of the machine: no socket, no sleeping.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from load.fake_openai import DONE, chunk, usage

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Waits for nothing: time passes by being told to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """servers: port -> what makes the server's end of a connection; `create_connection` reaches only these."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9
        self.servers: dict[int, Callable[[], Server]] = {}

    def time(self) -> float:
        return self._jumping.now

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # type: ignore[override]
        server = self.servers[port]()
        protocol = factory()
        transport = _Pipe(self, server, protocol)
        server.client = transport
        protocol.connection_made(transport)
        return transport, protocol


class _Pipe(asyncio.Transport):
    """The client's end: what is written arrives at once."""

    def __init__(self, loop: VirtualLoop, server: Server, protocol: Any) -> None:
        super().__init__()
        self.loop = loop
        self.protocol = protocol
        self.open = True
        self._server = server

    def write(self, data: Any) -> None:
        self._server.received(bytes(data))

    def deliver(self, data: bytes) -> None:
        if self.open:
            self.protocol.data_received(data)

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self.open:
            self.open = False
            self.loop.call_soon(self.protocol.connection_lost, None)


@dataclass(slots=True)
class Script:
    """How a server answers. first: seconds from a request to its first token. gaps: seconds before each further one.

    cached: of the prompt's tokens. frozen: (from, until) on the loop's clock, when the server does nothing at all.
    """

    first: float = 0.1
    gaps: tuple[float, ...] = (0.02, 0.03, 0.05)
    cached: int = 6
    prompt: int = 10
    endpoint: str = "pod-1:8000"
    frozen: tuple[float, float] | None = None
    requests: list[Mapping[str, Any]] = field(default_factory=list)
    asked_at: list[float] = field(default_factory=list)

    def awake(self, moment: float) -> float:
        """When what is due at `moment` happens."""
        if self.frozen is not None and self.frozen[0] <= moment < self.frozen[1]:
            return self.frozen[1]
        return moment


class Server:
    """One connection's end; each piece of an answer is sent when it is due."""

    client: _Pipe

    def __init__(self, script: Script) -> None:
        self._script = script
        self._loop = cast(VirtualLoop, asyncio.get_running_loop())

    def received(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        script, now = self._script, self._loop.time()
        if head.startswith(b"GET"):
            self._loop.call_soon(self.client.deliver, _whole(b'{"data": [{"id": "virtual"}]}'))
            return
        script.requests.append(json.loads(body))
        script.asked_at.append(now)
        if script.requests[-1]["stream"]:
            self._stream(script, now)
        else:
            self._loop.call_at(script.awake(now + script.first + sum(script.gaps)), self.client.deliver, self._answer())

    def _stream(self, script: Script, now: float) -> None:
        headers = f"content-type: text/event-stream\r\nx-picker-endpoint: {script.endpoint}\r\n"
        head = f"HTTP/1.1 200 OK\r\n{headers}transfer-encoding: chunked\r\n\r\n".encode()
        # Timers of one instant fire in any order: what is due together is sent together.
        sent: dict[float, bytes] = {}
        due, data = script.awake(now + script.first), head + _part(chunk("", role="assistant") + chunk(" word"))
        for gap in (*script.gaps, 0.0):
            sent[due] = sent.get(due, b"") + data
            due, data = script.awake(due + gap), _part(chunk(" word"))
        tokens = 1 + len(script.gaps)
        sent[due] += _part(usage(script.prompt, tokens, script.cached) + DONE) + _part(b"")
        for moment, part in sent.items():
            self._loop.call_at(moment, self.client.deliver, part)

    def _answer(self) -> bytes:
        script = self._script
        counts = {"prompt_tokens": script.prompt, "completion_tokens": 1 + len(script.gaps)}
        details = {"prompt_tokens_details": {"cached_tokens": script.cached}}
        message = {"role": "assistant", "content": " word" * (1 + len(script.gaps))}
        return _whole(json.dumps({"choices": [{"message": message}], "usage": {**counts, **details}}).encode())


def _part(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def virtually(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run on a loop of its own; seconds pass at once."""
    loops: list[VirtualLoop] = []

    def made() -> VirtualLoop:
        loops.append(VirtualLoop())
        return loops[0]

    async def run() -> T:
        return await main(loops[0])

    with asyncio.Runner(loop_factory=made) as runner:
        return runner.run(run())
