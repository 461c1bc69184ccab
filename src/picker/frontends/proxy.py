"""The standalone reverse proxy: an ASGI app that turns HTTP into an exchange's events and its actions into HTTP.

Owns what happens on the client's side of one request: reading it, passing the reply on chunk by chunk with
back-pressure, noticing that the client has left, breaking off what cannot be completed. It forwards every path and
method and keeps no routes of its own; what is decided, retried or reported is `Exchange`'s and `Runtime`'s business.
Must be served by `serving.serve`, whose connections say when a client leaves.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from typing import Any

from picker.exchange import (
    Action,
    Cut,
    Exchange,
    Forward,
    Headers,
    PassBody,
    PassHead,
    Phase,
    RequestBody,
    RequestHead,
    Respond,
    ResponseBody,
    ResponseHead,
    UpstreamFailed,
)
from picker.frontends.headers import client_headers, upstream_headers
from picker.frontends.leash import Leash
from picker.frontends.serving import EXTENSION, Client, serve
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.runtime import Runtime
from picker.types import FailureReason
from picker.wire import openai

log = logging.getLogger("picker.frontends.proxy")

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

# A response that is sent before the request has been read would be lost if the connection closed at once: data that
# arrives at a closed socket makes the kernel reset it, and the client drops what it has not read. So the rest of the
# request is read and thrown away for a while (nginx's lingering_timeout and lingering_time).
_LINGER_PAUSE = 5.0
_LINGER_TOTAL = 30.0


class Proxy:
    """Forwards every request to the endpoint that the runtime picks.

    connect_timeout, first_byte_timeout, idle_timeout: seconds an endpoint has to accept a connection, to send its
    response head, and between two chunks of a response; a client has `idle_timeout` to send and to take its next
    bytes. first_byte_timeout bounds a whole non-streaming generation. api_key: when set, every request must carry it
    as bearer token; it is passed on, so that endpoints may ask for the same key. grace: seconds that running requests
    get when the proxy stops.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        connect_timeout: float = 2.0,
        first_byte_timeout: float = 600.0,
        idle_timeout: float = 300.0,
        api_key: str | None = None,
        grace: float = 30.0,
    ) -> None:
        self.runtime = runtime
        self.first_byte_timeout = first_byte_timeout
        self.idle_timeout = idle_timeout
        self._connect_timeout = connect_timeout
        self._bearer = None if api_key is None else f"bearer {api_key}".encode()
        self._grace = grace
        self._upstream: Upstream | None = None

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve on a bound socket (see `serving.listen`) until `stop` is set and running requests have ended."""
        self._upstream = Upstream(connect_timeout=self._connect_timeout)
        try:
            await serve(self, listener, stop, grace=self._grace)
        finally:
            await self._upstream.close()
            self._upstream = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._upstream is not None, "the proxy has to be served by `serve`"
        await _Passage(self, self._upstream, scope, receive).run()

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether the request carries the key; takes the same time whatever part of it is wrong."""
        if self._bearer is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(f"{scheme.lower()} {key.strip()}".encode(), self._bearer)


class _ClientLeftError(Exception):
    """The client has gone; nothing more can be sent."""


