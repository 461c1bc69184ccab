"""The simulated vLLM pod: `Engine` behind the HTTP API of vLLM 0.32, many pods in one process.

Owns routes, requests in flight, faults and listening sockets. Time comes from `PodClock`, bytes from `pod_request` and
`pod_response`. One process is one event loop; a pod does nothing while nobody asks it anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import itertools
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np

from picker.errors import ConfigError, WireError
from picker.sim import pod_request, pod_response, tokens
from picker.sim.adapters import AdapterSlots
from picker.sim.engine import Engine, EngineRequest, FinishedRequest, FinishReason, StepResult
from picker.sim.pod_call import Call, Line
from picker.sim.pod_clock import PodClock
from picker.sim.pod_http import Connection, Headers, HttpRequest, Refusal, Reply
from picker.sim.pod_metrics import CONTENT_TYPE, PodMetrics
from picker.sim.pod_options import FaultChange, MetricsFault, PodOptions
from picker.sim.pod_request import Ask, Serving
from picker.sim.pod_response import Answer, Wording
from picker.types import CallKind

VERSION = "0.32.0"
_BACKLOG = 2048
_GENERATE = {"/v1/chat/completions": pod_request.parse_chat, "/v1/completions": pod_request.parse_completion}
_SCALE_OUT = ("/v1/chat/completions/render", "/v1/completions/render", "/inference/v1/generate")


class Pod:
    """One pod. `handle` is given every parsed request; everything else is driven by `clock`."""

    def __init__(self, options: PodOptions, index: int, clock: PodClock) -> None:
        self.options = options
        self.profile = options.resolve()
        self.clock = clock
        self.fault = options.fault
        self._down = False
        self.url = ""  # set by `listen`
        self._connections: set[Connection] = set()
        self._index = index
        self._serving = Serving((options.model, *options.aliases), options.loras, self.profile.max_model_len)
        self._ids = itertools.count(1)
        self._routes = self._make_routes()
        self._paths = {path for _, path in self._routes}
        self._boot()

    def _boot(self) -> None:
        """A fresh process: empty cache, counters at zero, nothing in flight."""
        options = self.options
        self.started_at = time.time()
        slots = AdapterSlots(options.max_loras, load_s=options.lora_load_s) if options.loras else None
        rng = np.random.default_rng([options.seed, self._index]) if options.noise else None
        self.engine = Engine(
            self.profile,
            name=f"pod-{self._index}",
            policy=options.policy,
            adapters=slots,
            noise=rng,
            started_at=self.started_at,
        )
        self.engine.slow_down(self.fault.slowdown)
        self.metrics = PodMetrics(self.engine, options.model, self.started_at)
        self._lines: dict[int, Line] = {}
        self._streams: dict[int, Line] = {}
        self._dirty: dict[Call, None] = {}  # in order
        self._entering: list[float] = []  # heap: when requests in the front end reach the engine
        self._unfinished = 0
        self._calls: set[Call] = set()
        self._stepping = False
        self._held: StepResult | None = None

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
            ("GET", "/kv_event_sources"): lambda _, reply: reply.send(200, b"{}"),
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
            ("POST", "/tokenize"): lambda r, reply: reply.send(200, pod_request.tokenize(r.body, self._serving)),
            ("POST", "/detokenize"): lambda r, reply: reply.send(200, pod_request.detokenize(r.body, self._serving)),
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("GET", "/_sim/fault"): self._show_fault,
            ("POST", "/_sim/fault"): self._change_fault,
        }
        return routes | {("POST", path): _scale_out_disabled for path in _SCALE_OUT}

    def _health(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(200, b"", "text/plain; charset=utf-8")

    def _server_load(self, request: HttpRequest, reply: Reply) -> None:
        load = len(self._calls) if self.options.track_server_load else 0
        reply.send(200, msgspec.json.encode({"server_load": load}))

    def _metrics_page(self, request: HttpRequest, reply: Reply) -> None:
        match self.fault.metrics:
            case MetricsFault.NONE:
                reply.send(200, self.metrics.render(time.time()), CONTENT_TYPE)
            case MetricsFault.REFUSE:
                reply.reset()
            case MetricsFault.HTML:
                reply.send(200, b"<html><body><h1>502 Bad Gateway</h1></body></html>", "text/html")

    def _models(self, request: HttpRequest, reply: Reply) -> None:
        first = self.options.model
        bases = ((name, first, None, self.profile.max_model_len) for name in self._serving.models)
        adapters = ((name, f"/adapters/{name}", first, None) for name in self._serving.adapters)
        data = [_model(*entry) for entry in (*bases, *adapters)]
        reply.send(200, msgspec.json.encode({"object": "list", "data": data}))

    def _reset_prefix_cache(self, request: HttpRequest, reply: Reply) -> None:
        reply.send(200, msgspec.json.encode({"success": self.engine.reset_prefix_cache()}))

    # --- generating -------------------------------------------------------------------------------------------

    def _generate(self, request: HttpRequest, reply: Reply) -> None:
        if self.fault.reset:
            reply.reset()
            return
        if self.fault.error_status is not None:
            raise WireError("injected fault", status=self.fault.error_status, kind="InternalServerError")
        ask = self._parse(request)
        answers = pod_response.plan(ask, self.profile.max_model_len)
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
        if rank.isdecimal() and int(rank) != 0:
            raise WireError(f"data_parallel_rank {rank} is out of range [0, 1).")
        named, priority = request.header(b"x-request-id"), request.header(b"x-vllm-priority")
        return _GENERATE[request.path](request.body, self._serving, named=named, priority=_integer(priority))

    def _admit(self, call: Call, request: HttpRequest) -> None:
        """Let the front end work on a request; then it reaches the engine."""
        self._calls.add(call)
        self._unfinished += len(call.answers)
        call.reply.on_gone = functools.partial(self._client_gone, call)
        call.report_format = request.header(b"endpoint-load-metrics-format")
        due = call.arrived_at + self.profile.front_end(sum(len(prompt) for prompt in call.ask.prompts))
        heapq.heappush(self._entering, due)
        engine = self.engine
        self.clock.at(due, lambda: self._enter(call, engine))

    def _enter(self, call: Call, engine: Engine) -> None:
        if engine is not self.engine:
            return
        heapq.heappop(self._entering)
        if call.reply.done:
            return
        if call.ask.stream:
            call.reply.start()
        for answer in call.answers:
            self._add(call, answer)
        if not self._stepping:
            self._step(self.clock.now)

    def _add(self, call: Call, answer: Answer) -> None:
        ask = call.ask
        said = np.frombuffer(answer.text, dtype="<u4") if len(answer.text) % 4 == 0 else answer.prompt[:0]
        whole = np.concatenate([answer.prompt, said])
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
        line = Line(call, answer)
        self._lines[request.id] = line
        if ask.stream:
            self._streams[request.id] = line
        call.ids.append(request.id)
        self.engine.add(request, self.clock.now)

    def _client_gone(self, call: Call) -> None:
        self._forget(call)
        now = self.clock.now
        for number in call.ids:
            if self._lines.pop(number, None) is not None:
                self._streams.pop(number, None)
                self.engine.abort(number, now)

    def _forget(self, call: Call) -> None:
        self._calls.discard(call)
        self._unfinished -= len(call.answers) - len(call.records)

    # --- the engine's time ------------------------------------------------------------------------------------

    def _step(self, now: float) -> None:
        """Begin the next engine step, or several where the loop is behind and nobody can have come in between."""
        self._stepping = False
        if self.fault.hang:
            return
        horizon = min([self.clock.known_until, *self._entering[:1]])
        result = self.engine.step(now, horizon)
        if result is None:
            return
        self._stepping = True
        engine = self.engine
        self.clock.at(now + result.duration, lambda: self._step_ended(result, engine))

    def _step_ended(self, result: StepResult, engine: Engine) -> None:
        if engine is not self.engine:
            return
        if self.fault.hang:
            self._held = result
            return
        self._deliver(result)
        self._step(self.clock.now)

    def _deliver(self, result: StepResult) -> None:
        self.metrics.step(result)
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
        self.metrics.finished(record, max_tokens=call.ask.max_tokens, choices=call.ask.choices)
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
        reply.send(200, msgspec.json.encode(self.fault))

    def _change_fault(self, request: HttpRequest, reply: Reply) -> None:
        hung = self.fault.hang
        try:
            change = msgspec.json.decode(request.body or b"{}", type=FaultChange)
            self.fault = change.applied_to(self.fault)
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
            raise WireError(f"fault: {error}") from None
        self.engine.slow_down(self.fault.slowdown)
        if hung and not self.fault.hang:
            self._resume()
        self._show_fault(request, reply)
        if change.restart or change.down_s:
            self.restart(down_s=change.down_s, spare=reply.connection)

    def restart(self, *, down_s: float = 0.0, spare: Connection | None = None) -> None:
        """Die, resetting all connections but `spare`, and come back empty after `down_s` virtual seconds.

        While it is down, connections are accepted by the system and reset at once.
        """
        for call in self._calls:
            call.reply.on_gone = None
        self.disconnect(spare)
        self._boot()
        if down_s > 0:
            self._down = True
            self.clock.at(self.clock.now + down_s, self._revive)

    def _revive(self) -> None:
        self._down = False
        self._boot()

    def _resume(self) -> None:
        """After a hang: time went on, the engine did not."""
        held, self._held = self._held, None
        if held is not None:
            self._deliver(held)
        if held is not None or not self._stepping:
            self._step(self.clock.now)
        self._flush()

    # --- sockets ----------------------------------------------------------------------------------------------

    async def listen(self, port: int) -> asyncio.Server:
        """Serve on `port`, 0 for a free one. Raises ConfigError when it cannot be had."""
        host = self.options.host
        try:
            server = await asyncio.get_running_loop().create_server(self._connect, host or None, port, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        bound = server.sockets[0].getsockname()[1]
        self.url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        return server

    def disconnect(self, spare: Connection | None = None) -> None:
        """Reset every client's connection but `spare`."""
        for connection in tuple(self._connections):
            if connection is not spare:
                connection.reset()

    def _connect(self) -> asyncio.Protocol:
        return Refusal() if self._down else Connection(self.handle, self._connections)


