"""Picker's own gRPC API, for gateways that are not Envoy: `Pick`, `Report` and `WatchEndpoints`.

Owns its calls and how long they may take. A pick is an `Exchange` up to its verdict, so that it is what the ext-proc
service would have said; from then on `Picks` answers for its end. What messages mean is `wire.api`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from picker.errors import WireError
from picker.exchange import Action, Decided, Exchange, Forward, Phase, Respond, Submit
from picker.frontends.api_keys import KEYLESS, KeyedHeaderBlocks, refuse
from picker.frontends.api_picks import FullError, Picks, Predict
from picker.frontends.api_watch import Board, Watch
from picker.frontends.grpc_server import Call as Conversation
from picker.frontends.grpc_server import Code, GrpcServer, Handler
from picker.frontends.health import Health
from picker.gate import UndecidedError
from picker.runtime import Runtime
from picker.types import Call, FailureReason, Rejection, Rewritten
from picker.wire import api
from picker.wire.header_blocks import HeaderBlocks
from picker.wire.model_span import Edit

log = logging.getLogger("picker.api")

_SWEEP = 1.0
_BEYOND_THE_QUEUE = 5.0  # seconds that a decision may take beside waiting in the queue
_STALLED = 60.0  # seconds that a watcher may take nothing
_MOST_WATCHERS = 100


class _ApiHealth(Health):
    """Answers for the API's name, too."""

    def _status(self, name: str) -> int:
        return super()._status("" if name == api.SERVICE else name)


