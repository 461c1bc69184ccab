from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dead_port import dead_port
from picker.sources import scrape
from picker.sources.scrape import AiohttpFetch, FetchFailure, FetchResult, Manner, ScrapeSource
from picker.types import (
    Endpoint,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Fact,
    HealthObserved,
    LoadObserved,
    ModelsObserved,
    ScrapeFailed,
)


def page(waiting: float = 0.0, engines: tuple[str, ...] = ("0",), started_at: float = 1e9) -> FetchResult:
    lines = [f"process_start_time_seconds {started_at}"]
    for number, engine in enumerate(engines):
        lines.append(f'vllm:num_requests_waiting{{engine="{engine}",model_name="tiny"}} {waiting + number}')
    return FetchResult(200, "\n".join(lines).encode())


def with_running(running: float, waiting: float = 0.0) -> FetchResult:
    return FetchResult(200, page(waiting).body + b"\nvllm:num_requests_running %.1f\n" % running)


FULL = FetchResult(200, page().body + b"\nvllm:num_requests_running 0\nvllm:kv_cache_usage_perc 0\n")
MODELS = FetchResult(200, b'{"object":"list","data":[{"id":"tiny","max_model_len":1024}]}')
_HANDSHAKES = (FetchFailure.TLS, FetchFailure.NOT_TLS)
HTML = FetchResult(200, b"<html>nginx</html>")
REFUSED = FetchResult(failure=FetchFailure.REFUSED)
TIMEOUT = FetchResult(failure=FetchFailure.TIMEOUT)

Answer = FetchResult | Awaitable[FetchResult] | Exception