@contextlib.asynccontextmanager
async def open_pods(options: PodOptions, clock: PodClock | None = None) -> AsyncIterator[list[Pod]]:
    """Pods that serve until the end of the block. Raises ConfigError when a port is taken.

    clock: instead of one that runs `time_scale` times as fast as the wall's.
    """
    clock = clock or PodClock(options.time_scale)
    pods = [Pod(options, index, clock) for index in range(options.count)]
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
            pod.disconnect()
        for server in servers:
            await server.wait_closed()


@contextlib.asynccontextmanager
async def running_pods(count: int, **options: Any) -> AsyncIterator[list[str]]:
    """Base URLs of `count` pods on free ports; for tests. options: fields of PodOptions."""
    async with open_pods(PodOptions(count=count, **options)) as pods:
        yield [pod.url for pod in pods]


async def serve_pods(options: PodOptions, *, stop: asyncio.Event, on_ready: Callable[[list[str]], None]) -> None:
    """Serve until `stop` is set. on_ready is told the base URLs once all pods listen."""
    async with open_pods(options) as pods:
        on_ready([pod.url for pod in pods])
        await stop.wait()


async def run(options: PodOptions, on_ready: Callable[[list[str]], None] = lambda urls: None) -> None:
    """Serve until SIGINT or SIGTERM: what `picker sim` runs."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await serve_pods(options, stop=stop, on_ready=on_ready)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _scale_out_disabled(request: HttpRequest, reply: Reply) -> None:
    raise WireError(
        "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.",
        status=403,
        kind="PermissionDeniedError",
    )


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
