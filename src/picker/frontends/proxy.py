"""The standalone reverse proxy: an ASGI app that turns HTTP into an exchange's events and its actions into HTTP.

Owns what happens on the client's side of one request: reading it, passing the reply on chunk by chunk with
back-pressure, noticing that the client has left, breaking off what cannot be completed. It forwards every path and
method and keeps no routes of its own; what is decided, retried or reported is `Exchange`'s and `Runtime`'s business.
Must be served by `serving.serve`, whose connections say when a client leaves.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from email.utils import formatdate
from typing import Any

from picker.access_log import RequestLog
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
    Submit,
    UpstreamFailed,
)
from picker.frontends import collector, loops
from picker.frontends.client import Client
from picker.frontends.client_connection import EXTENSION
from picker.frontends.headers import client_headers, upstream_headers
from picker.frontends.keys import Key, KeyRefusal, Keyring, named_key
from picker.frontends.leash import Leash, Watch
from picker.frontends.limits import Door
from picker.frontends.models import ModelsPage, asks_for_models, pool_page
from picker.frontends.request_ids import FIELD, NAME, RequestIds, told, told_in_body
from picker.frontends.serving import LAST_CALL_SECONDS, serve
from picker.frontends.trust import Trust
from picker.frontends.upstream import Upstream
from picker.frontends.upstream_connection import Reply
from picker.runtime import Runtime
from picker.types import Fact, FailureReason, HealthObserved
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
    bytes, and `body_timeout` for all of a body. first_byte_timeout bounds a whole non-streaming generation. keys: of
    which every request must carry one, as bearer token or in `x-api-key`; api_key: the only one, where that is all.
    trust: certificates and keys towards endpoints. door: what is asked of connections, and TLS. grace: seconds that
    running requests get when the proxy stops. journal: told of every request. stall_timeout: how long a response of an
    endpoint that cannot be reached any more may say nothing. merge_models: answer `GET /v1/models` for all endpoints
    together, instead of having one of them answer.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        connect_timeout: float = 2.0,
        first_byte_timeout: float = 600.0,
        idle_timeout: float = 300.0,
        body_timeout: float = 300.0,
        api_key: str | None = None,
        keys: Keyring | None = None,
        trust: Trust | None = None,
        door: Door | None = None,
        grace: float = 30.0,
        journal: RequestLog | None = None,
        stall_timeout: float = 10.0,
        merge_models: bool = False,
    ) -> None:
        self.runtime = runtime
        self.journal = journal
        self.first_byte_timeout = first_byte_timeout
        self.idle_timeout = idle_timeout
        self.body_timeout = body_timeout
        self.grace = grace
        self.keys = keys or Keyring([] if api_key is None else [named_key("default", api_key)])
        self.trust = trust or Trust()
        self.door = door
        self._connect_timeout = connect_timeout
        self._upstream: Upstream | None = None
        self.watch: Watch
        self.stall_timeout = stall_timeout
        self.request_ids = RequestIds()
        self.via = loops.Via()
        self._merge_models = merge_models
        self.models: ModelsPage | None = None
        self.passages: set[_Passage] = set()
        self.closing = asyncio.Event()  # no further connections
        self.leaving = False  # clients are to close their connections
        self._suspects: set[str] = set()

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve on a bound socket (see `serving.listen`) until `stop` is set and running requests have ended."""
        self._upstream = Upstream(connect_timeout=self._connect_timeout, trust=self.trust)
        self.watch = Watch(asyncio.get_running_loop())
        if self._merge_models:
            self.models = pool_page(self.runtime, self._upstream, self.trust, self.via)
        self.runtime.listen(self._observe)
        self.closing = asyncio.Event()
        try:
            with collector.seldom():
                async with asyncio.TaskGroup() as group:
                    follow = group.create_task(_set_with(stop, self.closing))
                    await serve(self, listener, self.closing, grace=lambda: self.grace, door=self.door)
                    follow.cancel()
        finally:
            self.watch.close()
            await self._upstream.close()
            self._upstream = None

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        assert self._upstream is not None, "the proxy has to be served by `serve`"
        return _Passage(self, self._upstream, scope, receive).run()

    def set_connect_timeout(self, seconds: float) -> None:
        """For connections to endpoints made from here on."""
        self._connect_timeout = seconds
        if self._upstream is not None:
            self._upstream.connect_timeout = seconds

    async def part(self, leaving: asyncio.Event, stop: asyncio.Event, delay: float) -> None:
        """Between being told to leave and leaving: serve, and have clients close their connections meanwhile.

        Then the port closes, and only when nobody can come any more is everything to stop.
        """
        await leaving.wait()
        self.leaving = self.runtime.leaving = True
        await asyncio.sleep(delay)
        self.closing.set()
        await asyncio.sleep(2.0 * LAST_CALL_SECONDS)
        stop.set()

    def _observe(self, fact: Fact) -> None:
        if isinstance(fact, HealthObserved) and not fact.healthy and fact.name not in self._suspects:
            self._suspects.add(fact.name)
            asyncio.get_running_loop().call_later(self.stall_timeout, self._look_at, fact.name)

    def _look_at(self, name: str) -> None:
        """Give up the silent responses of an endpoint that nobody reaches any more.

        An engine that is told to end closes its port at once, and leaves its open responses hanging for minutes.
        """
        self._suspects.discard(name)
        waiting = [passage for passage in self.passages if passage.at == name]
        if self._upstream is None or not waiting or self.runtime.answers(name):
            return
        for passage in waiting:
            passage.give_up(self.stall_timeout)
        self._suspects.add(name)
        asyncio.get_running_loop().call_later(self.stall_timeout / 4.0, self._look_at, name)