class Api:
    """Serves the API until told to stop; one object, one port, one `serve`.

    predict: seconds that a request takes, for picks of which nobody tells. block_bytes: of the prefix index. key: when
    set, callers must show it. decision: seconds that a pick may take, and a question to arrive. max_message_bytes: of
    one gRPC message. stalled: seconds that a watcher may take nothing. most_picks: open at a time.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        predict: Predict,
        block_bytes: int,
        key: str | None = None,
        decision: float = 60.0 + _BEYOND_THE_QUEUE,
        max_message_bytes: int = 64 * 1024 * 1024,
        stalled: float = _STALLED,
        most_picks: int = 100_000,
    ) -> None:
        self.picks = Picks(runtime, predict, most=most_picks)
        self._runtime = runtime
        self._block_bytes = block_bytes
        self._key = key
        self._decision = decision
        self._max_message_bytes = max_message_bytes
        self._stalled = stalled
        self._board = Board(runtime)
        self._watchers = 0
        self._health = _ApiHealth()
        self._stopping = False
        self.server: GrpcServer | None = None

    async def serve(
        self,
        listener: socket.socket,
        stop: asyncio.Event,
        *,
        tls: ssl.SSLContext | None = None,
        grace: float = 30.0,
    ) -> None:
        """Serve a listening socket until `stop` is set, then let picks be reported for `grace` seconds.

        While draining, calls are still taken: picks are refused by the runtime, reports are heard.
        """
        async with asyncio.TaskGroup() as tasks:
            handlers = {**self._handlers(), **self._health.handlers}
            server = self.server = GrpcServer(
                handlers, tasks, max_message_bytes=self._max_message_bytes, headers=self._header_blocks
            )
            async with self._sweeping(tasks), _stopping(server):
                await server.serve(listener, tls=tls)
                self._health.set_serving(True)
                try:
                    await stop.wait()
                    self._health.set_serving(False)
                    server.part()
                    await self.picks.drained(grace)
                finally:
                    self._stopping = True

    def _handlers(self) -> dict[str, Handler]:
        handlers: dict[str, Handler] = {
            api.PICK: self._supervised(self._pick),
            api.REPORT: self._supervised(self._report),
            api.WATCH: self._supervised(self._watch),
        }
        return handlers if self._key is None else {**handlers, KEYLESS: refuse}

    def _header_blocks(self) -> HeaderBlocks:
        return HeaderBlocks() if self._key is None else KeyedHeaderBlocks(self._key, self._health.handlers)

    def _supervised(self, handler: Callable[[Conversation], Awaitable[None]]) -> Handler:
        """A handler whose failures end its call with a status that says whose they are."""

        async def serve(call: Conversation) -> None:
            try:
                await handler(call)
            except WireError as error:
                call.end(Code.INVALID_ARGUMENT, error.message)
            except UndecidedError as error:
                call.end(Code.UNAVAILABLE, str(error))
            except FullError:
                call.end(Code.RESOURCE_EXHAUSTED, "too many picks or watchers are open")
            except TimeoutError:
                call.end(Code.DEADLINE_EXCEEDED, "it took too long")
            except asyncio.CancelledError:
                if self._stopping:
                    call.end(Code.UNAVAILABLE, "shutting down")
                raise
            except Exception:
                # Supervision: a bug of ours ends one call, and is counted.
                self._runtime.telemetry.internal_error("api")
                raise

        return serve

    async def _question(self, call: Conversation) -> bytes:
        async with asyncio.timeout(self._decision):
            message = await call.read()
        if message is None:
            raise WireError("no request")
        return message

    # Pick

    async def _pick(self, call: Conversation) -> None:
        message = await self._question(call)
        limit = self._runtime.limits.max_body_bytes
        asked = api.asked(message, block_bytes=self._block_bytes, most_bytes=limit)
        self.picks.check_room()
        exchange = self._runtime.open()
        try:
            async with asyncio.timeout(self._decision):
                verdict, rejection = await self._verdict(exchange, asked)
        finally:
            # Whatever ended the wait, a decision that nobody will hear of is taken back.
            if exchange.phase is not Phase.UPSTREAM:
                self._runtime.close(exchange)
        if isinstance(verdict, Respond):
            await call.write(api.refused(verdict, rejection))
            return
        pick_id = self.picks.add(verdict.decision, asked.reporter, self._runtime.clock())
        try:
            await call.write(api.picked(pick_id, verdict, asked.explain))
        except BaseException:
            self.picks.take_back(pick_id)
            raise

    async def _verdict(self, exchange: Exchange, asked: api.Asked) -> tuple[Forward | Respond, Rejection | None]:
        """What is to become of a request, and why it is refused if picker refuses it."""
        actions: list[Action] = []
        for event in asked.events:
            actions = exchange.receive(event)
            if actions:
                break
        [action] = actions
        if not isinstance(action, Submit):
            assert isinstance(action, Respond)
            return action, None
        call = action.call
        if asked.call is not None:
            call = self._rewritten(_completed(asked.call, action.call), action.headers)
        submit = msgspec.structs.replace(action, call=call, exclude=asked.exclude)
        outcome = await self._runtime.decide(exchange.id, submit)
        [action] = exchange.receive(Decided(outcome))
        assert isinstance(action, Forward | Respond)
        changed = asked.call is not None and call.model != asked.call.model
        if isinstance(action, Forward) and changed:
            action = msgspec.structs.replace(action, edit=Edit(0, 0, b"", call.model or ""))
        return action, outcome if isinstance(outcome, Rejection) else None

    def _rewritten(self, call: Call, headers: Mapping[str, str]) -> Call:
        """What features are for, where somebody says which models are served; an exchange does so with bodies."""
        rewriting = self._runtime.limits.rewriting
        choice = None if rewriting is None else rewriting.choose(call.model, headers)
        if rewriting is None or choice is None:
            return call
        rewriting.count(call.model, choice)
        return msgspec.structs.replace(call, model=choice.model, rewritten=Rewritten(call.model, choice.by))

    # Report

    async def _report(self, call: Conversation) -> None:
        picks, reporter = self.picks, self.picks.nameless()
        heard = unknown = 0
        picks.joined(reporter)
        try:
            while (message := await call.read()) is not None:
                pick_id, told = api.told(message)
                if isinstance(told, api.Hello):
                    picks.joined(told.reporter)
                    picks.left(reporter)
                    reporter = told.reporter
                    continue
                heard += 1
                unknown += not picks.hear(pick_id, told, reporter)
            await call.write(api.summary(heard, unknown))
        finally:
            picks.left(reporter)

    # WatchEndpoints

    async def _watch(self, call: Conversation) -> None:
        interval = api.interval(await self._question(call))
        if self._watchers >= _MOST_WATCHERS:
            raise FullError
        self._watchers += 1
        try:
            await self._tell(call, Watch(self._board), interval)
        finally:
            self._watchers -= 1

    async def _tell(self, call: Conversation, watch: Watch, interval: float) -> None:
        """Send updates until the call is cancelled. While one is on its way no other is made."""
        while True:
            update = watch.update()
            if update is not None:
                async with asyncio.timeout(self._stalled):
                    await call.write(update)
            await watch.news(interval)

    # what takes too long

    @contextlib.asynccontextmanager
    async def _sweeping(self, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
        sweeper = tasks.create_task(self._sweep_forever())
        try:
            yield
        finally:
            sweeper.cancel()
            self.picks.close(FailureReason.SHUTDOWN)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            self.picks.sweep(self._runtime.clock())


def _completed(features: Call, headers: Call) -> Call:
    """What features say of a request, and its headers where those do: the session, and the objective's priority."""
    return msgspec.structs.replace(
        features, session=features.session or headers.session, priority=headers.priority or features.priority
    )


@contextlib.asynccontextmanager
async def _stopping(server: GrpcServer) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await server.stop(None)
