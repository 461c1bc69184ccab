"""The simulated vLLM pod: `Engine` behind the HTTP API of vLLM 0.32, many pods in one process.

Owns routes, requests in flight, faults and listening sockets. Engines and their time belong to `pod_rank`, bytes come
from `pod_request` and `pod_response`, KV events leave through `pod_publisher`. One process is one event loop; a pod
does nothing while nobody asks it anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import heapq
import itertools
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import parse_qs

import msgspec
import numpy as np
import zmq

from picker.errors import ConfigError, WireError, cannot_listen
from picker.sim import pod_request, pod_response, pod_speech, tokens
from picker.sim.adapters import AdapterSlots
from picker.sim.engine import Engine, EngineRequest, FinishedRequest, FinishReason, StepResult
from picker.sim.engine_hashes import BlockHasher
from picker.sim.lateness import Lateness
from picker.sim.pod_call import Call, Line
from picker.sim.pod_clock import PodClock
from picker.sim.pod_events import CacheEvents, Prompted, adapter_path
from picker.sim.pod_http import Connection, Headers, HttpRequest, Refusal, Reply
from picker.sim.pod_metrics import CONTENT_TYPE, PodMetrics
from picker.sim.pod_options import EventFault, FaultChange, MetricsFault, PodOptions
from picker.sim.pod_publisher import EventPublisher
from picker.sim.pod_rank import Rank, metrics_page
from picker.sim.pod_request import Ask, FromHeaders, Serving
from picker.sim.pod_response import Answer, Wording
from picker.sim.pod_tokenizer import PodTokenizer
from picker.types import CallKind

VERSION = "0.32.0"
_BACKLOG = 2048
_GENERATE = {"/v1/chat/completions": pod_request.parse_chat, "/v1/completions": pod_request.parse_completion}
_SCALE_OUT = ("/v1/chat/completions/render", "/v1/completions/render", "/inference/v1/generate")
_MAX_SOCKETS = 65_535  # as many as ZeroMQ allows; its default of 1,023 is 511 pods


class Pod:
    """One pod. `handle` is given every parsed request; everything else is driven by `clock`.

    tokenizer: instead of four bytes to a token. context: for the sockets of its KV events; None: it publishes none.
    """

    def __init__(
        self,
        options: PodOptions,
        index: int,
        clock: PodClock,
        *,
        tokenizer: PodTokenizer | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.options = options
        self.profile = options.resolve()
        self.clock = clock
        self.fault = options.fault
        self._down = False
        self.url = ""  # set by `listen`
        self._connections: set[Connection] = set()
        self._index = index
        self._serving = Serving(
            (options.model, *options.aliases), options.loras, self.profile.max_model_len, options.ranks, tokenizer
        )
        self._ids = itertools.count(1)
        self._publishers = list(self._make_publishers(context)) if context is not None else []
        self._ranks: list[Rank] = []
        self._routes = self._make_routes()
        self._paths = {path for _, path in self._routes}
        self._boot()

    def _boot(self) -> None:
        """A fresh process: empty cache, counters at zero, nothing in flight."""
        for rank in self._ranks:
            rank.die()
        self.started_at = time.time()
        self._ranks = [self._make_rank(number) for number in range(self.options.ranks)]
        self._turns = itertools.cycle(self._ranks)
        self._rank_of: dict[int, Rank] = {}
        self._lines: dict[int, Line] = {}
        self._streams: dict[int, Line] = {}
        self._dirty: dict[Call, None] = {}  # in order
        self._entering: list[float] = []  # heap: when requests in the front end reach the engine
        self._unfinished = 0
        self._calls: set[Call] = set()

    def _make_rank(self, number: int) -> Rank:
        options = self.options
        slots = AdapterSlots(options.max_loras, load_s=options.lora_load_s) if options.loras else None
        own = [number] if number else []
        engine = Engine(
            self.profile,
            name="-".join(map(str, ("pod", self._index, *own))),
            policy=options.policy,
            adapters=slots,
            noise=np.random.default_rng([options.seed, self._index, *own]) if options.noise else None,
            started_at=self.started_at,
        )
        engine.slow_down(self.fault.slowdown)
        metrics = PodMetrics(engine, options.model, self.started_at)
        if not self._publishers or options.events is None:
            return Rank(engine, metrics, self.clock, self)
        hasher, whole = BlockHasher(options.events.algorithm), options.events.whole_hashes
        events = CacheEvents(self.profile.block_size, hasher, adapters=options.loras, whole_hashes=whole)
        return Rank(engine, metrics, self.clock, self, events=events, publisher=self._publishers[number])

    def _make_publishers(self, context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[EventPublisher]:
        options, ranks = self.options.events, self.options.ranks
        if options is None:
            return
        base = options.port + self._index * ranks * (2 if options.replay else 1)
        for number in range(ranks):
            ports = (base + number, base + ranks + number) if options.port else (0, 0)
            yield EventPublisher(context, options, number, host=self.options.host, ports=ports)

    @property
    def engine(self) -> Engine:
        """The first rank's, and where there are no others the only one."""
        return self._ranks[0].engine

    @property
    def engines(self) -> tuple[Engine, ...]:
        """By data-parallel rank."""
        return tuple(rank.engine for rank in self._ranks)

    @property
    def metrics(self) -> PodMetrics:
        """The first rank's, which count what has no rank."""
        return self._ranks[0].metrics

    @property
    def publishers(self) -> tuple[EventPublisher, ...]:
        """By data-parallel rank; empty where no KV events are published."""
        return tuple(self._publishers)

    @property
    def in_flight(self) -> int:
        """Generate requests that have not been answered to their end."""
        return len(self._calls)

    @property
    def up(self) -> bool:
        """False between the death and the return that `restart` was asked for."""
        return not self._down

    # --- requests ---------------------------------------------------------------------------------------------

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answer a request, at once or later. Never raises for what a client can send."""
        self.clock.catch_up()
        route = self._routes.get((request.method, request.path))
        if route is None:
            known = request.path in self._paths
            status, detail = (405, "Method Not Allowed") if known else (404, "Not Found")
            reply.send(status, msgspec.json.encode({"detail": detail}))
            return
        try:
            route(request, reply)
        except WireError as error:
            self.metrics.answered(request.path, request.method, error.status, 0.0)
            reply.send(error.status, pod_response.error_body(error))

    def _make_routes(self) -> dict[tuple[str, str], Callable[[HttpRequest, Reply], None]]:
        routes: dict[tuple[str, str], Callable[[HttpRequest, Reply], None]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): lambda _, reply: reply.send(200, msgspec.json.encode({"version": VERSION})),
            ("GET", "/load"): self._server_load,
            ("GET", "/metrics"): self._metrics_page,
            ("GET", "/v1/models"): self._models,
            ("GET", "/kv_event_sources"): self._event_sources,
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
            ("POST", "/tokenize"): lambda r, reply: reply.send(200, pod_request.tokenize(r.body, self._serving)),
            ("POST", "/detokenize"): lambda r, reply: reply.send(200, pod_request.detokenize(r.body, self._serving)),
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake_up,
            ("GET", "/is_sleeping"): self._is_sleeping,
            ("GET", "/_sim/fault"): self._show_fault,
            ("POST", "/_sim/fault"): self._change_fault,
            ("GET", "/_sim/clock"): self._show_clock,
            ("DELETE", "/_sim/clock"): self._forget_lateness,
        }
        return routes | {("POST", path): self._scale_out for path in _SCALE_OUT}

    def _health(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(200, b"", "text/plain; charset=utf-8")

    def _server_load(self, request: HttpRequest, reply: Reply) -> None:
        load = len(self._calls) if self.options.track_server_load else 0
        reply.send(200, msgspec.json.encode({"server_load": load}))

    def _metrics_page(self, request: HttpRequest, reply: Reply) -> None:
        match self.fault.metrics:
            case MetricsFault.NONE:
                page = metrics_page([rank.metrics for rank in self._ranks], time.time())
                reply.send(200, page, CONTENT_TYPE)
            case MetricsFault.REFUSE:
                reply.reset()
            case MetricsFault.HTML:
                reply.send(200, b"<html><body><h1>502 Bad Gateway</h1></body></html>", "text/html")

    def _models(self, request: HttpRequest, reply: Reply) -> None:
        first = self.options.model
        bases = ((name, first, None, self.profile.max_model_len) for name in self._serving.models)
        adapters = ((name, adapter_path(name), first, None) for name in self._serving.adapters)
        data = [_model(*entry) for entry in (*bases, *adapters)]
        reply.send(200, msgspec.json.encode({"object": "list", "data": data}))

    def _reset_prefix_cache(self, request: HttpRequest, reply: Reply) -> None:
        reset = [rank.reset_prefix_cache() for rank in self._ranks]
        reply.send(200, msgspec.json.encode({"success": all(reset)}))

    def _sleep(self, request: HttpRequest, reply: Reply) -> None:
        """Level 1 and 2 give the cache back. Requests, new ones too, stand still until it wakes, as with mode=keep."""
        level = parse_qs(request.query).get("level", ["1"])[0]
        if level not in ("0", "1", "2"):
            raise WireError(f"level: {level!r} is not 0, 1 or 2", status=400, kind="BadRequestError")
        for rank in self._ranks:
            rank.metrics.sleep_level = int(level)
            if level != "0":
                rank.reset_prefix_cache()
        reply.send(200, msgspec.json.encode({"status": "sleeping", "level": int(level)}))

    def _wake_up(self, request: HttpRequest, reply: Reply) -> None:
        slept = self.hung
        for rank in self._ranks:
            rank.metrics.sleep_level = None
        if slept and not self.hung:
            self._resume()
        tags = parse_qs(request.query).get("tags")
        reply.send(200, msgspec.json.encode({"status": "awake", "tags": tags}))

    def _is_sleeping(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(200, msgspec.json.encode({"is_sleeping": self.metrics.sleep_level is not None}))

    def _event_sources(self, request: HttpRequest, reply: Reply) -> None:
        sources = {str(number): publisher.source for number, publisher in enumerate(self._publishers)}
        reply.send(200, msgspec.json.encode(sources))

    def _show_clock(self, request: HttpRequest, reply: Reply) -> None:
        """How late all pods of the process have been, in virtual seconds, since anybody asked to forget it."""
        late = self.clock.lateness.read()
        told = {**dataclasses.asdict(late), "distorted": late.distorted, "time_scale": self.clock.scale}
        reply.send(200, msgspec.json.encode(told))

    def _forget_lateness(self, request: HttpRequest, reply: Reply) -> None:
        self.clock.lateness.reset()
        reply.send(200, b"{}")

    def _scale_out(self, request: HttpRequest, reply: Reply) -> None:
        if not self.options.scale_out:
            raise WireError(
                "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.",
                status=403,
                kind="PermissionDeniedError",
            )
        path = request.path.removesuffix("/render")
        if path not in _GENERATE:
            raise WireError("token-in-token-out generation is not simulated", status=501, kind="NotImplementedError")
        ask = self._parse(request)
        reply.send(200, pod_request.rendered(ask, self._serving, ask.id or secrets.token_hex(8)))

    # --- generating -------------------------------------------------------------------------------------------

    def _generate(self, request: HttpRequest, reply: Reply) -> None:
        if self.fault.reset:
            reply.reset()
            return
        if self.fault.error_status is not None:
            raise WireError("injected fault", status=self.fault.error_status, kind="InternalServerError")
        ask = self._parse(request)
        answers = self._plan(ask)
        limit = self.options.max_queued
        if limit is not None and self._unfinished + len(answers) > limit:
            self.metrics.rejections += 1
            raise WireError(
                "The engine is currently busy and cannot accept new requests. "
                "Please try again later or on a different instance.",
                status=503,
                kind="Service Unavailable",
            )
        name = ask.id or secrets.token_hex(8)
        wording = Wording(ask, name=name, created=int(time.time()), details=self.options.prompt_tokens_details)
        self._admit(Call(ask, answers, reply, wording, self.clock.now), request)

    def _parse(self, request: HttpRequest) -> Ask:
        content_type = request.header(b"content-type") or ""
        if content_type.split(";")[0].strip().lower() != "application/json":
            raise WireError(
                "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed", kind="Bad Request"
            )
        rank = request.header(b"x-data-parallel-rank") or ""
        pinned = int(rank) if rank.isdecimal() else None
        if pinned is not None and pinned >= self.options.ranks:
            raise WireError(f"data_parallel_rank {rank} is out of range [0, {self.options.ranks}).")
        named, session = request.header(b"x-request-id"), request.header(b"x-session-id")
        priority = _integer(request.header(b"x-vllm-priority"))
        parse = _GENERATE[request.path.removesuffix("/render")]
        return parse(request.body, self._serving, FromHeaders(named, priority, pinned, session))

    def _plan(self, ask: Ask) -> list[Answer]:
        tokenizer, limit = self._serving.tokenizer, self.profile.max_model_len
        return pod_response.plan(ask, limit) if tokenizer is None else pod_speech.plan(ask, limit, tokenizer)

    def _admit(self, call: Call, request: HttpRequest) -> None:
        """Let the front end work on a request; then it reaches the engine."""
        self._calls.add(call)
        self._unfinished += len(call.answers)
        call.reply.on_gone = functools.partial(self._client_gone, call)
        call.report_format = request.header(b"endpoint-load-metrics-format")
        due = call.arrived_at + self.profile.front_end(sum(len(prompt) for prompt in call.ask.prompts))
        heapq.heappush(self._entering, due)
        ranks = self._ranks
        self.clock.at(due, lambda: self._enter(call, ranks))

    def _enter(self, call: Call, ranks: list[Rank]) -> None:
        if ranks is not self._ranks:
            return
        heapq.heappop(self._entering)
        if call.reply.done:
            return
        if call.ask.stream:
            call.reply.start()
        for rank in {self._add(call, answer): None for answer in call.answers}:
            rank.wake()

    def _add(self, call: Call, answer: Answer) -> Rank:
        """Queue one answer at a rank: the one asked for, else the next in turn."""
        ask = call.ask
        rank = next(self._turns) if ask.rank is None else self._ranks[ask.rank]
        whole = np.concatenate([answer.prompt, pod_speech.said(answer, ask.choices)])
        seed = tokens.namespace(self.options.model, ask.adapter, ask.salt)
        request = EngineRequest(
            id=next(self._ids),
            prompt_tokens=len(answer.prompt),
            output_tokens=answer.tokens,
            block_hashes=tokens.block_hashes(whole, self.profile.block_size, seed),
            arrived_at=call.arrived_at,
            priority=ask.priority,
            lora=ask.adapter,
            ends_with=FinishReason(answer.reason),
        )
        line = pod_speech.line(call, answer, self.options.stream_interval)
        self._lines[request.id] = line
        self._rank_of[request.id] = rank
        if ask.stream:
            self._streams[request.id] = line
        call.ids.append(request.id)
        rank.add(request, Prompted(whole, ask.adapter, ask.salt, ask.session))
        return rank

    def _client_gone(self, call: Call) -> None:
        self._forget(call)
        for number in call.ids:
            if self._lines.pop(number, None) is not None:
                self._streams.pop(number, None)
                self._rank_of.pop(number).abort(number)

    def _forget(self, call: Call) -> None:
        self._calls.discard(call)
        self._unfinished -= len(call.answers) - len(call.records)

    # --- what ranks ask -----------------------------------------------------------------------------------------

    @property
    def hung(self) -> bool:
        return self.fault.hang or self.metrics.sleep_level is not None

    @property
    def next_arrival(self) -> float | None:
        return self._entering[0] if self._entering else None

    def deliver(self, result: StepResult) -> None:
        if not self._dirty:
            self.clock.afterwards(self._flush)
        ended = {record.id: record for record in result.finished}
        if self._streams:
            for ids, count in ((result.decoding, result.steps), (result.first_tokens, 1), (result.resumed, 1)):
                for number in ids:
                    if (line := self._streams.get(number)) is not None:
                        line.say(count, ends=number in ended)
                        self._dirty[line.call] = None
        for number, record in ended.items():
            if (line := self._lines.pop(number, None)) is not None:
                self._end_line(line, number, record)

    def _end_line(self, line: Line, number: int, record: FinishedRequest) -> None:
        call = line.call
        self._streams.pop(number, None)
        self._unfinished -= 1
        call.records[line.answer.index] = record
        metrics = self._rank_of.pop(number).metrics
        metrics.finished(record, max_tokens=call.ask.max_tokens, choices=call.ask.choices)
        if call.complete:
            self._dirty[call] = None

    def _flush(self) -> None:
        """Write what the last steps said, one write for each request, and end the requests that are complete."""
        dirty, self._dirty = self._dirty, {}
        for call in dirty:
            if call.complete:
                self._end_call(call)
            else:
                call.write()

    def _end_call(self, call: Call) -> None:
        self._forget(call)
        path = "/v1/chat/completions" if call.ask.kind is CallKind.CHAT else "/v1/completions"
        self.metrics.answered(path, "POST", 200, self.clock.now - call.arrived_at)
        if call.ask.stream:
            call.end_stream()
        else:
            body = call.wording.complete(call.answers, call.usage())
            call.reply.send(200, body, headers=self._load_report(call.report_format))

    def _load_report(self, wanted: str | None) -> Headers:
        """vLLM's ORCA report, on answers that are not streamed."""
        gauges = self.engine.gauges
        waiting, usage = f"{gauges.waiting:.1f}", f"{gauges.kv_usage}"
        match wanted:
            case "TEXT":
                report = f"named_metrics.num_requests_waiting={waiting}, named_metrics.kv_cache_usage_perc={usage}"
            case "JSON":
                report = f'{{"named_metrics": {{"num_requests_waiting": {waiting}, "kv_cache_usage_perc": {usage}}}}}'
            case _:
                return ()
        return (("endpoint-load-metrics", f"{wanted} {report}"),)

    # --- faults -----------------------------------------------------------------------------------------------

    def _show_fault(self, request: HttpRequest, reply: Reply) -> None:
        shown = msgspec.to_builtins(self.fault)
        if self._publishers:
            shown["events"] = msgspec.to_builtins(self._publishers[0].fault)
        reply.send(200, msgspec.json.encode(shown))

    def _change_fault(self, request: HttpRequest, reply: Reply) -> None:
        hung = self.hung
        try:
            change = msgspec.json.decode(request.body or b"{}", type=FaultChange)
            fault, of_events = change.applied_to(self.fault), self._event_faults(change)
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
            raise WireError(f"fault: {error}") from None
        self.fault = fault
        for rank in self._ranks:
            rank.engine.slow_down(fault.slowdown)
        for publisher, wrong in zip(self._publishers, of_events, strict=False):
            publisher.misbehave(wrong)
        if hung and not self.hung:
            self._resume()
        self._show_fault(request, reply)
        if change.restart or change.down_s:
            self.restart(down_s=change.down_s, spare=reply.connection)

    def _event_faults(self, change: FaultChange) -> list[EventFault]:
        """By rank; none where they stay as they are."""
        if change.events is None:
            return []
        if not self._publishers:
            raise ConfigError("events: this pod publishes no KV events")
        return [change.events.applied_to(publisher.fault) for publisher in self._publishers]

    def restart(self, *, down_s: float = 0.0, spare: Connection | None = None) -> None:
        """Die, resetting all connections but `spare`, and come back empty after `down_s` virtual seconds.

        While it is down, connections are accepted by the system and reset at once.
        """
        for call in self._calls:
            call.reply.on_gone = None
        self.disconnect(spare)
        for publisher in self._publishers:
            publisher.restart()
        self._down = down_s > 0
        if self._down:
            self._boot()
            self.clock.at(self.clock.now + down_s, self._revive)
        else:
            self._revive()

    def _revive(self) -> None:
        self._down = False
        self._boot()
        for publisher in self._publishers:
            publisher.reopen()

    def _resume(self) -> None:
        """After a hang: time went on, the engine did not."""
        for rank in self._ranks:
            rank.resume()
        self._flush()

    # --- sockets ----------------------------------------------------------------------------------------------

    async def listen(self, port: int) -> asyncio.Server:
        """Serve on `port`, 0 for a free one. Raises ConfigError when it cannot be had."""
        host = self.options.host
        try:
            server = await asyncio.get_running_loop().create_server(self._connect, host or None, port, backlog=_BACKLOG)
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        bound = server.sockets[0].getsockname()[1]
        address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        self.url = f"http://{address}"
        try:
            for publisher in self._publishers:
                publisher.open(address=address, model=self.options.model)
        except ConfigError:
            server.close()
            raise
        return server

    def close(self) -> None:
        """Reset every client's connection and close the event sockets."""
        self.disconnect()
        for publisher in self._publishers:
            publisher.close()

    def disconnect(self, spare: Connection | None = None) -> None:
        """Reset every client's connection but `spare`."""
        for connection in tuple(self._connections):
            if connection is not spare:
                connection.reset()

    def _connect(self) -> asyncio.Protocol:
        return Refusal() if self._down else Connection(self.handle, self._connections)


