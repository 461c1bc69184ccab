"""picker's ext-proc service behind a real Envoy, with real sockets on both sides."""

import asyncio
import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from dead_port import dead_port
from echo_upstream import EchoUpstream
from picker.envoy import (
    GATEWAY,
    PLAIN,
    Envoy,
    Json,
    Topology,
    bootstrap,
    find_envoy,
    running_envoy,
    subset_filter,
)
from picker.errors import ConfigError
from picker.exchange import Limits
from picker.frontends.certificates import Certificates
from picker.frontends.extproc import Bounds, ExtProc, Mode
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import (
    Decision,
    Endpoint,
    Fact,
    Failed,
    FailureReason,
    Finished,
    Outcome,
    Queued,
    Reading,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Usage,
)

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing), reason=missing)]

PROMPT = {"model": "m", "prompt": "Once upon a time"}


class FakeScheduler:
    """Sends requests where the test says and remembers what it is told."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.answer: Callable[[Request], Outcome | Queued] | None = None
        self.requests: list[Request] = []
        self.facts: list[Fact] = []
        self.notices: deque[str] = deque()
        self.told = asyncio.Condition()
        self.queued = asyncio.Event()

    def submit(self, request: Request, now: float, reading: Reading | None = None) -> Outcome | Queued:
        self.requests.append(request)
        outcome = self.answer(request) if self.answer else self.route(request)
        if isinstance(outcome, Queued):
            self.queued.set()
        return outcome

    def route(self, request: Request) -> Decision:
        best, *fallbacks = [Endpoint(address, address) for address in self.order]
        return Decision(request.id, best, tuple(fallbacks))

    fallback = route

    def apply(self, fact: Fact, now: float) -> None:
        self.facts.append(fact)

    def poll(self, now: float) -> Sequence[Outcome]:
        return []

    def next_wakeup(self) -> float | None:
        return None

    @property
    def ends(self) -> list[Finished | Failed]:
        return [fact for fact in self.facts if isinstance(fact, Finished | Failed)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what only another process knows."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@dataclass
class Stack:
    """Client -> Envoy -> picker and two upstreams, `a` and `b`."""

    scheduler: FakeScheduler
    service: ExtProc
    a: EchoUpstream
    b: EchoUpstream
    envoy: Envoy
    client: aiohttp.ClientSession
    picker: asyncio.Task[None]
    dead: str

    def url(self, path: str, listener: str = GATEWAY) -> str:
        return f"http://127.0.0.1:{self.envoy.ports[listener]}{path}"

    async def end(self) -> Fact:
        """The terminal fact of the one request, once picker has seen the end of its stream."""
        await until(lambda: bool(self.scheduler.ends) and not self.service.open_streams)
        (end,) = self.scheduler.ends
        return end


async def serve(
    stack: AsyncExitStack, service: ExtProc, tls: ssl.SSLContext | None = None
) -> tuple[int, asyncio.Task[None]]:
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    tasks = await stack.enter_async_context(asyncio.TaskGroup())
    task = tasks.create_task(
        service.serve("127.0.0.1", 0, tls=tls, ready=lambda port, _: bound.set_result(port), grace=1.0)
    )
    stack.callback(task.cancel)
    return await bound, task


@asynccontextmanager
async def stack(
    *,
    topology: Topology = Topology.OVERRIDE_HOST,
    filters: Callable[[str, str], Sequence[Json]] = lambda a, b: (),
    failure_mode_allow: bool = False,
    dead_member: bool = False,
    limits: Limits | None = None,
    mode: Mode = Mode.FULL,
    responses: bool | None = None,
    bounds: Bounds | None = None,
    certificates: Certificates | None = None,
) -> AsyncIterator[Stack]:
    """responses: Envoy sends them to picker, too; by default where picker wants them."""

    async with AsyncExitStack() as opened:
        scheduler = FakeScheduler()
        runtime = Runtime(
            scheduler,  # type: ignore[arg-type]
            BlockHasher(b"a secret"),
            Telemetry(CollectorRegistry()),
            clock=asyncio.get_running_loop().time,
            limits=limits,
        )
        fallbacks = topology is Topology.OVERRIDE_HOST
        service = ExtProc(runtime, mode=mode, predict=lambda _: 60.0, fallbacks=fallbacks, bounds=bounds)
        port, task = await serve(opened, service, None if certificates is None else certificates.context)
        a, b = [await opened.enter_async_context(EchoUpstream(name).running()) for name in "ab"]
        dead = opened.enter_context(dead_port())
        config = bootstrap(
            [a.address, b.address, *([dead] if dead_member else [])],
            f"127.0.0.1:{port}",
            plain="127.0.0.1:0",
            topology=topology,
            filters=filters(a.address, b.address),
            failure_mode_allow=failure_mode_allow,
            lean=mode is Mode.LEAN,
            tls=certificates is not None,
        )
        if responses and mode is Mode.LEAN:
            _send_responses(config)
        envoy = await opened.enter_async_context(running_envoy(config))
        client = await opened.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)))
        scheduler.order = [a.address]
        yield Stack(scheduler, service, a, b, envoy, client, task, dead)


def _send_responses(config: Json) -> None:
    """Configure Envoy as for a picker that follows responses."""
    full = bootstrap([], "127.0.0.1:1")
    ours, theirs = (_filters(each)["envoy.filters.http.ext_proc"] for each in (config, full))
    ours["processing_mode"] = theirs["processing_mode"]


def _filters(config: Json) -> dict[str, Json]:
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return {each["name"]: each["typed_config"] for each in manager["http_filters"]}


# --- the way there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", Topology)
async def test_requests_go_where_picker_says(topology: Topology) -> None:
    async with stack(topology=topology) as this:
        for name, upstream in zip("abba", (this.a, this.b, this.b, this.a), strict=True):
            this.scheduler.order = [upstream.address]
            async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
                assert (response.status, response.headers["x-served-by"]) == (200, name)
                assert (await response.json())["usage"]["prompt_tokens"] == 4
    assert [json.loads(seen.body) for seen in this.a.seen] == [PROMPT, PROMPT]


async def test_the_facts_of_a_request_come_back() -> None:
    async with stack() as this:
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            await response.read()
        end = await this.end()
    request = this.scheduler.requests[0]
    assert request.model == "m"
    assert ResponseStarted(request.id, 200, this.a.address) in this.scheduler.facts
    assert end == Finished(request.id, 200, Usage(4, 1))


@pytest.mark.parametrize("size", [0, 1, 61_999, 62_000, 62_001, 1_000_000])
async def test_bodies_arrive_unchanged_both_ways(size: int) -> None:
    body = hashlib.shake_128(b"body").digest(size)
    async with stack() as this:
        for _ in range(3):
            async with this.client.post(this.url("/echo"), data=body) as response:
                assert response.status == 200
                assert await response.read() == body
    assert all(seen.body == body for seen in this.a.seen)


async def test_many_responses_at_once_all_arrive_whole() -> None:
    body = hashlib.shake_128(b"body").digest(100_000)

    async def one(this: Stack) -> bool:
        async with this.client.post(this.url("/echo"), data=body) as response:
            return await response.read() == body

    async with stack() as this:
        assert all(await asyncio.gather(*(one(this) for _ in range(100))))


async def test_a_request_without_a_body_is_routed() -> None:
    async with stack() as this:
        this.scheduler.order = [this.b.address]
        async with this.client.get(this.url("/v1/models")) as response:
            assert (response.status, response.headers["x-served-by"]) == (200, "b")
        await this.end()
    assert len(this.scheduler.requests) == 1


async def test_control_headers_of_a_client_are_ignored_and_removed() -> None:
    forged = {
        "x-gateway-destination-endpoint": "FORGED",
        "x-gateway-destination-endpoint-subset": "FORGED",
        "X-Prefiller-Host-Port": "FORGED",
        "x-data-parallel-rank": "7",
    }
    async with stack() as this:
        forged = {name: value.replace("FORGED", this.b.address) for name, value in forged.items()}
        async with this.client.post(this.url("/v1/completions"), json=PROMPT, headers=forged) as response:
            assert response.headers["x-served-by"] == "a"
    (seen,) = this.a.seen
    assert seen.headers.pop("x-gateway-destination-endpoint") == this.a.address
    assert not set(forged) & set(seen.headers)


async def test_a_rank_set_by_picker_reaches_the_engine_in_place_of_the_clients() -> None:
    async with stack() as this:
        endpoint = Endpoint("a-rank-3", this.a.address, rank=3)
        this.scheduler.answer = lambda request: Decision(request.id, endpoint)
        forged = {"x-data-parallel-rank": "7"}
        async with this.client.post(this.url("/v1/completions"), json=PROMPT, headers=forged) as response:
            assert response.status == 200
    assert this.a.seen[0].headers["x-data-parallel-rank"] == "3"


async def test_the_subset_hint_of_the_gateway_reaches_the_decision() -> None:
    async with (
        stack(filters=lambda a, b: [subset_filter([b, "[fd00::1]:8000"])]) as this,
        this.client.post(this.url("/v1/completions"), json=PROMPT) as response,
    ):
        assert response.status == 200
    assert this.scheduler.requests[0].subset == frozenset({this.b.address, "[fd00::1]:8000"})


async def test_a_dead_endpoint_is_replaced_by_the_next_in_the_list() -> None:
    async with stack(dead_member=True) as this:
        this.scheduler.order = [this.dead, this.b.address, this.a.address]
        for _ in range(3):
            async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
                assert (response.status, response.headers["x-served-by"]) == (200, "b")
        await until(lambda: not this.service.open_streams)
    started = [fact for fact in this.scheduler.facts if isinstance(fact, ResponseStarted)]
    assert [fact.served_by for fact in started] == [this.b.address] * 3


async def test_the_plain_listener_sends_to_everyone_in_turn_without_picker() -> None:
    async with stack() as this:
        served = []
        for _ in range(4):
            async with this.client.post(this.url("/v1/completions", PLAIN), json=PROMPT) as response:
                served.append(response.headers["x-served-by"])
    assert served in (["a", "b", "a", "b"], ["b", "a", "b", "a"])
    assert this.scheduler.requests == []


# --- the way back ------------------------------------------------------------------------------------------


async def test_events_are_passed_on_one_by_one() -> None:
    async with stack() as this:
        async with this.client.post(this.url("/v1/completions"), json=PROMPT | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for number in range(3):
                this.a.step()
                line = await response.content.readline()  # the next event is not sent before this one is here
                assert json.loads(line.removeprefix(b"data: "))["choices"][0]["text"] == f"token {number}"
                assert await response.content.readline() == b"\n"
            assert await response.content.read() == b"data: [DONE]\n\n"
        end = await this.end()
    assert isinstance(end, Finished)


@pytest.mark.parametrize(
    ("rejection", "retry_after"),
    [
        (Rejection(0, RejectReason.SATURATED, 429, "Full.", retry_after=3.0), "3"),
        (Rejection(0, RejectReason.NO_ENDPOINTS, 503, "Nobody.", retry_after=0.2), "1"),
        (Rejection(0, RejectReason.UNKNOWN_MODEL, 404, "Who?"), None),
    ],
)
async def test_rejections_arrive_as_json_with_retry_after(rejection: Rejection, retry_after: str | None) -> None:
    async with stack() as this:
        this.scheduler.answer = lambda request: rejection
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == rejection.status
            assert response.headers.get("retry-after") == retry_after
            assert response.content_type == "application/json"
            assert (await response.json())["error"]["message"] == rejection.message
    assert this.a.seen == []


async def test_a_body_that_is_not_json_is_answered_400() -> None:
    async with stack() as this, this.client.post(this.url("/v1/chat/completions"), data=b"{") as response:
        assert response.status == 400
        assert "error" in await response.json()
    assert this.a.seen == []


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    """Sent so, a body has no announced length."""
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_answered_413(announced: bool) -> None:
    body = b" " * 1001
    async with stack(limits=Limits(max_body_bytes=1000)) as this:
        data = body if announced else in_pieces(body)
        async with this.client.post(this.url("/v1/completions"), data=data) as response:
            assert response.status == 413
            assert "error" in await response.json()
    assert this.a.seen == []


async def test_responses_of_an_endpoint_without_body_end_the_request() -> None:
    async with stack() as this:
        async with this.client.head(this.url("/v1/models")) as response:
            assert (response.status, response.headers["x-served-by"]) == (200, "a")
        assert isinstance(await this.end(), Finished)


# --- early ends --------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_while_the_endpoint_works_ends_its_request() -> None:
    async with stack() as this:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(this.client.post(this.url("/hang"), data=b"x"))
            await this.a.arrived.wait()
            asking.cancel()
        end = await this.end()
        await this.a.disconnected.wait()
    assert end == Failed(this.scheduler.requests[0].id, FailureReason.CLIENT_GONE)


async def test_a_client_that_leaves_mid_stream_ends_its_request() -> None:
    async with stack() as this:
        async with this.client.post(this.url("/v1/completions"), json=PROMPT | {"stream": True}) as response:
            this.a.step()
            await response.content.readline()
            response.close()
        end = await this.end()
        this.a.step(2)
        await this.a.disconnected.wait()
    assert end == Failed(this.scheduler.requests[0].id, FailureReason.CLIENT_GONE)


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it() -> None:
    async with stack() as this:
        this.scheduler.answer = lambda request: Queued(request.id)
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(this.client.post(this.url("/v1/completions"), json=PROMPT))
            await this.scheduler.queued.wait()
            asking.cancel()
        end = await this.end()
    assert end == Failed(this.scheduler.requests[0].id, FailureReason.CLIENT_GONE)
    assert this.a.seen == []


async def test_an_endpoint_nobody_can_reach_is_answered_by_envoy_and_reported() -> None:
    async with stack(topology=Topology.ORIGINAL_DST) as this:
        this.scheduler.order = [this.dead]
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == 503
        end = await this.end()
    assert end == Finished(this.scheduler.requests[0].id, 503)


# --- lean --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("topology", Topology)
async def test_lean_routes_and_the_access_log_tells_the_end(topology: Topology, responses: bool) -> None:
    async with stack(mode=Mode.LEAN, topology=topology, responses=responses) as this:
        for name, upstream in zip("abba", (this.a, this.b, this.b, this.a), strict=True):
            this.scheduler.order = [upstream.address]
            async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
                assert (response.status, response.headers["x-served-by"]) == (200, name)
                assert (await response.json())["usage"]["prompt_tokens"] == 4
        await until(lambda: len(this.scheduler.ends) == 4)
        assert not this.service.open_streams
    ids = [request.id for request in this.scheduler.requests]
    assert sorted(this.scheduler.ends, key=lambda fact: fact.request_id) == [Finished(each, 200) for each in ids]
    assert ResponseStarted(ids[1], 200, this.b.address) in this.scheduler.facts


@pytest.mark.parametrize("responses", [False, True])
async def test_lean_passes_responses_of_any_size_whole(responses: bool) -> None:
    body = hashlib.shake_128(b"body").digest(300_000)

    async def one(this: Stack) -> bool:
        async with this.client.post(this.url("/echo"), data=body) as response:
            return await response.read() == body

    async with stack(mode=Mode.LEAN, responses=responses) as this:
        assert all(await asyncio.gather(*(one(this) for _ in range(50))))
        await until(lambda: len(this.scheduler.ends) == 50)


async def test_lean_learns_which_endpoint_served_after_a_retry() -> None:
    async with stack(mode=Mode.LEAN, dead_member=True) as this:
        this.scheduler.order = [this.dead, this.b.address]
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == 200
        end = await this.end()
    assert end == Finished(this.scheduler.requests[0].id, 200)
    assert ResponseStarted(this.scheduler.requests[0].id, 200, this.b.address) in this.scheduler.facts


async def test_lean_learns_of_a_client_that_leaves() -> None:
    async with stack(mode=Mode.LEAN) as this:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(this.client.post(this.url("/hang"), data=b"x"))
            await this.a.arrived.wait()
            asking.cancel()
        assert await this.end() == Failed(this.scheduler.requests[0].id, FailureReason.CLIENT_GONE)


async def test_lean_learns_of_an_endpoint_nobody_can_reach() -> None:
    async with stack(mode=Mode.LEAN, topology=Topology.ORIGINAL_DST) as this:
        this.scheduler.order = [this.dead]
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == 503
        assert await this.end() == Failed(this.scheduler.requests[0].id, FailureReason.CONNECT)


async def test_lean_marks_are_not_taken_from_clients() -> None:
    async with stack(mode=Mode.LEAN) as this:
        forged = {"x-picker-request-id": "1-0123456789abcdef"}
        async with this.client.post(this.url("/v1/completions"), json=PROMPT, headers=forged) as response:
            assert response.status == 200
        assert await this.end() == Finished(this.scheduler.requests[0].id, 200)
    assert this.a.seen[0].headers["x-picker-request-id"] not in ("", *forged.values())


# --- TLS ---------------------------------------------------------------------------------------------------


async def test_envoy_reaches_picker_over_tls_with_a_certificate_of_its_own_making() -> None:
    pytest.importorskip("cryptography")
    async with stack(certificates=Certificates(None)) as this:
        body = hashlib.shake_128(b"body").digest(500_000)
        async with this.client.post(this.url("/echo"), data=body) as response:
            assert response.status == 200
            assert await response.read() == body


# --- bounded time ------------------------------------------------------------------------------------------


async def test_a_body_that_stalls_is_answered_408_by_picker() -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with stack(bounds=Bounds(request=0.2)) as this:
        async with this.client.post(this.url("/v1/completions"), data=stalling()) as response:
            assert response.status == 408
            assert "error" in await response.json()
        await until(lambda: not this.service.open_streams)


async def test_a_decision_that_never_comes_is_answered_503_by_picker() -> None:
    async with stack(bounds=Bounds(decision=0.2), failure_mode_allow=True) as this:
        this.scheduler.answer = lambda request: Queued(request.id)
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == 503
            assert "error" in await response.json()
        assert await this.end() == Failed(this.scheduler.requests[0].id, FailureReason.CLIENT_GONE)
    assert this.a.seen == this.b.seen == []


# --- without picker ----------------------------------------------------------------------------------------


async def test_without_picker_requests_are_answered_503() -> None:
    async with stack() as this:
        this.picker.cancel()
        await asyncio.wait([this.picker])
        async with this.client.post(this.url("/v1/completions"), json=PROMPT) as response:
            assert response.status == 503
    assert this.a.seen == this.b.seen == []


async def test_without_picker_an_open_gateway_serves_its_own_pool_and_nobody_elses() -> None:
    async with stack(failure_mode_allow=True) as this, EchoUpstream("c").running() as outsider:
        this.picker.cancel()
        await asyncio.wait([this.picker])
        await unhealthy(this)
        forged = {"x-gateway-destination-endpoint": outsider.address}
        async with this.client.post(this.url("/v1/completions"), json=PROMPT, headers=forged) as response:
            assert response.status == 200
            assert response.headers["x-served-by"] in "ab"
    assert outsider.seen == []


@pytest.mark.parametrize("open_", [False, True])
async def test_without_picker_nobody_is_sent_where_a_client_says(open_: bool) -> None:
    async with (
        stack(failure_mode_allow=open_, topology=Topology.ORIGINAL_DST) as this,
        EchoUpstream("c").running() as outsider,
    ):
        this.picker.cancel()
        await asyncio.wait([this.picker])
        await unhealthy(this)
        forged = {"x-gateway-destination-endpoint": outsider.address}
        async with this.client.post(this.url("/v1/completions"), json=PROMPT, headers=forged) as response:
            assert response.status == 503
    assert outsider.seen == this.a.seen == this.b.seen == []


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("open_", [False, True])
async def test_a_picker_that_goes_amid_a_body_fails_that_request_and_sends_it_nowhere(open_: bool, mode: Mode) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"model": "m", '
        begun.set()
        await go_on.wait()
        yield b'"prompt": "x"}'

    async with stack(failure_mode_allow=open_, mode=mode) as this, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(this.client.post(this.url("/v1/completions"), data=slow()))
        await begun.wait()
        await until(lambda: this.service.open_streams == 1)
        this.picker.cancel()
        await asyncio.wait([this.picker])
        go_on.set()
        assert (await asking).status >= 500
    assert this.a.seen == this.b.seen == []


async def unhealthy(this: Stack) -> None:
    """Wait until Envoy has noticed that picker is gone."""
    while "cluster.ext-proc.membership_healthy: 0" not in await this.envoy.admin("/stats"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


# --- the process -------------------------------------------------------------------------------------------


async def test_envoy_says_what_it_is() -> None:
    async with running_envoy(bootstrap(["127.0.0.1:1"], "127.0.0.1:2", plain="127.0.0.1:0")) as envoy:
        assert envoy.version.split(".")[0] == "1"
        assert set(envoy.ports) == {GATEWAY, PLAIN}
        assert len({envoy.admin_port, *envoy.ports.values()}) == 3
        assert (await envoy.admin("/ready")).strip() == "LIVE"
        os.kill(envoy.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(envoy.pid, 0)


async def test_envoys_own_words_say_why_it_did_not_start(tmp_path: Path) -> None:
    config = bootstrap(["127.0.0.1:1"], "127.0.0.1:2") | {"no_such_field": 1}
    with pytest.raises(ConfigError, match="no_such_field"):
        async with running_envoy(config, log_path=tmp_path / "envoy.log"):
            pass
    assert "no_such_field" in (tmp_path / "envoy.log").read_text()


PARENT = """
import asyncio
from picker.envoy import bootstrap, running_envoy

async def main():
    async with running_envoy(bootstrap(["127.0.0.1:1"], "127.0.0.1:2")) as envoy:
        print(envoy.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
async def test_envoy_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed parent leaves its files behind
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    """Running, and not merely waiting for somebody to collect its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
