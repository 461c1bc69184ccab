from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from picker.sources.engine_post import EnginePost
from picker.sources.scrape import Manner
from picker.types import Endpoint, EndpointAdded, EndpointRemoved


@asynccontextmanager
async def engine() -> AsyncIterator[Endpoint]:
    """Answers with the key it was shown and what it was sent."""

    async def answer(request: web.Request) -> web.Response:
        said = request.headers.get("authorization", "no key").encode() + b": " + await request.read()
        return web.Response(body=said, status=200 if request.path == "/tokenize" else 404)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    async with TestServer(app) as server:
        address = f"{server.host}:{server.port}"
        yield Endpoint(address, address)


async def test_an_engine_is_asked_in_its_own_manner() -> None:
    async with engine() as endpoint:
        keys = {f"http://{endpoint.address}": "sesame"}
        async with EnginePost(manners=lambda root: Manner(keys.get(root))) as post:
            post.observe(EndpointAdded(endpoint))
            assert await post.of(endpoint.name, "/tokenize", b"text") == (200, b"Bearer sesame: text")
            keys.clear()
            assert await post.any("/elsewhere", b"") == (404, b"no key: ")


async def test_who_left_and_who_cannot_be_reached_are_errors_of_one_kind() -> None:
    async with engine() as endpoint, EnginePost() as post:
        post.observe(EndpointAdded(endpoint))
        post.observe(EndpointRemoved(endpoint.name))
        with pytest.raises(OSError, match="no such endpoint"):
            await post.of(endpoint.name, "/tokenize", b"")
        post.observe(EndpointAdded(Endpoint("gone", "127.0.0.1:1")))
        with pytest.raises(OSError, match="Client"):
            await post.of("gone", "/tokenize", b"")