class VirtualTime:
    """A clock that moves only when told, and the sleep that goes with it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, len(self.pauses), woken))
        await woken

    async def pass_(self, seconds: float) -> None:
        """Let this much time pass; everyone due in between wakes at his time and runs until he waits again."""
        end = self.now + seconds
        await settled()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.now, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
            await settled()
        self.now = end


async def settled() -> None:
    for _ in range(12):  # more turns of the loop than any chain of awaits here is long
        await asyncio.sleep(0)


@dataclass
class FakePods:
    """A fetch that answers by address; `metrics` and `models` may be changed at any time."""

    time: VirtualTime
    metrics: dict[str, Answer | Callable[[], Answer]] = field(default_factory=dict)
    models: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[float, str]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def __call__(self, url: str) -> FetchResult:
        self.asked.append((self.time.now, url))
        address, _, path = url.removeprefix("http://").partition("/")
        answer = self.metrics.get(address, page()) if path == "metrics" else self.models.get(address, MODELS)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            result = answer() if callable(answer) else answer
            if isinstance(result, Exception):
                raise result
            return result if isinstance(result, FetchResult) else await result
        finally:
            self.open -= 1

    def times(self, url: str) -> list[float]:
        return [when for when, asked in self.asked if asked == url]


class Scene:
    """A running source, its pods, its time and the facts it emits."""

    def __init__(self, **settings: float | Callable[[str], bool]) -> None:
        self.time = VirtualTime()
        self.pods = FakePods(self.time)
        self.facts: list[Fact] = []
        self.source = ScrapeSource(
            self.pods,
            clock=self.time.clock,
            rng=random.Random(7),
            sleep=self.time.sleep,
            **settings,  # type: ignore[arg-type]
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.source.run(self.facts.append))
            await settled()
            yield
            task.cancel()

    def loads(self, name: str) -> list[LoadObserved]:
        return [fact for fact in self.facts if isinstance(fact, LoadObserved) and fact.name == name]

    def failures(self, name: str) -> list[str]:
        return [fact.reason for fact in self.facts if isinstance(fact, ScrapeFailed) and fact.name == name]

    def health(self) -> list[tuple[str, bool, str]]:
        return [(f.name, f.healthy, f.reason) for f in self.facts if isinstance(f, HealthObserved)]

    def models(self) -> list[ModelsObserved]:
        return [fact for fact in self.facts if isinstance(fact, ModelsObserved)]


def pod(name: str, address: str | None = None, rank: int | None = None) -> Endpoint:
    return Endpoint(name, address or f"{name}:8000", rank=rank)


# --- the pace ----------------------------------------------------------------------------------------------


async def test_an_endpoint_is_scraped_at_once_and_then_every_interval() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    async with scene.running():
        assert scene.loads("a") == [LoadObserved("a", 0.0, waiting=0.0, started_at=1e9)]
        await scene.time.pass_(100.0)
    times = scene.pods.times("http://a:8000/metrics")
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 0.0 <= pauses[0] <= 1.0
    assert all(0.8 <= pause <= 1.2 for pause in pauses[1:])
    assert len({round(pause, 6) for pause in pauses}) > 50
    assert [load.observed_at for load in scene.loads("a")] == times


async def test_another_pace_holds_from_a_scrape_of_everybody_on() -> None:
    scene = Scene(interval=1000.0)
    for name in "ab":
        scene.source.add(pod(name))
    scene.pods.metrics["b:8000"] = REFUSED
    async with scene.running():
        await scene.time.pass_(30.0)
        assert [len(scene.pods.times(f"http://{name}:8000/metrics")) for name in "ab"] == [1, 1]
        scene.source.set_interval(1.0)
        await scene.time.pass_(10.0)
        assert 9 <= len(scene.loads("a")) <= 14
        assert scene.health() == [("b", False, "connection refused")], "what was counted before counts"
        scene.source.remove("a")
        known = len(scene.loads("a"))
        await scene.time.pass_(10.0)
        assert len(scene.loads("a")) == known


async def test_another_pace_is_that_of_the_start_where_nothing_runs_yet() -> None:
    scene = Scene(interval=1000.0)
    scene.source.add(pod("a"))
    scene.source.set_interval(1.0)
    async with scene.running():
        await scene.time.pass_(10.0)
        assert 9 <= len(scene.loads("a")) <= 14


async def test_an_endpoint_where_nothing_runs_is_scraped_half_as_often_until_it_is_given_a_request() -> None:
    busy: set[str] = set()
    scene = Scene(busy=busy.__contains__)
    scene.source.add(pod("a"))
    scene.pods.metrics["a:8000"] = with_running(0.0)
    async with scene.running():
        await scene.time.pass_(100.0)
        idle = len(scene.loads("a"))
        busy.add("a")
        await scene.time.pass_(3.0)
        before = len(scene.loads("a"))
        await scene.time.pass_(100.0)
    assert 45 <= idle <= 56
    assert 92 <= len(scene.loads("a")) - before <= 109


@pytest.mark.parametrize("shown", [with_running(1.0), with_running(0.0, waiting=2.0), page()])
async def test_an_endpoint_that_shows_requests_or_does_not_say_is_scraped_every_interval(shown: FetchResult) -> None:
    scene = Scene(busy=lambda name: False)
    scene.source.add(pod("a"))
    scene.pods.metrics["a:8000"] = shown
    async with scene.running():
        await scene.time.pass_(100.0)
    assert 92 <= len(scene.loads("a")) <= 109


async def test_an_idle_endpoint_that_fails_is_asked_again_after_one_interval() -> None:
    scene = Scene(busy=lambda name: False)
    scene.source.add(pod("a"))
    scene.pods.metrics["a:8000"] = with_running(0.0)
    async with scene.running():
        await scene.time.pass_(30.0)
        scene.pods.metrics["a:8000"] = REFUSED
        await scene.time.pass_(5.0)
    assert scene.health() == [("a", False, "connection refused")]


async def test_endpoints_that_come_together_are_spread_over_the_interval() -> None:
    scene = Scene()
    for number in range(200):
        scene.source.add(pod(f"p{number}"))
    async with scene.running():
        await scene.time.pass_(0.0)
    assert len(scene.time.pauses) == 200
    assert 0.4 < sum(scene.time.pauses) / 200 < 0.6
    assert min(scene.time.pauses) < 0.05
    assert max(scene.time.pauses) > 0.95


async def test_a_slow_answer_is_awaited_and_never_overlapped() -> None:
    scene = Scene()
    slow: asyncio.Future[FetchResult] = asyncio.get_running_loop().create_future()
    scene.pods.metrics["a:8000"] = slow
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(10.0)
        assert (len(scene.pods.asked), scene.facts) == (1, [])
        slow.set_result(page(3.0))
        await settled()
    assert [(load.waiting, load.observed_at) for load in scene.loads("a")] == [(3.0, 10.0)]


async def test_one_hanging_endpoint_does_not_delay_the_others() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = asyncio.get_running_loop().create_future()
    scene.source.add(pod("a"))
    scene.source.add(pod("b"))
    async with scene.running():
        await scene.time.pass_(10.0)
    assert len(scene.loads("b")) >= 8


async def test_at_most_so_many_fetches_run_at_once() -> None:
    scene = Scene(concurrency=3)
    gate = asyncio.Event()

    async def gated() -> FetchResult:
        await gate.wait()
        return page()

    for number in range(10):
        scene.pods.metrics[f"p{number}:8000"] = gated
        scene.source.add(pod(f"p{number}"))
    async with scene.running():
        assert scene.pods.open == 3
        gate.set()
        await scene.time.pass_(0.0)
        await settled()
    assert scene.pods.most_open == 3
    assert all(scene.loads(f"p{number}") for number in range(10))


async def test_failing_endpoints_are_asked_less_and_less_and_again_at_full_pace_after() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = REFUSED
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(60.0)
        before = len(scene.time.pauses)
        scene.pods.metrics["a:8000"] = page()
        await scene.time.pass_(10.0)
    for pause, backoff in zip(scene.time.pauses[1:before], [1, 1, 2, 4] + [5] * 99, strict=False):
        assert 0.8 * backoff <= pause <= 1.2 * backoff
    assert all(0.8 <= pause <= 1.2 for pause in scene.time.pauses[before:])


# --- who is scraped ----------------------------------------------------------------------------------------


async def test_the_source_follows_the_pool_by_its_facts() -> None:
    scene = Scene()
    async with scene.running():
        scene.source.observe(EndpointAdded(pod("a")))
        scene.source.observe(EndpointDraining("a"))
        await settled()
        assert len(scene.loads("a")) == 1
        scene.source.observe(EndpointRemoved("a"))
        scene.source.observe(EndpointRemoved("unknown"))
        scene.facts.clear()
        await scene.time.pass_(10.0)
    assert scene.facts == []
    assert len(scene.pods.times("http://a:8000/metrics")) == 1


async def test_nothing_is_said_of_an_endpoint_removed_during_its_scrape() -> None:
    scene = Scene()
    answer: asyncio.Future[FetchResult] = asyncio.get_running_loop().create_future()
    scene.pods.metrics["a:8000"] = answer
    scene.source.add(pod("a"))
    async with scene.running():
        answer.set_result(page())  # arrives in the same turn of the loop
        scene.source.remove("a")
        await scene.time.pass_(5.0)
    assert scene.facts == []
    assert scene.pods.open == 0


async def test_removing_one_endpoint_leaves_the_others_running() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    scene.source.add(pod("b"))
    async with scene.running():
        scene.source.remove("a")
        await scene.time.pass_(5.0)
        scene.source.add(pod("a"))
        await settled()
    assert len(scene.loads("a")) == 2
    assert len(scene.loads("b")) >= 4


async def test_an_endpoint_announced_again_is_not_scraped_twice() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    async with scene.running():
        scene.source.observe(EndpointAdded(pod("a")))
        await settled()
    assert len(scene.pods.times("http://a:8000/metrics")) == 1


async def test_an_endpoint_that_moves_is_scraped_at_its_new_address_only() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    async with scene.running():
        scene.source.observe(EndpointAdded(pod("a", "elsewhere:9000")))
        scene.pods.asked.clear()
        await scene.time.pass_(3.0)
    assert {url for _, url in scene.pods.asked if url.endswith("metrics")} == {"http://elsewhere:9000/metrics"}


async def test_ranks_of_one_address_share_one_fetch() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = page(4.0, engines=("0", "1"))
    for rank in (0, 1, 2):
        scene.source.add(pod(f"a-{rank}", "a:8000", rank))
    async with scene.running():
        assert len(scene.pods.times("http://a:8000/metrics")) == 1
        assert [scene.loads(f"a-{rank}")[0].waiting for rank in (0, 1)] == [4.0, 5.0]
        assert scene.failures("a-2") == ["not metrics: no series for data-parallel rank 2 (ranks shown: 0, 1)"]
        scene.source.remove("a-0")
        await scene.time.pass_(1.0)
    assert (len(scene.loads("a-0")), len(scene.loads("a-1"))) == (1, 2)


async def test_a_restart_shows_in_started_at() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    async with scene.running():
        scene.pods.metrics["a:8000"] = page(started_at=2e9)
        await scene.time.pass_(1.0)
    assert [load.started_at for load in scene.loads("a")] == [1e9, 2e9]


# --- failures and health -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (TIMEOUT, "timeout"),
        (REFUSED, "connection refused"),
        (FetchResult(500, b"oops"), "status 500"),
        (FetchResult(404, b"{}"), "status 404"),
        (HTML, "not metrics: HTML, not Prometheus text"),
        (FetchResult(failure=FetchFailure.TOO_LARGE), "body too large"),
    ],
)
async def test_a_failed_scrape_is_said_to_have_failed_and_why(answer: FetchResult, reason: str) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = answer
    scene.source.add(pod("a"))
    async with scene.running():
        pass
    assert scene.failures("a") == [reason]
    assert scene.loads("a") == []


@pytest.mark.parametrize("answer", [TIMEOUT, REFUSED, FetchResult(failure=FetchFailure.RESET), FetchResult(503)])
async def test_three_losses_in_a_row_are_unhealthy_and_one_answer_is_healthy_again(answer: FetchResult) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = answer
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(1.0)
        assert len(scene.failures("a")) == 2
        assert scene.health() == []
        await scene.time.pass_(60.0)
        assert scene.health() == [("a", False, scene.failures("a")[0])]
        scene.pods.metrics["a:8000"] = page()
        await scene.time.pass_(10.0)
    assert scene.health()[1:] == [("a", True, "")]
    assert scene.loads("a") != []


async def test_losses_that_are_not_in_a_row_are_no_illness() -> None:
    scene = Scene()
    answers = iter([REFUSED, REFUSED, page(), TIMEOUT, REFUSED, page()] * 5)
    scene.pods.metrics["a:8000"] = lambda: next(answers)
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(15.0)
    assert scene.health() == []


@pytest.mark.parametrize("failure", _HANDSHAKES)
async def test_a_failed_handshake_is_an_illness_where_requests_are_sent_by_the_same_settings(
    failure: FetchFailure, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = FetchResult(failure=failure, shared=True)
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(60.0)
    ((_, healthy, reason),) = scene.health()
    assert not healthy
    assert ("http://" in reason) if failure is FetchFailure.NOT_TLS else ("--endpoint-ca" in reason)
    assert f"endpoint a is unhealthy: {reason}" in caplog.text


@pytest.mark.parametrize("answer", [HTML, FetchResult(404), *(FetchResult(failure=each) for each in _HANDSHAKES)])
async def test_a_server_without_metrics_is_not_unhealthy(answer: FetchResult) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = answer
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(60.0)
    assert len(scene.failures("a")) > 10
    assert scene.health() == []


async def test_a_health_path_decides_alone_and_only_good_answers_count() -> None:
    scene = Scene()
    scene.source.health_path = "/health"
    scene.source.add(pod("a"))
    scene.pods.metrics["a:8000"] = REFUSED
    scene.pods.models["a:8000"] = FetchResult(200)  # of every path but the metrics
    async with scene.running():
        await scene.time.pass_(20.0)
        assert scene.health() == []
        scene.pods.models["a:8000"] = FetchResult(404)
        await scene.time.pass_(20.0)
        assert scene.health() == [("a", False, "status 404")]
        scene.pods.models["a:8000"] = FetchResult(200)
        await scene.time.pass_(20.0)
    assert scene.health()[1:] == [("a", True, "")]


async def test_an_endpoint_that_joins_a_dead_server_is_told_unhealthy_too() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = REFUSED
    scene.source.add(pod("a-0", "a:8000", 0))
    async with scene.running():
        await scene.time.pass_(5.0)
        scene.source.add(pod("a-1", "a:8000", 1))
        await scene.time.pass_(10.0)
    assert [name for name, healthy, _ in scene.health() if not healthy] == ["a-0", "a-1"]


async def test_an_unhealthy_endpoint_that_moves_is_healthy_at_its_new_address() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = REFUSED
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(5.0)
        scene.source.add(pod("a", "b:8000"))
        await settled()
    assert [healthy for _, healthy, _ in scene.health()] == [False, True]


async def test_a_bug_on_one_page_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = ZeroDivisionError("a bug")
    scene.source.add(pod("a"))
    scene.source.add(pod("b"))
    async with scene.running():
        await scene.time.pass_(5.0)
        scene.pods.metrics["a:8000"] = page()
        await scene.time.pass_(10.0)
    assert len(scene.loads("b")) >= 12
    assert len(scene.loads("a")) >= 3
    assert {record.exc_info[0] for record in caplog.records if record.exc_info} == {ZeroDivisionError}


async def test_each_kind_of_trouble_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = TIMEOUT
    scene.source.add(pod("a"))
    with caplog.at_level(logging.INFO, logger=scrape.__name__):
        async with scene.running():
            await scene.time.pass_(30.0)
            scene.pods.metrics["a:8000"] = FULL
            await scene.time.pass_(10.0)
    assert [record.message for record in caplog.records] == [
        "scraping http://a:8000: timeout",
        "endpoint a is unhealthy: timeout",
        "endpoint a is healthy again",
        "scraping http://a:8000: good again",
    ]


async def test_a_metric_that_is_no_longer_shown_is_named(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    renamed = FetchResult(200, FULL.body.replace(b"num_requests_waiting", b"requests_queued"))
    scene.pods.metrics["a:8000"] = renamed
    scene.source.add(pod("a"))
    with caplog.at_level(logging.INFO, logger=scrape.__name__):
        async with scene.running():
            await scene.time.pass_(10.0)
    assert [record.message for record in caplog.records] == [
        "scraping http://a:8000: its metrics do not show waiting requests: were they renamed?"
    ]
    assert scene.loads("a")


# --- models ------------------------------------------------------------------------------------------------


async def test_models_are_asked_for_at_first_and_every_minute() -> None:
    scene = Scene()
    scene.source.add(pod("a"))
    async with scene.running():
        assert scene.models() == [ModelsObserved("a", frozenset({"tiny"}), 1024)]
        await scene.time.pass_(150.0)
    times = scene.pods.times("http://a:8000/v1/models")
    assert len(times) == 3
    assert all(60.0 <= later - earlier <= 61.2 for earlier, later in itertools.pairwise(times))


async def test_models_are_asked_of_a_server_without_metrics_too() -> None:
    scene = Scene()
    scene.pods.metrics["a:8000"] = FetchResult(404)
    scene.source.add(pod("a"))
    async with scene.running():
        pass
    assert len(scene.models()) == 1


@pytest.mark.parametrize("answer", [FetchResult(401, b'{"error":"Unauthorized"}'), HTML, TIMEOUT])
async def test_models_that_cannot_be_read_are_let_be(answer: FetchResult, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    scene.pods.models["a:8000"] = answer
    scene.source.add(pod("a"))
    async with scene.running():
        await scene.time.pass_(30.0)
    assert (scene.models(), scene.failures("a"), scene.health(), caplog.records) == ([], [], [], [])
    assert len(scene.pods.times("http://a:8000/v1/models")) == 1


async def test_models_are_asked_again_of_a_server_that_was_gone_and_for_a_new_endpoint() -> None:
    scene = Scene()
    scene.source.add(pod("a-0", "a:8000", 0))
    async with scene.running():
        scene.pods.metrics["a:8000"] = REFUSED
        await scene.time.pass_(1.0)
        scene.pods.metrics["a:8000"] = page()
        await scene.time.pass_(2.0)
        assert len(scene.models()) == 2
        scene.source.add(pod("a-1", "a:8000", 0))
        await scene.time.pass_(2.0)
    assert [fact.name for fact in scene.models()[2:]] == ["a-0", "a-1"]


# --- the real fetch ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    async with TestServer(app) as server:
        yield f"http://127.0.0.1:{server.port}"


async def empty(request: web.Request) -> web.Response:
    return web.Response()


async def test_fetch_returns_status_and_body_over_one_kept_connection() -> None:
    seen: list[tuple[object, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        seen.append((request.transport.get_extra_info("peername"), request.headers.get("Authorization")))
        return web.Response(status=200 if request.path == "/metrics" else 404, body=b"x" * 60_000)

    async with serving(handler) as url, AiohttpFetch(timeout=30, manners=lambda root: Manner("key")) as fetch:
        assert await fetch(url + "/metrics") == FetchResult(200, b"x" * 60_000)
        assert (await fetch(url + "/other")).status == 404
    assert len(set(seen)) == 1
    assert seen[0][1] == "Bearer key"


async def test_fetch_asks_for_plain_uncompressed_text() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.headers['Accept-Encoding']} {request.headers['Accept']}")

    async with serving(handler) as url, AiohttpFetch(timeout=30) as fetch:
        assert (await fetch(url)).body == b"identity text/plain;version=0.0.4, application/json"


async def test_fetch_gives_up_after_its_timeout() -> None:
    never = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        await never.wait()
        return web.Response()

    async with serving(handler) as url, AiohttpFetch(timeout=0.02) as fetch:
        assert await fetch(url) == TIMEOUT
        never.set()


async def test_fetch_refuses_a_body_declared_over_the_bound_before_it_comes() -> None:
    done = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1001"})
        await response.prepare(request)
        await response.write(b"x")
        await done.wait()
        return response

    async with serving(handler) as url, AiohttpFetch(timeout=30, max_body_bytes=1000) as fetch:
        assert await fetch(url) == FetchResult(failure=FetchFailure.TOO_LARGE)
        done.set()


async def test_fetch_refuses_a_body_that_does_not_end() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 100)
                await asyncio.sleep(0)
        return response

    async with serving(handler) as url, AiohttpFetch(timeout=30, max_body_bytes=1000) as fetch:
        assert await fetch(url) == FetchResult(failure=FetchFailure.TOO_LARGE)


async def test_fetch_follows_no_redirect() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound("http://other.invalid/")

    async with serving(handler) as url, AiohttpFetch(timeout=30) as fetch:
        assert (await fetch(url)).status == 302


async def test_fetch_names_a_refused_connection() -> None:
    with dead_port() as address:
        async with AiohttpFetch(timeout=30) as fetch:
            assert await fetch(f"http://{address}") == REFUSED


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (b"", FetchFailure.RESET),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nvllm:num", FetchFailure.RESET),
        (b"SSH-2.0-OpenSSH_9.6\r\n", FetchFailure.NOT_HTTP),
    ],
)
async def test_fetch_names_a_connection_that_breaks_or_speaks_otherwise(reply: bytes, failure: FetchFailure) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, AiohttpFetch(timeout=30) as fetch:
        port = server.sockets[0].getsockname()[1]
        assert await fetch(f"http://127.0.0.1:{port}/metrics") == FetchResult(failure=failure)


async def test_fetch_tells_a_server_without_tls_and_whether_requests_would_fare_so_too() -> None:
    async with serving(empty) as url, AiohttpFetch(timeout=30) as fetch:
        result = await fetch(url.replace("http:", "https:"))
        assert (result.failure, result.lost) == (FetchFailure.NOT_TLS, False)
        assert "http://" in result.problem
    alike = Manner(shared=True)
    async with serving(empty) as url, AiohttpFetch(timeout=30, manners=lambda root: alike) as fetch:
        result = await fetch(url.replace("http:", "https:"))
        assert (result.failure, result.lost) == (FetchFailure.NOT_TLS, True)


async def test_fetch_names_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    async with AiohttpFetch(timeout=30) as fetch:
        assert (await fetch("http://no-such-host.invalid:8000/")).failure is FetchFailure.UNREACHABLE


async def test_fetch_outside_of_its_context_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await AiohttpFetch(timeout=30)("http://127.0.0.1:1/")


async def test_the_source_over_real_sockets() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=page(2.0).body if request.path == "/metrics" else MODELS.body)

    facts: asyncio.Queue[Fact] = asyncio.Queue()
    async with serving(handler) as url, AiohttpFetch(timeout=30) as fetch, asyncio.TaskGroup() as group:
        source = ScrapeSource(fetch, clock=lambda: 1.0, rng=random.Random(1), interval=0.001)
        source.add(Endpoint("a", url.removeprefix("http://")))
        task = group.create_task(source.run(facts.put_nowait))
        assert await facts.get() == LoadObserved("a", 1.0, waiting=2.0, started_at=1e9)
        assert await facts.get() == ModelsObserved("a", frozenset({"tiny"}), 1024)
        assert isinstance(await facts.get(), LoadObserved)
        task.cancel()
