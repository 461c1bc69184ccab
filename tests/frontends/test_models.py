"""The models of all endpoints as one list, asked for over real sockets."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from frontends.fake_upstream import FakeUpstream, RefusingPort, upstream
from picker.exchange import Respond
from picker.frontends.models import ModelsPage, merged, with_aliases
from picker.frontends.upstream import Upstream
from picker.rewrites import Rewriting, build_rule
from picker.types import Endpoint


def entry(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": "vllm", "root": name, "parent": None, **fields}


def listing(*entries: dict[str, Any]) -> Any:
    async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": list(entries)})

    return answer


@asynccontextmanager
async def page(*addresses: str, known: tuple[str, ...] = (), **options: Any) -> AsyncIterator[ModelsPage]:
    pool = Upstream(connect_timeout=1.0)
    clock = asyncio.get_running_loop().time
    try:
        endpoints = [Endpoint(address, address) for address in addresses]
        yield ModelsPage(pool, endpoints=lambda: endpoints, known=lambda: known, clock=clock, **options)
    finally:
        await pool.close()


def ids(answer: Respond) -> list[str]:
    assert answer.status == 200, answer.body
    return [each["id"] for each in json.loads(answer.body)["data"]]


def keys_seen(endpoint: FakeUpstream) -> list[str]:
    return [value for seen in endpoint.seen for value in seen.values("authorization")]


def test_adapters_come_behind_their_models_and_the_shortest_context_counts() -> None:
    adapter = entry("lora", parent="base", max_model_len=None)
    found = merged([[adapter, entry("base", max_model_len=8192)], [entry("base", max_model_len=4096), entry("other")]])
    assert [(each["id"], each["parent"]) for each in found] == [("base", None), ("other", None), ("lora", "base")]
    assert [each.get("max_model_len") for each in found] == [4096, None, None]


def aliases_of(*entries: dict[str, Any], **aliases: list[str]) -> list[dict[str, Any]]:
    """What is listed behind the entries."""
    found = with_aliases(entries, aliases)
    assert found[: len(entries)] == list(entries)
    return found[len(entries) :]


def test_an_alias_of_one_model_is_listed_as_that_model_by_another_name() -> None:
    base = entry("base", max_model_len=8192, created=7, owned_by="me", permission=[{"id": "p"}])
    lora = entry("lora", root="/adapters/lora", parent="base", max_model_len=None)
    chat, also = aliases_of(base, lora, chat=["base"], also=["lora"])
    assert chat == base | {"id": "chat", "root": "base"}
    assert also == lora | {"id": "also", "root": "lora"}


def test_an_alias_of_several_models_stands_for_itself_with_the_shortest_context_that_is_known() -> None:
    entries = [entry("a", max_model_len=8192), entry("b", max_model_len=4096), entry("c", max_model_len=None)]
    (chat,) = aliases_of(*entries, chat=["a", "b", "c", "gone"])
    assert (chat["root"], chat["parent"], chat["max_model_len"]) == ("chat", None, 4096)
    (chat,) = aliases_of(*entries, chat=["c", "gone"])
    assert (chat["root"], "max_model_len" in chat) == ("chat", False)


def test_an_alias_is_listed_once_and_only_where_one_of_its_models_is() -> None:
    assert aliases_of(entry("base"), entry("other"), base=["other"], chat=["gone"], both=["gone", "away"]) == []


async def test_aliases_are_those_of_now_though_the_list_is_kept() -> None:
    rewriting = Rewriting(random.Random(1).random, ("here",))
    async with (
        upstream(listing(entry("one", max_model_len=10))) as a,
        page(a.address, aliases=lambda: rewriting.aliases) as models,
    ):
        assert ids(await models.answer("/v1/models", [])) == ["one"]
        targets = [("one", 9), ("one", 1)]  # the same one twice is one
        rewriting.put("here", [build_rule("r", ("gpt/4", "chat"), targets), build_rule("all", (), [("one", None)])])
        assert ids(await models.answer("/v1/models", [])) == ["one", "chat", "gpt/4"]
        found = json.loads((await models.answer("/v1/models/gpt%2F4", [])).body)
        assert (found["id"], found["root"], found["max_model_len"]) == ("gpt/4", "one", 10)
        nope = await models.answer("/v1/models/nope", [])
        assert "one, chat, gpt/4" in json.loads(nope.body)["error"]["message"]
        rewriting.put("here", [])
        assert (await models.answer("/v1/models/chat", [])).status == 404
        assert len(a.seen) == 1


async def test_where_nobody_answers_what_is_known_is_listed_by_its_other_names_too() -> None:
    gone = RefusingPort()
    async with page(gone.address, known=("one",), aliases=lambda: {"chat": ["one"], "b": ["two"]}) as models:
        assert ids(await models.answer("/v1/models", [])) == ["one", "chat"]
    gone.close()


async def test_the_models_of_all_endpoints_are_one_list() -> None:
    async with (
        upstream(listing(entry("one"), entry("lora", parent="one"))) as a,
        upstream(listing(entry("two"))) as b,
        page(a.address, b.address) as models,
    ):
        assert ids(await models.answer("/v1/models", [])) == ["one", "two", "lora"]


async def test_one_of_them_can_be_asked_for_and_an_unknown_one_is_named_with_the_known() -> None:
    async with upstream(listing(entry("org/one"))) as a, page(a.address) as models:
        one = await models.answer("/v1/models/org%2Fone", [])
        assert (one.status, json.loads(one.body)["id"]) == (200, "org/one")
        nope = await models.answer("/v1/models/nope", [])
        error = json.loads(nope.body)["error"]
        assert (nope.status, error["type"], error["param"]) == (404, "NotFoundError", "model")
        assert "org/one" in error["message"]


async def test_an_endpoint_that_hangs_or_is_gone_keeps_nobody_waiting() -> None:
    async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    gone = RefusingPort()
    async with (
        upstream(hang) as a,
        upstream(listing(entry("one"))) as b,
        page(a.address, gone.address, b.address, timeout=0.05) as models,
    ):
        assert ids(await models.answer("/v1/models", [])) == ["one"]
    gone.close()


async def test_the_list_is_kept_for_a_moment_and_for_each_key() -> None:
    async with upstream(listing(entry("one"))) as a, page(a.address) as models:
        for key in (b"Bearer x", b"Bearer x", b"Bearer y"):
            await models.answer("/v1/models", [(b"authorization", key), (b"cookie", b"c")])
        assert keys_seen(a) == ["Bearer x", "Bearer y"]
        assert a.seen[0].values("cookie") == []


async def test_a_list_that_is_old_is_asked_for_again() -> None:
    async with upstream(listing(entry("one"))) as a, page(a.address, keep=0.0) as models:
        for _ in range(2):
            await models.answer("/v1/models", [])
        assert len(a.seen) == 2


async def test_a_refused_key_is_told_to_the_client() -> None:
    async def refuse(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": "Unauthorized"}, status=401)

    async with upstream(refuse) as a, page(a.address) as models:
        answer = await models.answer("/v1/models", [])
        assert (answer.status, answer.body) == (401, b'{"error": "Unauthorized"}')


async def test_a_refusal_that_is_a_web_page_is_an_answer_for_keys_only() -> None:
    status = 404

    async def refuse(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(text="<html>Go away</html>", content_type="text/html", status=status)

    async with upstream(refuse) as a, page(a.address) as models:
        answer = await models.answer("/v1/models", [])
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, 503)
    async with upstream(refuse) as a, page(a.address, known=("one",), keep=0.0) as models:
        assert ids(await models.answer("/v1/models", [])) == ["one"]
        status = 403
        answer = await models.answer("/v1/models", [])
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (403, 403)


async def test_where_nobody_answers_what_is_known_is_listed_else_it_is_an_error() -> None:
    gone = RefusingPort()
    async with page(gone.address, known=("one",)) as models:
        assert ids(await models.answer("/v1/models", [])) == ["one"]
    async with page(gone.address) as models:
        answer = await models.answer("/v1/models", [])
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, 503)
    gone.close()


async def test_what_is_no_list_is_left_out() -> None:
    async def page_of_a_proxy(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(text="<html>", content_type="text/html")

    async with (
        upstream(page_of_a_proxy) as a,
        upstream(listing(entry("one"), {"object": "model"})) as b,
        page(a.address, b.address) as models,
    ):
        assert ids(await models.answer("/v1/models", [])) == ["one"]
