"""The official Anthropic SDK, through the proxy and through a real Envoy with ext-proc, to servers that speak its API.

The servers answer as vLLM's `/v1/messages` does; `tests/real_vllm` asks the real one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anthropic
import pytest
from aiohttp import web

from e2e.gateway import FRONT_ENDS, Gateway, gateway
from picker.types import Decision

pytestmark = pytest.mark.e2e

MODEL = "demo"
WORDS = ["Once", " upon", " a", " time"]
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "messages": [{"role": "user", "content": "Tell a story."}]}


def message(content: list[dict[str, Any]], stop: str | None, tokens: int) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "output_tokens": tokens},
    }


def told() -> list[tuple[str, dict[str, Any]]]:
    """The events of a streamed answer, in Anthropic's order."""
    block = {"type": "text", "text": ""}
    deltas = [{"index": 0, "delta": {"type": "text_delta", "text": word}} for word in WORDS]
    return [
        ("message_start", {"message": message([], None, 0)}),
        ("content_block_start", {"index": 0, "content_block": block}),
        *(("content_block_delta", delta) for delta in deltas),
        ("content_block_stop", {"index": 0}),
        ("message_delta", {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 4}}),
        ("message_stop", {}),
    ]


async def messages(request: web.Request) -> web.StreamResponse:
    ask = await request.json()
    if ask["model"] != MODEL:
        error = {"type": "error", "error": {"type": "not_found_error", "message": f"no model {ask['model']}"}}
        return web.json_response(error, status=404)
    if not ask.get("stream"):
        return web.json_response(message([{"type": "text", "text": "".join(WORDS)}], "end_turn", 4))
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for name, fields in told():
        await response.write(f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode())
    await response.write_eof()
    return response


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0}]})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(text=METRICS)


@asynccontextmanager
async def server() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/messages", messages)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


METRICS = "".join(
    f'# TYPE vllm:{name} gauge\nvllm:{name}{{engine="0",model_name="{MODEL}"}} 0.0\n'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
)


@pytest.fixture(params=FRONT_ENDS)
async def gate(request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(server()) for _ in range(2)]
        yield await stack.enter_async_context(gateway(request.param, urls))


@pytest.fixture
async def client(gate: Gateway) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=gate.url, api_key="none", max_retries=0) as client:
        yield client


async def test_a_message_answers_with_usage(client: anthropic.AsyncAnthropic, gate: Gateway) -> None:
    answer = await client.messages.create(**ASK)
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "".join(WORDS)
    assert answer.usage.output_tokens == 4
    await gate.settled()


async def test_a_streamed_message_has_every_word_in_order(client: anthropic.AsyncAnthropic, gate: Gateway) -> None:
    async with client.messages.stream(**ASK, system="You are terse.") as stream:
        words = [word async for word in stream.text_stream]
        final = await stream.get_final_message()
    assert words == WORDS
    assert final.stop_reason == "end_turn"
    await gate.settled()


async def test_a_conversation_goes_where_its_beginning_is(client: anthropic.AsyncAnthropic, gate: Gateway) -> None:
    """Told by picker's own decisions: the second turn matches what the first one left behind."""
    said: list[Any] = [{"role": "user", "content": "A long question about caches. " * 80}]
    first = await client.messages.with_raw_response.create(model=MODEL, max_tokens=8, messages=said)
    said += [{"role": "assistant", "content": "".join(WORDS)}, {"role": "user", "content": "And then?"}]
    second = await client.messages.with_raw_response.create(model=MODEL, max_tokens=8, messages=said)
    assert first.headers["x-picker-endpoint"] == second.headers["x-picker-endpoint"]
    record = gate.app.runtime.record(int(second.headers["x-picker-request-id"]))
    assert record is not None
    assert isinstance(record.outcome, Decision)
    assert record.outcome.matched_blocks > 0
    await gate.settled()


async def test_an_unknown_model_is_an_error_that_the_sdk_understands(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.APIStatusError) as error:
        await client.messages.create(**(ASK | {"model": "other"}))
    assert error.value.status_code == 404