class _Passage:
    """One request on its way through."""

    __slots__ = (
        "client",
        "exchange",
        "headers",
        "leash",
        "proxy",
        "receive",
        "reply",
        "runtime",
        "scope",
        "started",
        "unread",
        "upstream",
    )

    def __init__(self, proxy: Proxy, upstream: Upstream, scope: Scope, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.proxy = proxy
        self.runtime = proxy.runtime
        self.upstream = upstream
        self.scope = scope
        self.receive = receive
        self.client: Client = scope["extensions"][EXTENSION]["client"]
        self.leash = Leash(task, asyncio.get_running_loop())
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.exchange: Exchange = proxy.runtime.open()
        self.reply: Reply | None = None
        self.started = False  # the response head has been sent
        self.unread = False  # the client may still be sending its body

    async def run(self) -> None:
        reason = FailureReason.CLIENT_GONE
        try:
            await self._supervise()
        except _ClientLeftError:
            pass
        except asyncio.CancelledError:
            # Either the leash, or the server at the end of its grace. The task ends here in both cases, and ends
            # well: uvicorn logs a cancelled request as an error of the application.
            reason = self.leash.reason or FailureReason.SHUTDOWN
            self.client.cut_off()
        finally:
            self.leash.release()
            if self.reply is not None:
                self.reply.close()
            self.runtime.close(self.exchange, reason)

    async def _supervise(self) -> None:
        try:
            await self._converse()
        except _ClientLeftError:
            raise
        except Exception:
            # Supervision: one request's bug must not be felt by another.
            log.exception("request %d failed inside the proxy", self.exchange.id)
            self.runtime.telemetry.internal_error("proxy")
            self.runtime.close(self.exchange, FailureReason.SHUTDOWN)  # ours: neither endpoint nor client is to blame
            if self.started:
                self.client.cut_off()
            else:
                await self._respond(_error(500, "The gateway failed on this request."))

    async def _converse(self) -> None:
        length = self.headers.get("content-length", "0")
        self.unread = length != "0" or "transfer-encoding" in self.headers
        action = self._refusal() or await self._admit()
        while isinstance(action, Forward):
            outcome = await self._forward(action)
            if isinstance(outcome, Reply):
                self.reply = outcome
                return await self._hand_on(outcome)
            action = _only(await self.runtime.receive(self.exchange, UpstreamFailed(outcome)))
        assert isinstance(action, Respond)
        return await self._respond(action)

    # the request

    def _refusal(self) -> Respond | None:
        """The answer to what never becomes an exchange."""
        if not self.proxy.admits(self.headers):
            return _error(401, "This gateway wants its API key as a bearer token.", (("www-authenticate", "Bearer"),))
        if "sec-websocket-key" in self.headers:
            return _error(501, "This gateway does not carry WebSocket connections.")
        if not self.scope["raw_path"].startswith(b"/"):
            return _error(400, "The request target must be a path; `*` means no endpoint in particular.")
        return None

    async def _admit(self) -> Action:
        """Read the request to its end, or to where it is refused."""
        exchange, unread = self.exchange, self.unread
        if not unread:
            self.client.watch(self.leash.pull)
        head = RequestHead(self.scope["method"], self.scope["path"], self.headers, end=not unread)
        actions = await self.runtime.receive(exchange, head)
        while not actions:
            data, more = await self._read_request(self.proxy.idle_timeout)
            if not more:
                self.client.watch(self.leash.pull)
                self.leash.within(math.inf, FailureReason.CLIENT_GONE)  # the scheduler's queue has deadlines of its own
            actions = await self.runtime.receive(exchange, RequestBody(data, end=not more))
        return _only(actions)

    async def _read_request(self, seconds: float) -> tuple[bytes, bool]:
        """The next bytes of the body, and whether more will come."""
        if self.client.has_sent_all:
            self.unread = False
            return self.client.take(), False
        self.leash.within(seconds, FailureReason.CLIENT_GONE)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeftError
        self.unread = message.get("more_body", False)
        return message.get("body", b""), self.unread

    # the endpoint

    async def _forward(self, forward: Forward) -> Reply | FailureReason:
        scope = self.scope
        peer, query = scope["client"], scope["query_string"]
        target = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
        headers = upstream_headers(
            scope["headers"], forward.set_headers, client=peer and peer[0], scheme=scope["scheme"]
        )
        body = None if forward.bodyless else forward.body
        self.leash.within(self.proxy.first_byte_timeout, FailureReason.TIMEOUT)
        try:
            return await self.upstream.send(forward.decision.endpoint, scope["method"], target, headers, body)
        except asyncio.CancelledError:
            return self._overdue()

    def _overdue(self) -> FailureReason:
        """In the handler of a cancelled wait for an endpoint: `TIMEOUT` when that is why, else raises it again."""
        if self.leash.reason is not FailureReason.TIMEOUT:
            raise
        self.leash.slacken()
        return FailureReason.TIMEOUT

    # the response

    async def _hand_on(self, reply: Reply) -> None:
        self._act(ResponseHead(reply.status, reply.headers, reply.ended))
        while self.exchange.phase is not Phase.DONE:
            if not self.client.has_room:
                # A slow client slows its endpoint down, not our memory.
                self.leash.within(self.proxy.idle_timeout, FailureReason.CLIENT_GONE)
                await self.client.drain()
            if not reply.waiting:
                self.client.flush()
            self.leash.within(self.proxy.idle_timeout, FailureReason.TIMEOUT)
            try:
                failure = await reply.pour(self._pass_on)
            except asyncio.CancelledError:
                failure = self._overdue()
            if failure is not None:
                self._act(UpstreamFailed(failure))

    def _pass_on(self, data: bytes, ended: bool) -> bool:
        self._act(ResponseBody(data, ended))
        self.leash.within(self.proxy.idle_timeout, FailureReason.TIMEOUT)
        return not ended and self.client.has_room

    def _act(self, event: ResponseHead | ResponseBody | UpstreamFailed) -> None:
        """Tell what came of a response, and do what follows."""
        for action in self.runtime.follow(self.exchange, event):
            match action:
                case PassBody(data, end):
                    self.client.write(data, end=end)
                case PassHead(added, end):
                    self._pass_head(added, end)
                case Cut():
                    self.client.cut_off()
                case _:
                    raise AssertionError(f"{type(action).__name__} during a response")

    def _pass_head(self, added: Headers, end: bool) -> None:
        reply = self.reply
        assert reply is not None
        self.started = True
        self.client.start(reply.status, client_headers(reply.raw_headers, added, status=reply.status))
        if end:
            self.client.write(b"", end=True)

    async def _respond(self, answer: Respond) -> None:
        """Answer by ourselves; a request that was not read to its end also ends its connection."""
        fields = (*answer.headers, ("content-length", str(len(answer.body))), ("date", formatdate(usegmt=True)))
        headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in fields]
        self.leash.within(self.proxy.idle_timeout, FailureReason.CLIENT_GONE)
        self.started = True
        self.client.start(answer.status, headers, close=self.unread)
        self.client.write(answer.body, end=False)
        await self._linger()
        self.client.write(b"", end=True)

    async def _linger(self) -> None:
        now = asyncio.get_running_loop().time
        give_up_at = now() + _LINGER_TOTAL
        while self.unread and now() < give_up_at:
            await self._read_request(_LINGER_PAUSE)


def _only(actions: list[Action]) -> Action:
    (action,) = actions
    return action


def _error(status: int, message: str, headers: Headers = ()) -> Respond:
    return Respond(status, (("content-type", "application/json"), *headers), openai.error_body(status, message))
