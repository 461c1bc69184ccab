"""What engines of each kind say of themselves, and what is made of those that say nothing."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from dead_port import dead_port
from picker.engine_survey import LLAMA_CPP, SGLANG, VLLM, Found, survey
from picker.types import Endpoint

VLLM_PAGE = """
vllm:num_requests_running{engine="0"} 0
vllm:num_requests_waiting{engine="0"} 0
vllm:kv_cache_usage_perc{engine="0"} 0
vllm:cache_config_info{block_size="16",enable_prefix_caching="%s",num_gpu_blocks="4097"} 1
"""
SGLANG_PAGE = "\nsglang:num_running_reqs 0\nsglang:num_queue_reqs 0\nsglang:token_usage 0\n"


def models(owner: str) -> dict[str, Any]:
    base = {"id": "m", "object": "model", "owned_by": owner, "parent": None, "max_model_len": 4096}
    return {"object": "list", "data": [base, base | {"id": "ad", "parent": "m", "max_model_len": None}]}


@asynccontextmanager
async def engine(routes: Mapping[str, Any], *, details: bool = True) -> AsyncIterator[tuple[Endpoint, list[Any]]]:
    """An endpoint that has these routes, and what it was asked to complete."""
    asked: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/completions" and request.method == "POST":
            asked.append(await request.json())
            usage = {"prompt_tokens": 20, "completion_tokens": 1}
            return web.json_response(
                {"usage": usage | ({"prompt_tokens_details": {"cached_tokens": 0}} if details else {})}
            )
        found = routes.get(request.path)
        if isinstance(found, int):
            return web.Response(status=found)
        if found is None:
            raise web.HTTPNotFound
        return web.Response(text=found) if isinstance(found, str) else web.json_response(found)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield Endpoint("e", f"{host}:{port}"), asked
    finally:
        await runner.cleanup()


async def ask(endpoint: Endpoint, **options: Any) -> Found:
    async with survey(**({"timeout": 2.0} | options)) as surveyor:
        return await surveyor.ask(endpoint)


@pytest.mark.parametrize("caching", [True, False])
async def test_vllm_is_known_by_its_metrics(caching: bool) -> None:
    routes = {
        "/v1/models": models("vllm"),
        "/metrics": VLLM_PAGE % caching,
        "/version": {"version": "0.32.0"},
        "/kv_event_sources": {"0": {"enable_kv_cache_events": True, "endpoint": "tcp://*:5557"}},
    }
    async with engine(routes, details=caching) as (endpoint, asked):
        found = await ask(endpoint)
    assert (found.kind, found.version, found.models, found.adapters) == (VLLM, "0.32.0", ("m",), ("ad",))
    assert (found.max_model_len, found.block_size, found.kv_tokens) == (4096, 16, 65_536)
    assert (found.caching, found.events, found.told, found.loaded) == (caching, True, caching, True)
    assert [(each["model"], each["max_tokens"]) for each in asked] == [("m", 1)]


async def test_sglang_is_known_by_what_it_was_started_with_and_asked_for_no_token() -> None:
    server = {
        "version": "0.5.11",
        "disable_radix_cache": True,
        "enable_cache_report": False,
        "kv_events_config": None,
        "page_size": 64,
        "context_length": 8192,
        "max_total_num_tokens": 100_000,
    }
    routes = {"/v1/models": models("sglang"), "/metrics": SGLANG_PAGE, "/get_server_info": server}
    async with engine(routes) as (endpoint, asked):
        found = await ask(endpoint)
    assert (found.kind, found.version, found.block_size, found.kv_tokens) == (SGLANG, "0.5.11", 64, 100_000)
    assert (found.caching, found.events, found.told) == (False, False, False)
    assert not asked


async def test_an_engine_without_metrics_is_known_by_the_owner_of_its_models() -> None:
    async with engine({"/v1/models": models("llamacpp")}) as (endpoint, asked):
        found = await ask(endpoint)
    assert (found.problem, found.kind, found.loaded, found.told) == (None, LLAMA_CPP, False, None)
    assert not asked


async def test_no_token_is_made_when_that_is_not_wanted() -> None:
    async with engine({"/v1/models": models("vllm"), "/metrics": VLLM_PAGE % True}) as (endpoint, asked):
        assert (await ask(endpoint, probe=False)).told is None
    assert not asked


@pytest.mark.parametrize("page", ["<html>", "[1]", json.dumps({"data": 3})])
async def test_who_is_no_engine_is_said_to_be_none(page: str) -> None:
    async with engine({"/v1/models": page, "/metrics": page, "/version": page, "/get_server_info": page}) as (
        endpoint,
        _,
    ):
        assert (await ask(endpoint)).problem == "it answers, and lists no models: is it an engine?"


async def test_who_is_not_there_is_told_in_words() -> None:
    with dead_port() as address:
        assert (await ask(Endpoint("e", address))).problem == "connection refused"
    assert (await ask(Endpoint("e", "nowhere.invalid:80"))).problem == "no such host"


@pytest.mark.parametrize("routes", [{"/v1/models": 503, "/metrics": 508}, {"/v1/models": 508}])
async def test_an_address_that_leads_back_is_said_to(routes: dict[str, int]) -> None:
    async with engine(routes) as (endpoint, _):
        assert (await ask(endpoint)).problem == "its address leads back to this gateway"


async def test_an_engine_that_cannot_serve_is_said_to() -> None:
    async with engine({"/v1/models": 503}) as (endpoint, _):
        assert (await ask(endpoint)).problem == "says that it cannot serve (503)"
