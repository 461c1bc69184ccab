"""Bad input and failing pods, through both front ends: a clear answer, nothing lost, nothing leaked."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from e2e.gateway import FRONT_ENDS, Gateway, envoy_missing, gateway
from picker.config import HealthConfig
from picker.envoy import Json
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import Fault, MetricsFault, PodOptions
from picker.types import Decision, Failed, Finished, HealthObserved, LoadObserved, ResponseStarted, ScrapeFailed

pytestmark = pytest.mark.e2e

MODEL = "demo"
CHAT = "/v1/chat/completions"


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@dataclass(slots=True)
class World:
    gate: Gateway
    pods: list[Pod]
    client: aiohttp.ClientSession

    async def post(self, body: Any, path: str = CHAT) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        async with self.client.post(self.gate.url + path, data=io.BytesIO(data), headers=headers) as response:
            text = await response.read()
            return response.status, json.loads(text)

    def named(self, since: int) -> set[str]:
        """The endpoints that requests after this one were sent to first."""
        recent = [record for record in self.gate.app.runtime.recent(256) if record.request.id > since]
        return {record.outcome.endpoint.name for record in recent if isinstance(record.outcome, Decision)}

    async def serving(self, count: int) -> None:
        """Ask, several at a time, until so many pods have answered, which is to be long before their rests are over."""
        answered: set[str] = set()
        async with asyncio.timeout(20.0):
            while len(answered) < count:
                answered.update(await asyncio.gather(*(self.server() for _ in range(6))))
                answered.discard("")

    async def server(self) -> str:
        """Who answers a request well; empty when nobody does."""
        async with self.client.post(self.gate.url + CHAT, json=self.chat()) as response:
            await response.read()
            return response.headers["x-picker-endpoint"] if response.status == 200 else ""

    def chat(self, **more: Any) -> dict[str, Any]:
        return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, **more}


@asynccontextmanager
async def world(
    front_end: str, *, count: int = 2, time_scale: float = 50.0, host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[World]:
    pods_options = PodOptions(count=count, model=MODEL, time_scale=time_scale, host=host)
    async with (
        open_pods(pods_options) as pods,
        gateway(front_end, [pod.url for pod in pods], **options) as gate,
        aiohttp.ClientSession() as client,
    ):
        yield World(gate, pods, client)
        await gate.settled()
        states = gate.app.runtime.scheduler.snapshot(0.0)
        assert [state.inflight_requests for state in states] == [0] * len(states), "a charge leaked"


front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


@front_ends
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{not json", ["json"]),
        (b"[1, 2]", ["object"]),
        ({"model": MODEL}, ["messages"]),
        ({"model": MODEL, "messages": []}, ["messages"]),
        ({"model": MODEL, "messages": "hello"}, ["messages"]),
        ({"model": 7, "messages": [{"role": "user", "content": "x"}]}, ["model"]),
    ],
)
async def test_a_bad_body_is_refused_with_its_reason(front_end: str, body: Any, words: list[str]) -> None:
    async with world(front_end, count=1) as here:
        status, answer = await here.post(body)
        assert status == 400
        assert all(word in answer["error"]["message"].lower() for word in words), answer
        assert answer["error"]["code"] == 400
        assert not any(pod.in_flight for pod in here.pods)
        status, _ = await here.post(here.chat())
        assert status == 200


@front_ends
async def test_a_body_over_the_limit_is_refused_and_the_next_one_served(front_end: str) -> None:
    async with world(front_end, count=1) as here:
        huge = here.chat(messages=[{"role": "user", "content": "x" * 50_000_000}])
        status, answer = await here.post(huge)
        assert status == 413
        assert "33554432" in answer["error"]["message"]
        status, _ = await here.post(here.chat())
        assert status == 200


@front_ends
async def test_completions_without_a_prompt_are_refused(front_end: str) -> None:
    async with world(front_end, count=1) as here:
        status, answer = await here.post({"model": MODEL}, "/v1/completions")
        assert status == 400
        assert "prompt" in answer["error"]["message"]


@front_ends
async def test_a_client_that_leaves_mid_stream_frees_the_engine(front_end: str) -> None:
    async with world(front_end, time_scale=1.0) as here:
        body = here.chat(stream=True, max_tokens=5000, ignore_eos=True)
        async with aiohttp.ClientSession() as leaving:
            response = await leaving.post(here.gate.url + CHAT, json=body)
            await response.content.readany()
            response.close()
        await here.gate.settled()
        assert [fact.reason.value for fact in here.gate.facts if isinstance(fact, Failed)] == ["client-gone"]
        await here.gate.until(lambda: not any(pod.in_flight for pod in here.pods))


@front_ends
async def test_a_pod_that_resets_does_not_lose_the_request(front_end: str) -> None:
    async with world(front_end) as here:
        here.pods[0].fault = Fault(reset=True)
        answers = [await here.post(here.chat()) for _ in range(8)]
        assert [status for status, _ in answers] == [200] * 8


@front_ends
async def test_a_dead_pod_does_not_lose_the_request(front_end: str) -> None:
    async with world(front_end) as here:
        here.pods[0].restart(down_s=1e6)
        answers = [await here.post(here.chat()) for _ in range(8)]
        assert [status for status, _ in answers] == [200] * 8


@front_ends
async def test_with_all_pods_dead_the_client_is_told(front_end: str) -> None:
    async with world(front_end) as here:
        for pod in here.pods:
            pod.restart(down_s=1e6)
        await here.gate.until(lambda: not any(s.healthy for s in here.gate.app.runtime.scheduler.snapshot(0.0)))
        status, answer = await here.post(here.chat())
        assert status == 503
        assert answer["error"]["message"] == "No healthy endpoint."


@front_ends
async def test_after_a_total_outage_every_pod_is_in_service_moments_after_it_is_back(front_end: str) -> None:
    async with world(front_end, count=3) as here:  # rests last 30 s here
        for pod in here.pods:
            pod.restart(down_s=1e6)
        assert not any([await here.server() for _ in range(12)])
        for pod in here.pods:
            pod.restart()
        await here.serving(3)


@front_ends
async def test_pods_that_have_failed_all_requests_are_tried_again_soon(front_end: str) -> None:
    async with world(front_end, count=3, health=HealthConfig(eject_s=0.2, eject_max_s=600.0)) as here:
        for pod in here.pods:
            pod.fault = Fault(error_status=500)
        assert not any([await here.server() for _ in range(60)])
        for pod in here.pods:
            pod.fault = Fault()
        await here.serving(3)


@pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())
async def test_a_dead_pod_is_not_named_first_for_long_where_nobody_tells_who_served() -> None:
    async with world("envoy", count=3, change=silent) as here:
        dead = here.pods[0].url.removeprefix("http://")
        for _ in range(3):
            await here.post(here.chat())
        here.pods[0].restart(down_s=1e6)
        prompt = here.chat(messages=[{"role": "user", "content": "x" * 10_000}])
        while not any(isinstance(fact, HealthObserved) for fact in here.gate.facts):
            assert (await here.post(prompt))[0] == 200
        first = here.gate.app.runtime.recent(1)[0].request.id
        assert [(await here.post(prompt))[0] for _ in range(12)] == [200] * 12
        assert dead not in here.named(since=first)


def silent(config: Json) -> None:
    """A gateway that does not tell picker who answered."""
    (listener,) = config["static_resources"]["listeners"]
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    del filters[0]["typed_config"]["response_attributes"]


@pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6 loopback")
@front_ends
async def test_pods_at_ipv6_addresses_are_served_and_recognised_as_who_answered(front_end: str) -> None:
    async with world(front_end, host="::1") as here:
        await here.serving(2)
        await here.gate.settled()
        served = {fact.served_by for fact in here.gate.facts if isinstance(fact, ResponseStarted)}
        assert served == {pod.url.removeprefix("http://") for pod in here.pods}
        assert all(address is not None and address.startswith("[::1]:") for address in served)


@front_ends
async def test_a_pod_that_answers_500_is_avoided_after_a_few(front_end: str) -> None:
    async with world(front_end) as here:
        here.pods[0].fault = Fault(error_status=500)
        statuses = [(await here.post(here.chat()))[0] for _ in range(12)]
        assert statuses.count(500) <= 3
        assert statuses[-1] == 200


async def test_a_pod_that_hangs_is_given_up_in_time() -> None:
    async with world("proxy", count=1, first_byte_timeout_s=0.2) as here:
        here.pods[0].fault = Fault(hang=True)
        status, answer = await here.post(here.chat())
        assert status == 504
        assert "timeout" in answer["error"]["message"]


@front_ends
async def test_a_hanging_pod_gets_dearer_and_is_avoided(front_end: str) -> None:
    async with world(front_end, time_scale=1.0) as here:
        here.pods[0].fault = Fault(hang=True)
        name = here.pods[0].url.removeprefix("http://")
        async with asyncio.TaskGroup() as group:
            hung = [group.create_task(here.post(here.chat())) for _ in range(6)]
            await here.gate.until(lambda: sum(isinstance(fact, Finished) for fact in here.gate.facts) >= 1)
            for _ in range(10):
                status, _ = await here.post(here.chat())
                assert status == 200
            stuck = here.gate.app.runtime.scheduler.pool
            row = stuck.row(name)
            assert row is not None
            assert stuck.inflight[row] <= 6
            for task in hung:
                task.cancel()
        here.pods[0].fault = Fault()


@front_ends
async def test_a_stream_cut_by_the_pod_is_seen_to_be_cut(front_end: str) -> None:
    async with world(front_end, count=1, time_scale=1.0) as here:
        body = here.chat(stream=True, max_tokens=5000, ignore_eos=True)
        async with here.client.post(here.gate.url + CHAT, json=body) as response:
            await response.content.readany()
            here.pods[0].disconnect()
            with pytest.raises(aiohttp.ClientError):
                await response.read()


@pytest.mark.parametrize("metrics", [MetricsFault.HTML, MetricsFault.REFUSE])
async def test_broken_metrics_do_not_stop_traffic(metrics: MetricsFault) -> None:
    async with world("proxy") as here:
        for pod in here.pods:
            pod.fault = Fault(metrics=metrics)
        await here.gate.until(lambda: any(isinstance(fact, ScrapeFailed) for fact in here.gate.facts))
        statuses = [(await here.post(here.chat()))[0] for _ in range(6)]
        assert statuses == [200] * 6
        ages = [state.scrape_age_s for state in here.gate.app.runtime.scheduler.snapshot(here.gate.app.runtime.clock())]
        assert all(age is not None and age > 0 for age in ages)
        assert any(isinstance(fact, LoadObserved) for fact in here.gate.facts)


async def test_no_prompt_reaches_the_log_or_the_metrics(caplog: pytest.LogCaptureFixture) -> None:
    secret = "xyzzy-secret-words"
    async with world("proxy", count=1) as here:
        await here.post(here.chat(messages=[{"role": "user", "content": secret}]))
        await here.post({"model": "nope", "messages": [{"role": "user", "content": secret}]})
        await here.post(b'{"model": "demo", "messages": [{"role": "user", "content": "' + secret.encode() + b'"')
        here.pods[0].fault = Fault(error_status=500)
        await here.post(here.chat(messages=[{"role": "user", "content": secret}]))
        assert secret not in caplog.text
        assert secret not in here.gate.app.telemetry.text().decode()
        assert not any(secret in repr(record) for record in here.gate.app.runtime.recent())
