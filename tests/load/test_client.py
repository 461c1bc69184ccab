from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dead_port import dead_port
from load.fake_openai import DONE, FakeAnswer, FakeServer, Json, Script, answer_well, chunk, fake_server, usage
from picker.errors import ConfigError
from picker.load.client import Api, Client, Record, Target, UnreachableError


@asynccontextmanager
async def asking(script: Script = answer_well, **options: object) -> AsyncIterator[tuple[Client, FakeServer]]:
    async with fake_server(script) as server:
        target = Target(server.url, model="m", **options)  # type: ignore[arg-type]
        async with Client(target) as client:
            yield client, server


async def one(script: Script, **options: object) -> Record:
    async with asking(script, **options) as (client, _):
        record, _ = await client.ask(client.body([("user", "hi there")], 2), intended_at=0.0)
        return record


async def test_a_good_answer_is_measured_from_the_intended_time() -> None:
    record = await one(answer_well)
    assert record.error is None
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (2, 2, 1)
    assert record.endpoint == "pod-1:8000"
    assert record.first_at is not None
    assert record.intended_at < record.sent_at < record.first_at <= record.ended_at
    assert record.ttft == record.first_at
    assert record.e2e == record.ended_at
    assert record.tpot == record.ended_at - record.first_at
    assert record.delay == record.sent_at


async def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    async def short(_: Json, answer: FakeAnswer) -> None:
        await answer.start()
        await answer.send(chunk("x") + usage(1, 1) + DONE)

    record = await one(short)
    assert (record.tpot, record.endpoint) == (None, "unknown")


async def refuse(_: Json, answer: FakeAnswer) -> None:
    answer.refuse(503, "no endpoints")


async def reset_at_once(_: Json, answer: FakeAnswer) -> None:
    answer.reset()
    answer.refuse(500)


async def reset_inside(_: Json, answer: FakeAnswer) -> None:
    await answer.start()
    await answer.send(chunk("x"))
    answer.reset()


async def stop_early(_: Json, answer: FakeAnswer) -> None:
    await answer.start()
    await answer.send(chunk("x"))


async def break_down(_: Json, answer: FakeAnswer) -> None:
    await answer.start()
    await answer.send(b'data: {"error": {"message": "out of memory"}}\n\n' + DONE)


async def not_stream(_: Json, answer: FakeAnswer) -> None:
    await answer.start({"content-type": "application/json"})
    await answer.send(b'{"choices": []}')


async def hang(_: Json, answer: FakeAnswer) -> None:
    await answer.start()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("script", "error", "detail"),
    [
        (refuse, "http-503", "no endpoints"),
        (reset_at_once, "reset", ""),
        (reset_inside, "truncated", ""),
        (stop_early, "truncated", "[DONE]"),
        (break_down, "error-event", "out of memory"),
        (not_stream, "not-a-stream", "application/json"),
    ],
)
async def test_each_failure_has_its_class(script: Script, error: str, detail: str) -> None:
    record = await one(script)
    assert record.error == error
    assert detail in record.detail
    assert (record.ttft, record.e2e, record.tpot) == (None, None, None)


async def test_a_server_that_hangs_is_a_time_out() -> None:
    assert (await one(hang, timeout=0.05)).error == "timeout"


async def test_a_port_that_nobody_listens_on_is_a_failed_connect() -> None:
    with dead_port() as address:
        async with Client(Target(f"http://{address}", model="m")) as client:
            record, stream = await client.ask(b"{}", intended_at=0.0)
    assert (record.error, record.endpoint, stream) == ("connect", "unknown", None)


async def test_a_request_asks_for_a_stream_with_usage_and_a_fixed_length() -> None:
    async with asking() as (client, server):
        await client.ask(client.body([("system", "s"), ("user", "u")], 7), intended_at=0.0)
    request = server.requests[0]
    assert request["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert (request["model"], request["max_tokens"], request["ignore_eos"]) == ("m", 7, True)


async def test_completions_get_one_prompt_and_strict_servers_no_extensions() -> None:
    async def finish(_: Json, answer: FakeAnswer) -> None:
        await answer.start()
        await answer.send(b'data: {"choices":[{"text":"x"}]}\n\n' + DONE)

    async with asking(finish, api=Api.COMPLETIONS, ignore_eos=False) as (client, server):
        record, _ = await client.ask(client.body([("system", "a "), ("user", "b")], 7), intended_at=0.0)
    assert record.error is None
    assert server.requests[0]["prompt"] == "a b"
    assert "ignore_eos" not in server.requests[0]


async def test_the_api_key_is_sent_and_never_shown() -> None:
    async with asking(api_key="secret") as (client, server):
        await client.ask(client.body([("user", "u")], 1), intended_at=0.0)
        assert "secret" not in repr(client.target)
    assert server.headers[0]["authorization"] == "Bearer secret"


async def test_the_first_model_is_taken_unless_one_is_named() -> None:
    async with fake_server(models=["first", "second"]) as server:
        async with Client(Target(server.url + "/v1/")) as client:
            assert await client.find_model() == "first"
        async with Client(Target(server.url, model="mine")) as client:
            assert await client.find_model() == "mine"


async def test_a_server_that_is_not_there_or_serves_nothing_is_named() -> None:
    with dead_port() as address:
        url = f"http://{address}"
        async with Client(Target(url)) as client:
            with pytest.raises(UnreachableError, match=f"{url} does not answer"):
                await client.find_model()
    async with fake_server(models=[]) as server, Client(Target(server.url)) as client:
        with pytest.raises(UnreachableError, match="--model"):
            await client.find_model()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Target(url)


@pytest.mark.parametrize("root", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_urls_work_with_and_without_v1(root: str) -> None:
    assert Target(root).path("models") == "http://h:1/v1/models"
