"""A client's connection: uvicorn's protocol, with limits on what may come and news of when it ends.

Decides what of a head is refused, and when; knows nothing of requests beyond their heads.
"""

from __future__ import annotations

import asyncio
import heapq
import http
import urllib.parse
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from picker.frontends.client import Client
from picker.frontends.limits import CROWDED, LONG_HEAD, LONG_TARGET, NOT_HTTP, SLOW_HEAD, Door, Refusal
from picker.wire import openai

EXTENSION = "picker"  # scope["extensions"][EXTENSION]["client"] is the request's `Client`
_MAKE_ROOM = 64  # idle connections that are closed together when there are too many
_PARTING_SECONDS = 1.0  # for a client to read why its connection ends
# Of targets that have been taken apart: most requests go to a few.
_TARGETS: dict[bytes, tuple[str, bytes, bytes]] = {}
_MOST_TARGETS = 256
_SHORT_TARGET = 128


class ClientConnection(HttpToolsProtocol):
    """uvicorn's connection, which also tells a request when its client leaves.

    It declines offers to change the protocol as RFC 9110 section 7.8 wants it: by serving the request as it is. The
    parser underneath drops the body of such a request; Java's HttpClient makes the offer with every request.
    """

    cycle: Client
    pipeline: deque[tuple[Client, Any]]  # type: ignore[assignment]
    door = Door()
    leave: Callable[[], None] | None = None
    lost = False
    _idle_since: float | None = None
    _declining = False
    _in_head = True
    _head_bytes = 0  # of a head that has not ended, without what is being read
    _arrived = 0  # bytes being read
    _slow: asyncio.TimerHandle | None = None  # while a head is late
    _verdict = NOT_HTTP  # of what the parser will not go on with
    _deaf = False  # nothing more is read

    # what the transport and the parser call

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # From the start, not only after a response: else a client that never finishes a head is never closed.
        self._idle_since = self.loop.time()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.door.limits.idle_timeout, self.timeout_keep_alive_handler
        )
        self.door.open += 1
        if self.door.open > self.door.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return None
        self._arrived = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._go_on(data[offer.args[0] :])
        except httptools.HttpParserError:
            return self._refuse(self._verdict)
        if not self._in_head:
            self._head_bytes = 0
            if self._slow is not None:
                self._slow.cancel()
                self._slow = None
            if self.cycle is not None and not self.cycle.response_complete:  # else these are blank lines
                self._idle_since = None
            return None
        self._head_bytes += len(data)
        if self._head_bytes > self.door.limits.max_head_bytes:
            return self._refuse(LONG_TARGET if len(self.url) > self.door.limits.max_target_bytes else LONG_HEAD)
        if self._slow is None:
            self._idle_since = None
            self._slow = self.loop.call_later(self.door.limits.head_timeout, self._refuse, SLOW_HEAD)
        return None

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection for what has come on it; what was asked before is answered first."""
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        self.door.refused[refusal.reason] += 1
        running = self.cycle is not None and not self.cycle.response_complete
        if running and not self.cycle.more_body:
            self.cycle.keep_alive = False  # the answer to it ends the connection
            return
        if running and self.cycle.response_started:
            self.transport.close()
            return
        if running:  # its body will not come; uvicorn is to expect no answer of the application's
            self.cycle.disconnected = True
            self.cycle.set()
        body = openai.error_body(refusal.status, refusal.message)
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (_refusal_head(refusal.status), len(body), body))
        if refusal is CROWDED:
            self.transport.close()
        else:
            self._part()

    def _part(self) -> None:
        """Close once the client has had time to read: what still arrives at a closed socket resets it, and the client
        drops what it has not read.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._idle_since = None
        self.loop.call_later(_PARTING_SECONDS, self.transport.close)

    def _make_room(self) -> None:
        """Close those who have been idle for longest, or be the one that there is no room for."""
        others = (each for each in self.connections if isinstance(each, ClientConnection) and each is not self)
        idle = [(each._idle_since, each) for each in others if each._idle_since is not None]
        for _, each in heapq.nsmallest(_MAKE_ROOM, idle, key=lambda pair: pair[0]):
            self.door.refused["idle"] += 1
            each.transport.abort()
        if not idle:
            self._refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost = True
        self.door.open -= 1
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        self._unset_keepalive_if_required()
        leave, self.leave = self.leave, None
        if leave is not None:
            leave()
        self.pipeline.clear()
        if self.cycle is not None:
            self.part_with(self.cycle)

    def part_with(self, client: Client) -> None:
        """Once both have ended, they refer to each other no more."""
        if self.lost and client is self.cycle and client.task is None:
            self.cycle = None  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        """What uvicorn does here, but for a timer a request: one goes on ringing and looks whether it is time."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()

    def timeout_keep_alive_handler(self) -> None:
        if self._idle_since is None:
            rest = self.door.limits.idle_timeout
        else:
            rest = self._idle_since + self.door.limits.idle_timeout - self.loop.time()
        if rest > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: it may not say what only a head may (RFC 9110 section 6.5.1)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        verdict = self.door.judge(method, version, self.url, self.headers)
        if verdict is None and self._head_bytes + self._arrived > self.door.limits.max_head_bytes:
            verdict = self.door.weigh(self.url, self.headers)  # it may have come together with its body
        if verdict is not None:
            self._verdict = verdict
            raise ValueError(verdict.reason)  # it ends the parsing
        self._declining = self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)
        if not self._declining:
            self._begin(method, version)

    def _begin(self, method: bytes, version: str) -> None:
        """A request's head is here: have it answered, or wait its turn."""
        path, raw_path, query = _TARGETS.get(self.url) or _split(self.url)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method.decode("ascii"),
            "root_path": "",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": {},
        }
        before = self.cycle
        client = Client(
            self,
            scope,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            expects_100=self.expect_100_continue,
        )
        scope["extensions"] = {EXTENSION: {"client": client}}
        self.cycle = client
        if before is None or before.response_complete:
            self._start_asgi_task(client, self.app)
        else:  # sent without waiting for the answer to the one before
            self.flow.pause_reading()
            self.pipeline.appendleft((client, self.app))

    def _start_asgi_task(self, cycle: Client, app: Any) -> None:  # type: ignore[override]
        cycle.task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(cycle.task)

    def on_body(self, body: bytes) -> None:
        client = self.cycle
        if not client.response_complete:
            client.add(body)

    def on_message_complete(self) -> None:
        client = self.cycle
        if not self._declining and not client.response_complete:
            client.more_body = False
            client.set()

    def _go_on(self, rest: bytes) -> None:
        """Parse on after a request that offered another protocol, from its head without the offer."""
        lines = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                lines += (name, b": ", value, b"\r\n")
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join((*lines, b"\r\n", rest)))


def _split(target: bytes) -> tuple[str, bytes, bytes]:
    """Path, path as it came, and query of a request's target; raises httptools' error for what is none."""
    parsed = httptools.parse_url(target)
    raw_path = parsed.path
    path = raw_path.decode("ascii")
    found = urllib.parse.unquote(path) if "%" in path else path, raw_path, parsed.query or b""
    if len(target) <= _SHORT_TARGET:
        if len(_TARGETS) >= _MOST_TARGETS:
            _TARGETS.clear()
        _TARGETS[target] = found
    return found


def _refusal_head(status: int) -> bytes:
    """All of a refusal's head but its length."""
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()
    return line + b"content-type: application/json\r\nconnection: close\r\n"
