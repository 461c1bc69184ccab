"""Requests for another model than they name, through every front end, with real sockets and a real Envoy."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import fakes
from e2e.gateway import envoy_missing
from picker.access_log import RequestLog
from picker.app import App
from picker.commands import proxy_envoy
from picker.commands.proxy_control import Doors
from picker.config import Config, from_values
from picker.envoy import GATEWAY, Json, bootstrap, running_envoy, typed
from picker.envoy_process import Running
from picker.frontends.extproc import ExtProc, Mode
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.types import Fact

CHAT, FORMS = "/v1/chat/completions", "/v1/audio/transcriptions"
needs_envoy = pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())
FOLLOWING = ["proxy", pytest.param("full", marks=needs_envoy)]
# With keys, heads come before bodies; without, requests come in one message.
ALL = [*FOLLOWING, *(pytest.param(name, marks=needs_envoy) for name in ("lean", "own envoy", "own envoy, keys"))]
KEY = "sesame-sesame-sesame"
LONG = 'a "model":"chat" b ' * 8000  # several chunks of a stream to picker, and back


class Engine:
    """Serves one model and refuses others, as vLLM does. asked: the bodies that came, as they came."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.address = ""
        self.asked: list[tuple[dict[str, str], bytes]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = "{}:{}".format(*runner.addresses[0][:2])
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(({name.lower(): value for name, value in request.headers.items()}, body))
        if request.path == FORMS:
            return web.json_response({"text": "hello"})
        asked = json.loads(body)
        if asked["model"] != self.model:
            return web.json_response(
                {"error": {"message": f"The model `{asked['model']}` does not exist."}}, status=404
            )
        return await self._stream(request) if asked.get("stream") else self._whole()

    def _whole(self) -> web.Response:
        choice = {"index": 0, "message": {"role": "assistant", "content": '"model":"v2"'}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
        return web.json_response({"id": "1", "model": self.model, "choices": [choice], "usage": usage})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for content in ("Hel", "lo"):
            chunk = {
                "object": "chat.completion.chunk",
                "model": self.model,
                "choices": [{"delta": {"content": content}}],
            }
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@dataclass(slots=True)
class World:
    app: App
    url: str
    engines: dict[str, Engine]
    client: aiohttp.ClientSession
    log: Path

    async def listed(self) -> dict[str, str]:
        """The names that clients are told, and what each stands for."""
        async with self.client.get(self.url + "/v1/models") as response:
            return {entry["id"]: entry.get("root", entry["id"]) for entry in (await response.json())["data"]}

    async def post(self, path: str = CHAT, **options: Any) -> tuple[int, bytes]:
        async with self.client.post(self.url + path, **options) as response:
            return response.status, await response.read()

    async def chat(self, model: str | None = "chat", **fields: Any) -> tuple[int, Any]:
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            **({} if model is None else {"model": model}),
            **fields,
        }
        status, answer = await self.post(json=body)
        return status, answer if fields.get("stream") else json.loads(answer)

    def rewrite(self, **weights: int) -> None:
        """As a reload of the configuration does it."""
        self.app.runtime.limits = self.app.limits_of(settings([], {"chat": weights}))

    @property
    def bodies(self) -> list[bytes]:
        return [body for engine in self.engines.values() for _, body in engine.asked]


def settings(addresses: list[str], rules: dict[str, dict[str, int]], **models: Any) -> Config:
    rewrites = [
        {
            "name": "canary",
            **({"matches": [{"model": {"value": name}}]} if name else {}),
            "targets": [{"modelRewrite": target, "weight": weight} for target, weight in weights.items()],
        }
        for name, weights in rules.items()
    ]
    return from_values(
        {
            "endpoints": addresses,
            "seed": 1,
            "scrape": {"interval_s": 0.05, "timeout_s": 0.5},
            "health": {"eject_after": 3, "eject_s": 30.0},
            "models": {"rewrites": rewrites, **models},
            "drain_timeout_s": 0.5,
            "proxy": {"port": 0, "envoy_threads": 1, "drain_delay_s": 0.0},
        }
    )


@asynccontextmanager
async def world(
    way: str,
    tmp_path: Path,
    rules: dict[str, dict[str, int]] | None = None,
    filters: Sequence[Json] = (),
    **models: Any,
) -> AsyncIterator[World]:
    """Engines for `v1` and `v2` behind picker, whose models are known, and a log of requests."""
    async with AsyncExitStack() as opened:
        engines = {name: await opened.enter_async_context(Engine(name).running()) for name in ("v1", "v2")}
        addresses = [engine.address for engine in engines.values()]
        app = App(settings(addresses, {"chat": {"v2": 1}} if rules is None else rules, **models))
        journal = RequestLog(str(tmp_path / "log"), clock=app.runtime.clock)
        app.telemetry.watch(journal)
        news, leave, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def heard(fact: Fact) -> None:
            news.set()

        fakes.Ear(app.runtime, heard)
        client = await opened.enter_async_context(
            aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}, timeout=aiohttp.ClientTimeout(total=20))
        )
        async with asyncio.TaskGroup() as group, AsyncExitStack() as front:
            url = await _front(way, app, tmp_path, journal, addresses, filters, group, front, leave, stop)
            while sum(bool(state.models) for state in app.runtime.scheduler.snapshot(0.0)) < len(engines):
                news.clear()
                await news.wait()
            yield World(app, url, engines, client, tmp_path / "log")
            await client.close()
            leave.set()
            stop.set()
        journal.close()


