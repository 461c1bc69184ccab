"""`picker proxy --data-plane envoy --record`: what engines count is in the trace and in the access log."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from e2e.gateway import envoy_missing
from e2e.test_data_plane import config, gateway
from e2e.test_data_plane_whole import altered
from picker.app import App
from picker.commands import proxy_envoy
from picker.commands.proxy_control import Doors
from picker.config import ScrapeConfig
from picker.data_plane_usage import trial
from picker.envoy import validate
from picker.errors import ConfigError
from picker.load import trace


def cannot_read() -> str:
    """Why there is nothing to record with; empty where there is."""
    if missing := envoy_missing():
        return missing
    try:
        validate(trial())
    except ConfigError:
        return "this Envoy does not read answers"
    return ""


pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]
reads = pytest.mark.skipif(bool(cannot_read()), reason=cannot_read())

CHUNK = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}], "usage": None}
CHATS = {"prompt_tokens": 90, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}
RESPONSES = {"input_tokens": 80, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 48}}
# Anthropic's counts leave out what was cached.
MESSAGES = {"input_tokens": 20, "cache_read_input_tokens": 50, "output_tokens": 1}
PROMPT = "word " * 100


def events(*told: Any) -> web.Response:
    lines = [f"event: {each.get('type', 'message')}\ndata: {json.dumps(each)}\n\n" for each in told]
    text = "".join(lines) + "data: [DONE]\n\n"
    return web.Response(text=text, content_type="text/event-stream")


def answered(request: dict[str, Any], path: str) -> web.Response:
    size = int(request.get("user", "0"))
    match path, request.get("stream"):
        case "/v1/chat/completions", True if "logit_bias" in request:
            broken = (b'{"usage": {"\xff": "\xed\xa0\x80"}}', b'{"usage": {"a": "\\ud800"}}', b'{"usage": 7}')
            body = b"".join(b"data: " + each + b"\n\n" for each in broken)
            return web.Response(body=body, content_type="text/event-stream")
        case "/v1/chat/completions", True:
            return events(CHUNK, CHUNK, *([{"choices": [], "usage": CHATS}] if "stream_options" in request else []))
        case "/v1/chat/completions", _:
            return web.json_response({"choices": [], "usage": CHATS, "text": "x" * size})
        case "/v1/responses", True:
            return events({"type": "response.completed", "response": {"usage": RESPONSES}})
        case "/v1/responses", _:
            return web.json_response({"output": [], "usage": RESPONSES})
        case "/v1/messages", True:
            start = {"type": "message_start", "message": {"usage": MESSAGES}}
            return events(start, {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}})
        case "/v1/messages", _:
            return web.json_response({"content": [], "usage": MESSAGES})
    raise AssertionError(path)


@asynccontextmanager
async def engine() -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.Response:
        return answered(await request.json(), request.path) if request.method == "POST" else web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


Asked = tuple[str, dict[str, Any], tuple[int, int | None, int | None]]
CHAT = {"messages": [{"role": "user", "content": PROMPT}]}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
UNKNOWN = (33, None, None)  # the length that was allowed, as where picker carries the bytes
ASKED: list[Asked] = [
    ("/v1/chat/completions", CHAT, (7, 90, 64)),
    ("/v1/chat/completions", CHAT | WITH_USAGE, (7, 90, 64)),
    ("/v1/chat/completions", CHAT | {"stream": True}, UNKNOWN),
    ("/v1/chat/completions", CHAT | {"stream": True, "logit_bias": {}}, UNKNOWN),
    ("/v1/chat/completions", CHAT | {"user": "99000"}, (7, 90, 64)),
    ("/v1/chat/completions", CHAT | {"user": "170000"}, UNKNOWN),
    ("/v1/chat/completions", CHAT | {"user": "3000000"}, UNKNOWN),
    ("/v1/responses", {"input": PROMPT}, (6, 80, 48)),
    ("/v1/responses", {"input": PROMPT, "stream": True}, (6, 80, 48)),
    ("/v1/messages", CHAT, (1, 70, 50)),
    ("/v1/messages", CHAT | {"stream": True}, (5, 70, 50)),
]


@reads
async def test_what_engines_count_is_recorded_and_answers_pass_whole(tmp_path: Path) -> None:
    record, log = tmp_path / "trace.jsonl", tmp_path / "log"
    async with engine() as address:
        settings = altered(config(address), record=str(record), scrape=ScrapeConfig(interval_s=60.0))
        async with gateway(tmp_path, settings, log=log) as world:
            for path, body, _ in ASKED:
                limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 33}
                status, _, found = await world.ask(path, json={"model": "m", **body, **limit})
                assert (status, len(found) > int(body.get("user", "0"))) == (200, True), (path, body)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    wanted = [counts for _, _, counts in ASKED]
    assert [(x["output_length"], x.get("prompt_tokens"), x.get("cached_tokens")) for x in lines] == wanted
    assert len({tuple(line["hash_ids"]) for line in lines[:7]}) == 1
    logged = sorted(map(json.loads, log.read_text().splitlines()), key=lambda line: line["id"])
    told = [None if counts is UNKNOWN else counts for counts in wanted]
    fields = [(x["output_tokens"], x["prompt_tokens"], x["cached_tokens"]) for x in logged]
    assert [None if found == (None, None, None) else found for found in fields] == told
    assert [each.output_tokens for each in trace.load(record)] == [counts[0] for counts in wanted]


@pytest.mark.skipif(not cannot_read(), reason="this Envoy reads answers")
def test_an_envoy_that_cannot_read_answers_is_refused(tmp_path: Path) -> None:
    settings = altered(config("127.0.0.1:1"), record=str(tmp_path / "trace"))
    with pytest.raises(ConfigError, match="record: --data-plane envoy needs an Envoy that reads tokens"):
        proxy_envoy.build(App(settings), tmp_path, Doors(settings), None)


def test_whatever_refuses_the_filters_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "envoy"
    binary.write_text("#!/bin/sh\nexit 1\n")
    binary.chmod(0o755)
    settings = altered(config("127.0.0.1:1", envoy_binary=str(binary)), record=str(tmp_path / "trace"))
    with pytest.raises(ConfigError, match="record: --data-plane envoy needs an Envoy that reads tokens"):
        proxy_envoy.build(App(settings), tmp_path, Doors(settings), None)
