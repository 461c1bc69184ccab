"""Runs uvicorn's HTTP protocol inside our own event loop: no signal handlers, no exit of its own, stopped by an event.

`uvicorn.Server` is left out: it takes over signals, ends the process when it cannot bind, and polls ten times a second.
Owns the listening socket and what the ASGI interface lacks towards a client's connection: to be told when the client
leaves without asking, and to break a response off so that its end is seen to be missing. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import http
import logging
import socket
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from picker.errors import ConfigError
from picker.frontends.limits import (
    CROWDED,
    LONG_HEAD,
    LONG_TARGET,
    NOT_HTTP,
    SLOW_HEAD,
    ConnectionLimits,
    Door,
    Refusal,
)
from picker.wire import openai

EXTENSION = "picker"  # scope["extensions"][EXTENSION]["client"] is the request's `Client`
_BACKLOG = 2048
_MAKE_ROOM = 64  # idle connections that are closed together when there are too many
_HANDSHAKE_SECONDS = 10.0
LAST_CALL_SECONDS = 0.2  # for the first request of a connection that was made just before the end
_PARTING_SECONDS = 1.0  # for a client to read why its connection ends
_KEEPALIVE_SECONDS = 120.0  # where no door says otherwise
_BODYLESS = frozenset((204, 304))
# Of targets that have been taken apart: most requests go to a few.
_TARGETS: dict[bytes, tuple[str, bytes, bytes]] = {}
_MOST_TARGETS = 256
_SHORT_TARGET = 128


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one (`port_of` tells which).

    host: a name or address; "" means every IPv4 address, "::" every address.
    Raises `ConfigError` when the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host or '*'}:{port}: {_why(error)}") from error


def _why(error: OSError) -> str:
    """In words for people: the library's own repeat the address, and do not say what to do."""
    if error.errno == errno.EADDRINUSE:
        return "another program listens there; take another port (0: a free one), or stop it"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    if error.errno == errno.EACCES:
        return "this user may not use that port; those from 1024 on are free to all"
    return error.strerror or str(error)


def port_of(listener: socket.socket) -> int:
    """The port a socket is bound to."""
    return int(listener.getsockname()[1])


async def serve(
    app: Any,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    grace: float | Callable[[], float],
    door: Door | None = None,
) -> None:
    """Serve an ASGI app on a bound socket until `stop` is set, then let running requests end within `grace` seconds.

    door: what is asked of connections, and TLS.

    What still runs after that is cancelled and its connection closed, as it is when this call is cancelled. The socket
    is closed on return. HTTP/1.1 only; a WebSocket handshake arrives as the plain HTTP request that it is.
    """
    config, state, asked = _config(app), ServerState(), door or _default_door()
    loop = asyncio.get_running_loop()

    def accept() -> ClientConnection:
        made = ClientConnection(config, state, {}, loop)
        made.door = asked
        return made

    tls: dict[str, Any] = {"ssl": asked.tls, "ssl_handshake_timeout": _HANDSHAKE_SECONDS} if asked.tls else {}
    server = await loop.create_server(accept, sock=listener, backlog=_BACKLOG, **tls)
    try:
        await stop.wait()
        await _shut(server, listener, state)
        await _end(state.tasks, grace() if callable(grace) else grace)
    finally:
        server.close()
        listener.close()
        for connection in list(state.connections):
            connection.transport.abort()


async def _shut(server: asyncio.Server, listener: socket.socket, state: ServerState) -> None:
    """Take no further connections, and close those that nobody uses.

    The kernel resets those that wait to be accepted when their socket closes: so none is let in any more, those that
    are in are accepted, and they have a moment to say what they have come for.
    """
    listener.listen(0)
    for _ in range(3):  # turns of the loop, which accept
        await asyncio.sleep(0)
    server.close()
    connections = cast("set[ClientConnection]", state.connections)
    new = [connection for connection in connections if connection.cycle is None]
    for connection in list(connections):
        if connection.cycle is not None:
            connection.shutdown()
    if new:
        await asyncio.sleep(LAST_CALL_SECONDS)
    for connection in new:
        connection.shutdown()


def _default_door() -> Door:
    usual = ConnectionLimits()
    patience = min(usual.head_timeout, _KEEPALIVE_SECONDS)
    return Door(ConnectionLimits(idle_timeout=_KEEPALIVE_SECONDS, head_timeout=patience))


def _config(app: Any) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=ClientConnection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,  # handlers are the application's business
        log_level="error",  # its warnings tell of odd clients: one line for each request that somebody makes up
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
    config.load()
    return config


async def _end(tasks: set[asyncio.Task[None]], grace: float) -> None:
    """Wait for tasks, cancel those that take longer than `grace`, and see them end."""
    if not tasks:
        return
    _, late = await asyncio.wait(set(tasks), timeout=grace)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)


def _refusal_head(status: int) -> bytes:
    """All of a refusal's head but its length."""
    line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n".encode()
    return line + b"content-type: application/json\r\nconnection: close\r\n"