async def _front(
    way: str,
    app: App,
    folder: Path,
    journal: RequestLog,
    addresses: list[str],
    filters: Sequence[Json],
    group: asyncio.TaskGroup,
    front: AsyncExitStack,
    leave: asyncio.Event,
    stop: asyncio.Event,
) -> str:
    """Begin to serve; returns where."""
    if way == "proxy":
        listener = listen("127.0.0.1", 0)
        proxy = Proxy(app.runtime, grace=0.5, journal=journal, merge_models=True)
        group.create_task(app.run([lambda stop: proxy.serve(listener, stop)], stop))
        return f"http://127.0.0.1:{port_of(listener)}"
    if way.startswith("own envoy"):
        doors = Doors(app.config, KEY if way.endswith("keys") else None)
        plane = proxy_envoy.build(app, folder, doors, journal)
        begun: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        group.create_task(app.run([lambda stop: plane.serve(leave, stop, begun.set_result)], stop))
        return f"http://127.0.0.1:{(await begun).port}"
    epp = ExtProc(app.runtime, mode=Mode(way), predict=lambda _: 60.0)
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve(stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            serving = epp.serve("127.0.0.1", 0, grace=0.5, ready=lambda port, _: bound.set_result(port))
            tasks.create_task(serving)
            await stop.wait()
            epp.shutdown()

    group.create_task(app.run([serve], stop))
    configuration = bootstrap(addresses, f"127.0.0.1:{await bound}", lean=way == "lean", filters=filters)
    envoy = await front.enter_async_context(running_envoy(configuration))
    return f"http://127.0.0.1:{envoy.ports[GATEWAY]}"


pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("way", ALL)
async def test_engines_are_asked_for_the_target_and_get_every_other_byte(way: str, tmp_path: Path) -> None:
    rules = {"chat": {"v2": 1}, "a-rather-long-name-that-clients-use": {"v2": 1}, "c": {"v2": 1}}
    async with world(way, tmp_path, rules) as this:
        for name, text in (*((name, "Hello") for name in rules), ("chat", LONG), ("v2", "Hello")):
            content = json.dumps(text)
            body = f'{{"messages":[{{"role":"user","content":{content}}}], "model" : "{name}","n":1 }}'.encode()
            status, _ = await this.post(data=body, headers={"content-type": "application/json"})
            assert status == 200
            assert this.bodies == [body.replace(b'"model" : "' + name.encode(), b'"model" : "v2')]
            headers, received = this.engines["v2"].asked.pop()
            assert headers.get("content-length", str(len(received))) == str(len(received))
        form = aiohttp.FormData({"model": "chat"})
        form.add_field("file", bytes(range(256)) * 500, filename="a.wav")
        assert (await this.post(FORMS, data=form))[0] == 200
        ((_, received),) = this.engines["v2"].asked
        assert b'name="model"\r\n\r\nv2\r\n' in received
        assert bytes(range(256)) * 500 in received
        # Where picker does not see answers they name the engine's model.
        assert (await this.chat())[1]["model"] == ("chat" if way in ("proxy", "full") else "v2")


@pytest.mark.parametrize("way", FOLLOWING)
async def test_answers_name_the_model_that_was_asked_for(way: str, tmp_path: Path) -> None:
    async with world(way, tmp_path) as this:
        _, answer = await this.chat()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("chat", '"model":"v2"')
        _, events = await this.chat(stream=True)
        assert events.count(b'"model": "chat"') == 2
        assert b"v2" not in events
        assert (await this.chat("v2"))[1]["model"] == "v2"


@pytest.mark.parametrize("way", ["proxy", pytest.param("lean", marks=needs_envoy)])
async def test_weights_changed_while_requests_run_apply_to_the_next(way: str, tmp_path: Path) -> None:
    async with world(way, tmp_path, {}) as this:
        for share in (0.9, 0.2):
            this.rewrite(v1=round(share * 10), v2=round((1 - share) * 10))
            for _ in range(10):  # ten at a time: connections are not what is tested
                assert {status for status, _ in await asyncio.gather(*(this.chat() for _ in range(10)))} == {200}
            found = Counter({name: len(engine.asked) for name, engine in this.engines.items()})
            assert abs(found["v1"] - 100 * share) <= 3 * (100 * share * (1 - share)) ** 0.5
            for engine in this.engines.values():
                engine.asked.clear()
        this.rewrite(v2=1)
        await this.chat()
        assert not this.engines["v1"].asked


@pytest.mark.parametrize("way", ["proxy", pytest.param("own envoy", marks=needs_envoy)])
async def test_names_that_are_rewritten_are_listed_by_the_rules_in_force(way: str, tmp_path: Path) -> None:
    async with world(way, tmp_path, {"chat": {"v2": 1}, "nobody": {"v3": 1}}) as this:
        served = {"v1": "v1", "v2": "v2"}
        assert await this.listed() == served | {"chat": "v2"}
        async with this.client.get(this.url + "/v1/models/chat") as response:
            assert (response.status, (await response.json())["id"]) == (200, "chat")
        async with this.client.get(this.url + "/v1/models/nobody") as response:
            assert response.status == 404
        this.rewrite(v1=1, v2=1)
        assert await this.listed() == served | {"chat": "chat"}
        this.rewrite(v3=1)
        assert await this.listed() == served


@pytest.mark.parametrize("way", FOLLOWING)
async def test_a_target_that_nobody_serves_is_said_with_the_rewrite_that_leads_there(way: str, tmp_path: Path) -> None:
    async with world(way, tmp_path, {"chat": {"v3": 1}}) as this:
        status, answer = await this.chat()
        assert status == 404
        assert "The model `v3` does not exist" in answer["error"]["message"]
        assert "names `chat`; the rewrite 'canary' leads from there" in answer["error"]["message"]


SAID = {"x-llm-d-model-name-rewrite": "v1"}


@pytest.mark.parametrize(
    ("way", "heeded", "served"),
    [
        ("proxy", True, "v1"),
        ("proxy", False, "v2"),
        pytest.param("full", True, "v1", marks=needs_envoy),
        pytest.param("lean", True, "v1", marks=needs_envoy),
        pytest.param("own envoy", True, "v1", marks=needs_envoy),
        pytest.param("own envoy, keys", True, "v1", marks=needs_envoy),
        pytest.param("own envoy", False, "v2", marks=needs_envoy),
    ],
)
async def test_a_gateways_header_wins_where_it_is_heeded(way: str, heeded: bool, served: str, tmp_path: Path) -> None:
    # What clients say so is taken away by an Envoy in front of `picker epp`: there the gateway says it.
    gateway_says = [_saying(SAID)] if way in ("full", "lean") else []
    async with world(way, tmp_path, filters=gateway_says, rewrite_header=heeded) as this:
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]}
        assert (await this.post(json=body, headers=SAID))[0] == 200
        ((headers, received),) = this.engines[served].asked
        assert json.loads(received)["model"] == served
        assert way == "proxy" or not set(SAID) & set(headers)


def _saying(headers: dict[str, str]) -> Json:
    added = [
        {"append": {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
        for name, value in headers.items()
    ]
    config = {"mutations": {"request_mutations": added}}
    return typed("envoy.filters.http.header_mutation", "filters.http.header_mutation.v3.HeaderMutation", **config)


@pytest.mark.parametrize("way", ["proxy", pytest.param("own envoy", marks=needs_envoy)])
async def test_log_and_metrics_tell_both_models(way: str, tmp_path: Path) -> None:
    async with world(way, tmp_path) as this:
        await this.chat()
        await this.chat("v1")
        text = this.app.telemetry.text().decode()
        assert 'picker_model_rewrites_total{model="chat",rewrite="canary",target_model="v2"} 1.0' in text
    lines = sorted(map(json.loads, this.log.read_text().splitlines()), key=lambda line: int(line["id"]))
    assert [(line["model"], line["target_model"]) for line in lines] == [("chat", "v2"), ("v1", "v1")]