class _ClientLeftError(Exception):
    """The client has gone; nothing more can be sent."""


class _Passage:
    """One request on its way through."""

    __slots__ = (
        "at",
        "client",
        "exchange",
        "headers",
        "hung",
        "identified",
        "instead",
        "key",
        "leash",
        "overdue_at",
        "passes",
        "proxy",
        "receive",
        "reply",
        "request_id",
        "runtime",
        "scope",
        "started",
        "unread",
        "upstream",
    )

    def __init__(self, proxy: Proxy, upstream: Upstream, scope: Scope, receive: Receive) -> None:
        self.proxy = proxy
        self.runtime = proxy.runtime
        self.upstream = upstream
        self.scope = scope
        self.receive = receive
        self.client: Client = scope["extensions"][EXTENSION]["client"]
        assert self.client.task is not None
        self.leash = Leash(self.client.task, proxy.watch)
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.exchange: Exchange = proxy.runtime.open()
        # identified: by the client.
        self.request_id, self.identified = proxy.request_ids.of(self.headers, scope["headers"], self.exchange.id)
        self.reply: Reply | None = None
        self.key: Key | None = None  # that the request came with
        self.instead: Submit | Respond | None = None  # of a response that is of no use
        self.at = ""  # the name of the endpoint that is asked
        self.hung = False  # the endpoint that was given up in time gave no sign of life
        self.overdue_at = math.inf  # the response must begin before
        self.started = False  # the response head has been sent
        self.unread = False  # the client may still be sending its body

    async def run(self) -> None:
        reason = FailureReason.CLIENT_GONE
        if self.proxy.journal is not None:
            self._note(self.proxy.journal)
        self.proxy.passages.add(self)
        try:
            try:
                await self._converse()
            except _ClientLeftError:
                raise
            except Exception:
                # Supervision: one request's bug must not be felt by another.
                log.exception("request %d failed inside the proxy", self.exchange.id)
                await self._confess()
        except _ClientLeftError:
            pass
        except asyncio.CancelledError:
            # Either the leash, or the server at the end of its grace. The task ends here in both cases, and ends
            # well: uvicorn logs a cancelled request as an error of the application.
            reason = self.leash.reason or FailureReason.SHUTDOWN
            self.client.cut_off()
        finally:
            self.leash.release()
            self.proxy.passages.discard(self)
            if self.key is not None:
                self.proxy.keys.leave(self.key)
            if self.reply is not None:
                self.reply.close()
            self.runtime.close(self.exchange, reason)
            if self.proxy.journal is not None:
                self._note_end(self.proxy.journal)

    def _note(self, journal: RequestLog) -> None:
        scope, peer = self.scope, self.scope["client"]
        client = peer and peer[0]
        journal.begin(self.exchange.id, scope["method"], scope["path"], client=client, alias=self.request_id)

    def _note_end(self, journal: RequestLog) -> None:
        if self.key is not None:
            journal.keyed(self.exchange.id, self.key.name)
        journal.ended(self.exchange.id)

    async def _confess(self) -> None:
        """Something of ours is broken: neither endpoint nor client is to blame."""
        self.runtime.telemetry.internal_error("proxy")
        self.runtime.close(self.exchange, FailureReason.SHUTDOWN)
        if self.started:
            self.client.cut_off()
        else:
            await self._respond(self._error(500, "The gateway failed on this request."))

    async def _converse(self) -> None:
        length = self.headers.get("content-length", "0")
        self.unread = length != "0" or "transfer-encoding" in self.headers
        asks = self.scope["method"] == "GET"
        action: Action = self._refusal() or (await self._own_answer() if asks else None) or await self._admit()
        while isinstance(action, Forward):
            outcome = await self._forward(action)
            if not isinstance(outcome, Reply):
                action = _only(await self.runtime.receive(self.exchange, UpstreamFailed(outcome, self.hung)))
                continue
            self.reply = outcome
            del action  # and with it the request's body: a long response has no use for it
            instead = await self._hand_on(outcome)
            if instead is None:
                return None
            outcome.close()
            self.leash.within(math.inf, FailureReason.CLIENT_GONE)
            self.reply = self.instead = None
            action = instead if isinstance(instead, Respond) else _only(await self.runtime.ask(self.exchange, instead))
        assert isinstance(action, Respond)
        return await self._respond(action)

    # the request

    def _refusal(self) -> Respond | None:
        """The answer to what never becomes an exchange."""
        keys = self.proxy.keys
        if not keys.open and (refusal := self._show_key(keys)) is not None:
            return refusal
        if loops.NAME in self.headers and self.proxy.via.has_passed(self.scope["headers"]):
            return self._error(loops.STATUS, loops.MESSAGE)
        if "sec-websocket-key" in self.headers:
            return self._error(501, "This gateway does not carry WebSocket connections.")
        if not self.scope["raw_path"].startswith(b"/"):
            return self._error(400, "The request target must be a path; `*` means no endpoint in particular.")
        return None

    async def _own_answer(self) -> Respond | None:
        """The answer to what is asked of the pool as a whole."""
        models, path = self.proxy.models, self.scope["path"]
        if models is None or not asks_for_models(path):
            return None
        self.client.watch(self.leash.pull)
        return await models.answer(path, self.scope["headers"])

    def _show_key(self, keys: Keyring) -> Respond | None:
        """Note whose request this is; or the answer to a request without a key that will do."""
        key = keys.admit(self.scope["headers"])
        if isinstance(key, KeyRefusal):
            told = {401: (("www-authenticate", "Bearer"),), 429: (("retry-after", "1"),)}
            return self._error(key.status, key.message, told.get(key.status, ()))
        self.key = key
        limits, most = self.exchange.limits, keys.body_limit(key)
        if most is not None and most < limits.max_body_bytes:
            self.exchange.limits = replace(limits, max_body_bytes=most)
        return None

    async def _admit(self) -> Action:
        """Read the request to its end, or to where it is refused."""
        exchange, unread = self.exchange, self.unread
        if not unread:
            self.client.watch(self.leash.pull)
        head = RequestHead(self.scope["method"], self.scope["path"], self.headers, end=not unread, again=True)
        actions = self.runtime.follow(exchange, head)
        if not actions:
            actions = self._take_rest() if self.client.has_sent_all else await self._read_rest()
        action = _only(actions)
        return _only(await self.runtime.ask(exchange, action)) if isinstance(action, Submit) else action

    async def _read_rest(self) -> list[Action]:
        """Read the body as it comes."""
        began = self.runtime.clock()
        while not self.client.has_sent_all:
            try:
                seconds = min(self.proxy.idle_timeout, began + self.proxy.body_timeout - self.runtime.clock())
                data, more = await self._read_request(seconds, FailureReason.TIMEOUT)
            except asyncio.CancelledError:
                self._overdue()
                self.runtime.close(self.exchange)
                return [self._error(408, "The request took too long to arrive.")]
            if not more:
                return self._take_rest(data)
            if actions := self.runtime.follow(self.exchange, RequestBody(data)):
                return actions
        return self._take_rest()

    def _take_rest(self, data: bytes | None = None) -> list[Action]:
        """The end of the body is here. data: what has been taken of it."""
        self.unread = False
        self.client.watch(self.leash.pull)
        self.leash.within(math.inf, FailureReason.CLIENT_GONE)  # the scheduler's queue has deadlines of its own
        return self.runtime.follow(self.exchange, RequestBody(self.client.take() if data is None else data, end=True))

    async def _read_request(
        self, seconds: float, blame: FailureReason = FailureReason.CLIENT_GONE
    ) -> tuple[bytes, bool]:
        """The next bytes of the body, and whether more will come. blame: what the leash is pulled for in time."""
        if self.client.has_sent_all:
            self.unread = False
            return self.client.take(), False
        self.leash.within(seconds, blame)
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
        raw, added = self.proxy.trust.dress(forward.decision.endpoint.name, scope["headers"], forward.set_headers)
        headers = upstream_headers(raw, added, client=peer and peer[0], scheme=scope["scheme"])
        if not self.identified:
            if NAME in self.headers:
                headers = [field for field in headers if field[0] != FIELD]
            headers.append((FIELD, self.request_id.encode()))
        headers.append(self.proxy.via.mark)
        body = None if forward.bodyless else forward.body
        self.hung, self.at = False, forward.decision.endpoint.name
        self.overdue_at = self.runtime.clock() + self.proxy.first_byte_timeout
        soon = min(self.runtime.patience, self.proxy.first_byte_timeout)
        self.leash.within(soon, FailureReason.TIMEOUT, self._more_patience)
        try:
            return await self.upstream.send(forward.decision.endpoint, scope["method"], target, headers, body)
        except asyncio.CancelledError:
            return self._overdue()

    def give_up(self, seconds: float) -> None:
        """End the wait for an endpoint that has said nothing for so long."""
        if self.leash.silence(FailureReason.TIMEOUT) >= seconds:
            self.hung = True
            self.leash.pull(FailureReason.TIMEOUT)

    def _more_patience(self) -> float:
        """Seconds that the response may take to begin beyond those that nobody wonders about."""
        rest = self.overdue_at - self.runtime.clock()
        more = self.runtime.patience_with(self.exchange.id)
        self.hung = more <= 0.0 < rest
        return min(more, rest)

    def _overdue(self) -> FailureReason:
        """In the handler of a cancelled wait for an endpoint: `TIMEOUT` when that is why, else raises it again."""
        if self.leash.reason is not FailureReason.TIMEOUT:
            raise
        self.leash.slacken()
        return FailureReason.TIMEOUT

    # the response

    async def _hand_on(self, reply: Reply) -> Submit | Respond | None:
        """Pass a response on to its end; or, before any of it has been, what to do instead."""
        self._act(ResponseHead(reply.status, reply.headers, reply.ended))
        self.passes = self.exchange.passes
        while self.instead is None and self.exchange.phase is not Phase.DONE:
            if not self.client.has_room:
                # A slow client slows its endpoint down, not our memory.
                self.leash.within(self.proxy.idle_timeout, FailureReason.CLIENT_GONE)
                await self.client.drain()
            if not reply.waiting:
                self.client.flush()
            if self.started:  # else the time for the first byte goes on
                self.leash.within(self.proxy.idle_timeout, FailureReason.TIMEOUT)
            try:
                failure = await reply.pour(self._pass_on, self._pass_chunk)
            except asyncio.CancelledError:
                failure = self._overdue()
            if failure is not None:
                self._act(UpstreamFailed(failure, self.hung))
        return self.instead

    def _pass_on(self, data: bytes, ended: bool) -> bool:
        self._act(ResponseBody(data, ended))
        if self.started and not ended:
            self.leash.within(self.proxy.idle_timeout, FailureReason.TIMEOUT)
        return not ended and self.client.has_room and self.instead is None

    def _pass_chunk(self, chunk: bytes, begin: int, end: int) -> bool:
        """Most of a stream goes this way: a token in a chunk of its own, that nobody but the client has to hear of."""
        if not self.passes(chunk, begin, end) or not self.client.pass_on(chunk):
            return False
        self.leash.within(self.proxy.idle_timeout, FailureReason.TIMEOUT)
        return True

    def _act(self, event: ResponseHead | ResponseBody | UpstreamFailed) -> None:
        """Tell what came of a response, and do what follows."""
        for action in self.runtime.follow(self.exchange, event):
            match action:
                case PassBody(data, end):
                    self.client.write(data, end=end)
                case PassHead(added, end, resized):
                    self._pass_head(added, end, resized)
                case Cut():
                    self.client.cut_off()
                case Submit() | Respond():
                    self.instead = action
                case _:
                    raise AssertionError(f"{type(action).__name__} during a response")

    def _pass_head(self, added: Headers, end: bool, resized: bool) -> None:
        reply = self.reply
        assert reply is not None
        self.started = True
        added = (*added, *told(self.scope["path"], self.request_id))
        headers = client_headers(reply.raw_headers, added, status=reply.status)
        if resized:
            headers = [field for field in headers if field[0] != b"content-length"]
        self.client.start(reply.status, headers, close=self.proxy.leaving)
        if end:
            self.client.write(b"", end=True)

    async def _respond(self, answer: Respond) -> None:
        """Answer by ourselves; a request that was not read to its end also ends its connection."""
        path = self.scope["path"]
        content = told_in_body(path, self.request_id, answer.status, answer.body)
        fields = (*answer.headers, ("content-length", str(len(content))), ("date", formatdate(usegmt=True)))
        fields += told(path, self.request_id)
        headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in fields]
        self.leash.within(self.proxy.idle_timeout, FailureReason.CLIENT_GONE)
        self.started = True
        if self.proxy.journal is not None:
            self.proxy.journal.answered(self.exchange.id, answer.status)
        self.client.start(answer.status, headers, close=self.unread or self.proxy.leaving)
        self.client.write(content, end=False)
        await self._linger()
        self.client.write(b"", end=True)

    async def _linger(self) -> None:
        now = asyncio.get_running_loop().time
        give_up_at = now() + _LINGER_TOTAL
        while self.unread and now() < give_up_at:
            await self._read_request(_LINGER_PAUSE)

    def _error(self, status: int, message: str, headers: Headers = ()) -> Respond:
        body = openai.error_body_for(self.scope["path"], status, message)
        return Respond(status, (("content-type", "application/json"), *headers), body)


async def _set_with(first: asyncio.Event, second: asyncio.Event) -> None:
    await first.wait()
    second.set()


def _only(actions: list[Action]) -> Action:
    (action,) = actions
    return action