class Client(RequestResponseCycle):
    """The client of one request: told of when it leaves, can be cut off, and takes a response with fewer steps.

    `start`, `write` and `flush` are what ASGI's `send` does, without its awaits, checks and separate writes of head
    and body; a request is answered by either. They take header fields as they are: names in lower case, no control
    characters, no `connection`, `transfer-encoding` nor wrong `content-length` among them.

    It is uvicorn's cycle too, which is the ASGI side of it; what few requests change of that is not set for each.
    """

    logger = access_logger = logging.getLogger("uvicorn.error")
    access_log = False
    default_headers: list[tuple[bytes, bytes]] = []  # noqa: RUF012 - nobody adds to it
    disconnected = False
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding: bool | None = None
    expected_content_length = 0
    _head = b""  # not sent yet
    _chunked = False
    _silent = False  # the response has no body, whatever its head says
    _news = False  # something has come that nobody has taken, or nothing more will come
    _told: asyncio.Event | None = None  # where somebody waits for that
    task: asyncio.Task[None] | None = None  # while the application answers

    def __init__(
        self, connection: ClientConnection, scope: dict[str, Any], *, keep_alive: bool, expects_100: bool
    ) -> None:
        self.scope = scope  # type: ignore[assignment]
        self.transport = connection.transport
        self.flow = connection.flow
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expects_100
        self._connection = connection
        self._pieces: list[bytes] = []  # of the body
        self._size = 0

    def on_response(self) -> None:
        """The response has gone out."""
        self._connection.on_response_complete()

    @property
    def has_sent_all(self) -> bool:
        """The request's body is here to its end."""
        return not self.more_body

    def take(self) -> bytes:
        """What has come of the request's body since the last time."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        self._news = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def add(self, data: bytes) -> None:
        """More of the request's body."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.set()

    @property
    def message_event(self) -> Client:  # type: ignore[override]
        """What uvicorn sets of an event, which is made only where somebody waits."""
        return self

    def set(self) -> None:
        """There is news."""
        self._news = True
        if self._told is not None:
            self._told.set()

    async def run_asgi(self, app: Any) -> None:
        """Have the application answer.

        Afterwards nothing leads back here: what refers to itself stays until Python looks for garbage, which with
        thousands of requests in it takes tens of milliseconds, in which everybody waits.
        """
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            self.logger.error("Exception in ASGI application\n", exc_info=error)
            await self._give_up()
        else:
            if not self.response_complete and not self.disconnected:
                self.logger.error("ASGI callable returned without completing response.")
                await self._give_up()
        finally:
            self.scope.pop("extensions", None)
            self._connection.tasks.discard(cast("asyncio.Task[None]", self.task))
            self.task = None
            self._connection.part_with(self)

    async def _give_up(self) -> None:
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    async def receive(self) -> Any:
        """As ASGI has it."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self._news:
                told = self._told = self._told or asyncio.Event()
                await told.wait()
            self._news, self._told = False, None
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self.take(), "more_body": self.more_body}

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]], *, close: bool = False) -> None:
        """Begin the response; its head goes out with the first `write`, or by `flush`. close: the connection ends."""
        self.response_started = True
        self.waiting_for_100_continue = False
        self.keep_alive = self.keep_alive and not close
        self._silent = self.scope["method"] == "HEAD" or status in _BODYLESS
        # To a client that knows no chunks, the end of the connection is the end of the body (RFC 9112 section 6.3).
        self._chunked = not self._silent and self.scope["http_version"] != "1.0"
        lines = []
        for field in headers:
            if field[0] == b"content-length":
                self._chunked = False
            lines.append(b": ".join(field))
        if not self.keep_alive:
            lines.append(b"connection: close")
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")
        self._head = (STATUS_LINE.get(status) or b"HTTP/1.1 %d \r\n" % status) + b"\r\n".join(lines)

    def write(self, data: bytes, *, end: bool) -> None:
        """The next bytes of the response's body; nothing happens when the client has gone. See `has_room`."""
        if self.disconnected:
            return
        head, self._head = self._head, b""
        if self._silent:
            data = head
        elif not self._chunked:
            data = head + data if head else data
        elif data:
            data = b"%b%x\r\n%b\r\n%b" % (head, len(data), data, b"0\r\n\r\n" if end else b"")
        else:
            data = head + b"0\r\n\r\n" if end else head
        if data:
            self.transport.write(data)
        if end:
            self.response_complete = True
            self.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()

    def pass_on(self, chunk: bytes) -> bool:
        """Send a chunk of the body as an endpoint has framed it; False: it has to be written."""
        if self._head or not self._chunked or self.disconnected or self._connection.flow.write_paused:
            return False
        self.transport.write(chunk)
        return True

    def flush(self) -> None:
        """Send the head if it has not gone out yet."""
        if self._head and not self.disconnected:
            head, self._head = self._head, b""
            self.transport.write(head)

    @property
    def has_room(self) -> bool:
        """Whether the client keeps up with what is written, or has gone; else wait in `drain`."""
        return not self._connection.flow.write_paused or self.disconnected

    async def drain(self) -> None:
        await self._connection.flow.drain()

    def watch(self, leave: Callable[[], None]) -> None:
        """Call `leave` when the connection is lost, also after the response, or at once when it has been lost already.

        To be called when the request has been read to its end; before, `receive()` tells. A task that waits in
        `receive()` would do the same, at the price of a task for every request.
        """
        if self._connection.lost:
            return leave()
        self._connection.leave = leave
        # uvicorn stops reading at 64 KiB of unread body, and a socket that is not read never reports its end.
        return self._connection.flow.resume_reading()

    def cut_off(self) -> None:
        """End the connection in the middle of a response, so that the client sees a truncated one.

        What was sent is still delivered, unless the client has stopped reading: then waiting would have no end.
        """
        self.flush()
        # Has uvicorn expect nothing more of the application. By itself it does so only for the latest of several
        # requests that were sent without waiting for answers, and would log the others' end as a fault.
        self.disconnected = True
        if self._connection.flow.write_paused:
            self._connection.transport.abort()
        else:
            self._connection.transport.close()


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
