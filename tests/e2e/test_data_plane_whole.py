"""`picker proxy --data-plane envoy` without keys: requests that reach picker in one message, and those that cannot."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from e2e.gateway import envoy_missing
from e2e.test_data_plane import BODY, CHAT, KEY, World, config, gateway
from echo_upstream import EchoUpstream, Seen
from picker.config import Config, Match, ModelMatch, ModelsConfig, QueueConfig, RewriteSpec, Target
from picker.frontends import own_extproc
from picker.frontends.keys import named_key

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]


def chats(upstream: EchoUpstream) -> list[Seen]:
    return [seen for seen in upstream.seen if seen.path == CHAT]


def altered(settings: Config, **values: Any) -> Config:
    return Config(**{name: getattr(settings, name) for name in settings.__struct_fields__} | values)


async def raw(world: World, head: str | bytes, body: bytes = b"") -> tuple[int, Mapping[str, str]]:
    """A request as it stands, on a connection of its own: its status and headers."""
    host, _, port = world.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write((head.encode() if isinstance(head, str) else head) + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    writer.close()
    fields = (line.partition(": ") for line in answer[1:] if line)
    return int(answer[0].split()[1]), {name.lower(): value for name, _, value in fields}


async def until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110 nobody else is told
        await asyncio.sleep(0.01)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the first message of each call was a whole request."""
    found: list[bool] = []
    answered = own_extproc.OwnExtProc._answered

    def watch(self: Any, *arguments: Any) -> bool:
        found.append(answered(self, *arguments))
        return found[-1]

    monkeypatch.setattr(own_extproc.OwnExtProc, "_answered", watch)
    return found


async def test_a_request_with_a_body_is_one_message_and_its_end_is_told(tmp_path: Path, messages: list[bool]) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        status, headers, _ = await world.ask()
        assert (status, headers["x-picker-endpoint"], headers["x-picker-request-id"]) == (200, a.address, "1")
        assert messages == [True]
        (seen,) = chats(a)
        assert (seen.headers["x-picker-request-id"], json.loads(seen.body)) == ("1", BODY)
        async with asyncio.timeout(5.0):
            await until(lambda: not len(world.plane.extproc.feedback or ()))
        record = world.app.runtime.record(1)
        assert record is not None
        assert record.status == 200


async def test_what_may_have_no_body_or_too_much_of_it_shows_its_head_first(
    tmp_path: Path, messages: list[bool]
) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        start = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\n"
        for status, head, body in (
            (200, "GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b""),
            (200, "POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n", b""),
            (200, "POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n"),
            (413, start + "content-length: 100001\r\n\r\n", b""),
            (200, "PUT /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n", b"x"),
        ):
            found, headers = await raw(world, head, body)
            assert found == status, head
            assert found != 200 or "x-picker-request-id" in headers
        assert messages == [False] * 5


async def test_a_body_at_the_limit_is_taken(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        for size in (1, 99_999, 100_000):
            status, headers, body = await world.ask("/echo", data=b"x" * size)
            assert (status, len(body)) == (200, size)
            assert "x-picker-request-id" in headers


async def test_words_to_picker_reach_it_and_no_endpoint_and_orders_reach_nobody(tmp_path: Path) -> None:
    said = {"x-session-id": "s", "x-llm-d-inference-objective": "high", "x-data-parallel-rank": "7"}
    settings = altered(config("127.0.0.1:1"), objectives={"high": 5})
    async with EchoUpstream("a").running() as a:
        async with gateway(tmp_path, altered(settings, endpoints=[a.address])) as world:
            assert (await world.ask(headers=said | {"x-picker-request-id": "9"}))[0] == 200
            record = world.app.runtime.record(1)
        assert record is not None
        assert (record.request.session, record.request.priority) == ("s", 5)
        (seen,) = chats(a)
        assert seen.headers["x-session-id"] == "s"
        assert seen.headers["x-picker-request-id"] == "1"
        assert not seen.headers.keys() & {"x-llm-d-inference-objective", "x-data-parallel-rank"}


async def test_a_body_that_picker_rewrites_goes_on_with_its_new_length(tmp_path: Path, messages: list[bool]) -> None:
    rewrite = RewriteSpec([Target("a-much-longer-name")], [Match(ModelMatch("demo"))])
    async with EchoUpstream("a").running() as a:
        settings = altered(config(a.address), models=ModelsConfig(rewrites=[rewrite]))
        async with gateway(tmp_path, settings) as world:
            assert (await world.ask())[0] == 200
        (seen,) = chats(a)
        assert json.loads(seen.body) == BODY | {"model": "a-much-longer-name"}
        assert seen.headers["content-length"] == str(len(seen.body))
        assert messages == [True]


async def test_keys_that_are_asked_for_from_some_moment_on_are_seen(tmp_path: Path, messages: list[bool]) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        assert (await world.ask())[0] == 200
        world.doors.keys.replace([named_key("team", KEY)])
        assert (await world.ask())[0] == 401
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert (await world.ask(headers=headers))[0] == 200
        assert messages == [True] * 4


async def test_names_that_are_no_text_do_not_stop_a_request(tmp_path: Path) -> None:
    async with EchoUpstream("a").running() as a, gateway(tmp_path, config(a.address)) as world:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nx-session-id: \xff\xfe\r\ncontent-length: 2\r\n\r\n"
        status, _ = await raw(world, head.encode("latin-1"), b"{}")
        assert status == 400  # picker's: no messages


async def test_a_request_that_has_to_wait_is_served_and_one_whose_client_leaves_is_forgotten(
    tmp_path: Path, messages: list[bool]
) -> None:
    async with EchoUpstream("a").running() as a:
        settings = altered(config(a.address), queue=QueueConfig(max_inflight=1))
        async with gateway(tmp_path, settings) as world, asyncio.TaskGroup() as group, asyncio.timeout(10.0):
            queue = world.app.runtime.scheduler.queue
            async with world.client.post(world.url + CHAT, json=BODY | {"stream": True}) as response:
                leaving, staying = group.create_task(world.ask()), group.create_task(world.ask())
                await until(lambda: len(queue) == 2)
                leaving.cancel()
                await until(lambda: len(queue) == 1)
                a.step(10)
                await response.read()
            assert (await staying)[0] == 200
        assert len(chats(a)) == 2
        assert messages == [True] * 3