@contextlib.asynccontextmanager
async def open_pods(options: PodOptions, clock: PodClock | None = None) -> AsyncIterator[list[Pod]]:
    """Pods that serve until the end of the block. Raises ConfigError when a port is taken or a tokenizer unusable.

    clock: instead of one that runs `time_scale` times as fast as the wall's.
    """
    tokenizer = PodTokenizer.load(options.tokenizer) if options.tokenizer else None
    clock = clock or PodClock(options.time_scale)
    context = _event_context() if options.events else None
    pods = [Pod(options, index, clock, tokenizer=tokenizer, context=context) for index in range(options.count)]
    servers: list[asyncio.Server] = []
    try:
        for index, pod in enumerate(pods):
            servers.append(await pod.listen(options.port + index if options.port else 0))
        yield pods
    finally:
        clock.stop()
        for server in servers:
            server.close()
        for pod in pods:
            pod.close()
        if context is not None:
            context.term()
        for server in servers:
            await server.wait_closed()


@contextlib.asynccontextmanager
async def running_pods(count: int, **options: Any) -> AsyncIterator[list[str]]:
    """Base URLs of `count` pods on free ports; for tests. options: fields of PodOptions."""
    async with open_pods(PodOptions(count=count, **options)) as pods:
        yield [pod.url for pod in pods]


async def serve_pods(options: PodOptions, *, stop: asyncio.Event, on_ready: Callable[[list[str]], None]) -> Lateness:
    """Serve until `stop` is set. on_ready is told the base URLs once all pods listen. Returns how late they were."""
    async with open_pods(options) as pods:
        on_ready([pod.url for pod in pods])
        await stop.wait()
        return pods[0].clock.lateness.read()


async def run(options: PodOptions, on_ready: Callable[[list[str]], None] = lambda urls: None) -> Lateness:
    """Serve until SIGINT or SIGTERM: what `picker sim` runs. Returns how late the pods were."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        return await serve_pods(options, stop=stop, on_ready=on_ready)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _event_context() -> zmq.Context[zmq.Socket[bytes]]:
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
    return context


def _model(name: str, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    created = int(time.time())
    permission = {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    about = {"id": name, "object": "model", "created": created, "owned_by": "vllm", "root": root, "parent": parent}
    return {**about, "max_model_len": max_model_len, "permission": [permission]}


def _integer(text: str | None) -> int | None:
    """A header's number; vLLM ignores what is none."""
    try:
        return int(text) if text else None
    except ValueError:
        return None
