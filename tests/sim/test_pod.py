"""The pod over real loopback sockets. Pods run a thousand times faster than time; nothing here depends on how fast."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from picker.children import free_ports
from picker.errors import ConfigError
from picker.sim import tokens
from picker.sim.engine import Policy
from picker.sim.pod import Pod, open_pods, running_pods, serve_pods
from picker.sim.pod_clock import PodClock
from picker.sim.pod_options import Fault, MetricsFault, PodOptions
from picker.types import Sleep
from picker.wire.metrics_text import decode_metrics

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello there, pod."}]
LONG = "All happy families are alike; each unhappy family is unhappy in its own way. " * 20


class Client:
    """One pod and a session with it."""

    def __init__(self, pod: Pod, session: aiohttp.ClientSession) -> None:
        self.pod = pod
        self.session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.pod.url + path) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.pod.url + path, json=body, headers=named) as response:
            return response.status, await response.json(content_type=None)

    async def stream(self, path: str, body: dict[str, Any], **headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.pod.url + path, json=body | {"stream": True}, headers=named) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            return await response.text()

    async def usage(self, path: str, body: object) -> dict[str, Any]:
        status, answer = await self.post(path, body)
        assert status == 200, answer
        return answer["usage"]  # type: ignore[no-any-return]

    async def cached(self, path: str, body: object) -> int:
        return int((await self.usage(path, body))["prompt_tokens_details"]["cached_tokens"])

    async def metric(self, name: str) -> float:
        _, page = await self.get("/metrics")
        families = text_string_to_metric_families(page)
        return sum(s.value for family in families for s in family.samples if s.name == f"vllm:{name}")

    async def sleep(self) -> Sleep | None:
        """What a scrape makes of it."""
        _, page = await self.get("/metrics")
        return decode_metrics(page.encode(), name="a", observed_at=0.0).sleep


class Wall:
    """A clock on the wall that stands still until somebody moves it."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@contextlib.asynccontextmanager
async def serving(wall: Wall | None = None, **options: Any) -> AsyncIterator[Client]:
    defaults: dict[str, Any] = {"model": "tiny", "time_scale": 1000.0, "noise": False}
    chosen = PodOptions(**(defaults | options))
    clock = PodClock(wall=wall) if wall else None
    async with open_pods(chosen, clock) as pods, aiohttp.ClientSession() as session:
        yield Client(pods[0], session)
        for pod in pods:
            pod.engine.check_integrity()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has happened; the test's time-out catches what never does."""
    while not condition():  # noqa: ASYNC110 - what it waits for happens in the pod, which signals nobody
        await asyncio.sleep(0)


def chat(content: str = "Hello there, pod.", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3} | more


def events(text: str) -> list[Any]:
    """The parsed data of SSE text, [DONE] as that string."""
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# --- bytes ---------------------------------------------------------------------------------------------------

PRINT = '"system_fingerprint":"vllm-0.32.0-5178c0de"'


def told(text: str) -> tuple[str, str]:
    """The id and the second of creation in an answer."""
    found = re.search(r'"id":"([^"]+)".*?"created":(\d+)', text)
    assert found
    return found[1], found[2]


def words(content: str, count: int) -> list[str]:
    prompt = tokens.encode_chat([tokens.Message("user", content)])
    said = tokens.answer(tokens.fingerprint(prompt), count).decode()
    return [said[at : at + 4] for at in range(0, len(said), 4)]


async def test_a_chat_answer_is_vllms_byte_for_byte() -> None:
    async with (
        serving() as client,
        client.session.post(client.pod.url + CHAT, json=chat()) as response,
    ):
        text = await response.text()
    name, created = told(text)
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{16}", name)
    assert text == (
        f'{{"id":"{name}","object":"chat.completion","created":{created},"model":"tiny","choices":[{{"index":0,'
        f'"message":{{"role":"assistant","content":"{"".join(words("Hello there, pod.", 3))}","refusal":null,'
        '"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,'
        '"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,'
        f'{PRINT},"usage":{{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":'
        '{"cached_tokens":0,"created_cache_tokens":0,"multimodal_tokens":null},"completion_tokens_details":null},'
        '"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,'
        '"ec_transfer_params":null,"metrics":null}'
    )


async def test_a_chat_stream_is_vllms_byte_for_byte() -> None:
    async with serving() as client:
        text = await client.stream(CHAT, chat())
    name, created = told(text)
    head = f'data: {{"id":"{name}","object":"chat.completion.chunk","created":{created},"model":"tiny","choices":['
    one, two, three = words("Hello there, pod.", 3)
    assert text == (
        f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],'
        '"prompt_token_ids":null,"prompt_text":null}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"{one}"}},"logprobs":null,"finish_reason":null,"token_ids":null}}]}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"{two}"}},"logprobs":null,"finish_reason":null,"token_ids":null}}]}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"{three}"}},"logprobs":null,"finish_reason":"length",'
        f'"stop_reason":null,"token_ids":null}}],{PRINT}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_include_usage_adds_an_event_and_moves_the_fingerprint() -> None:
    async with serving() as client:
        text = await client.stream(CHAT, chat(stream_options={"include_usage": True}))
    name, created = told(text)
    *_, last, usage, done = text.removesuffix("\n\n").split("\n\n")
    assert last.endswith('"finish_reason":"length","stop_reason":null,"token_ids":null}]}')
    assert usage == (
        f'data: {{"id":"{name}","object":"chat.completion.chunk","created":{created},"model":"tiny","choices":[],'
        '"usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":'
        f'{{"cached_tokens":0,"created_cache_tokens":0}}}},{PRINT}}}'
    )
    assert done == "data: [DONE]"


async def test_continuous_usage_is_in_every_event() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serving() as client:
        text = await client.stream(CHAT, chat(stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in events(text)[:-1]] == [0, 1, 2, 3, 3]
    counts = '"usage":{"prompt_tokens":14,"total_tokens":15,"completion_tokens":1,"completion_tokens_details":null}}'
    assert text.split("\n\n")[1].endswith('"finish_reason":null,"token_ids":null}],' + counts)


async def test_a_completion_and_its_stream_are_vllms_byte_for_byte() -> None:
    body = {"model": "tiny", "prompt": "four bytes each.", "max_tokens": 2}
    async with serving(kv_tokens=32_000) as client:
        async with client.session.post(client.pod.url + COMPLETIONS, json=body) as response:
            whole = await response.text()
        streamed = await client.stream(COMPLETIONS, body | {"stream_options": {"include_usage": True}})
    said = tokens.answer(tokens.fingerprint(tokens.encode("four bytes each.")), 2).decode()
    name, created = told(whole)
    assert re.fullmatch(r"cmpl-[0-9a-f]{16}", name)
    assert whole == (
        f'{{"id":"{name}","object":"text_completion","created":{created},"model":"tiny","choices":[{{"index":0,'
        f'"text":"{said}","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,'
        '"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,'
        f'{PRINT},"usage":{{"prompt_tokens":4,"total_tokens":6,"completion_tokens":2,"prompt_tokens_details":'
        '{"cached_tokens":0,"created_cache_tokens":null,"multimodal_tokens":null},"completion_tokens_details":null},'
        '"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
    )
    name, created = told(streamed)
    head = f'data: {{"id":"{name}","object":"text_completion","created":{created},"model":"tiny","choices":['
    nothing = '"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}'
    assert streamed == (
        f'{head}{{"index":0,"text":"{said[:4]}","logprobs":null,"finish_reason":null,{nothing}\n\n'
        f'{head}{{"index":0,"text":"{said[4:]}","logprobs":null,"finish_reason":"length",{nothing}\n\n'
        f'{head}],"usage":{{"prompt_tokens":4,"total_tokens":6,"completion_tokens":2,"prompt_tokens_details":'
        f'{{"cached_tokens":0}}}},{PRINT}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_headers_are_those_of_uvicorn() -> None:
    async with serving() as client, client.session.get(client.pod.url + "/health") as response:
        assert (response.status, await response.read()) == (200, b"")
        assert (response.headers["server"], response.headers["vary"]) == ("uvicorn", "Origin")
        assert "date" in response.headers


async def test_a_request_id_from_the_client_is_in_the_answer() -> None:
    async with serving() as client:
        _, by_header = await client.post(CHAT, chat(request_id="body"), x_request_id="abc-1")
        _, by_body = await client.post(COMPLETIONS, {"prompt": "x", "request_id": "body"})
    assert (by_header["id"], by_body["id"]) == ("chatcmpl-abc-1", "cmpl-body")


# --- what is said --------------------------------------------------------------------------------------------


async def test_a_stream_interval_tells_the_first_token_at_once_and_then_so_many_together() -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "ignore_eos": True}
    async with serving(stream_interval=5) as client:
        _, whole = await client.post(CHAT, body)
        page = await client.stream(CHAT, body | {"stream_options": {"include_usage": True}})
    events = [json.loads(line.removeprefix("data: ")) for line in page.split("\n\n") if line.startswith("data: {")]
    told = [event["choices"][0]["delta"]["content"] for event in events if event["choices"]]
    assert [len(text) // tokens.BYTES_PER_TOKEN for text in told] == [0, 1, 5, 5, 1]
    assert "".join(told) == whole["choices"][0]["message"]["content"]
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 12


async def test_the_pods_tell_how_late_they_were_and_forget_it_when_asked() -> None:
    async with serving() as client:
        await client.post(CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 3})
        _, told = await client.get("/_sim/clock")
        assert told["events"] > 0
        assert told["p50_s"] <= told["p99_s"] <= told["max_s"]
        assert told["time_scale"] == 1000.0
        async with client.session.delete(client.pod.url + "/_sim/clock") as response:
            assert response.status == 200
        _, told = await client.get("/_sim/clock")
        assert told["max_s"] == 0.0


async def test_streamed_text_is_the_text_of_the_whole_answer() -> None:
    async with serving() as client:
        _, whole = await client.post(CHAT, chat(max_tokens=200))
        streamed = events(await client.stream(CHAT, chat(max_tokens=200)))
    text = "".join(choice["delta"].get("content", "") for event in streamed[:-1] for choice in event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert len(streamed) == 1 + 200 + 1


async def test_without_max_tokens_a_chat_ends_by_itself_and_a_completion_after_16() -> None:
    async with serving() as client:
        _, talk = await client.post(CHAT, {"messages": HELLO})
        _, again = await client.post(CHAT, {"messages": HELLO})
        _, completion = await client.post(COMPLETIONS, {"prompt": "x"})
    assert talk["choices"][0]["finish_reason"] == "stop"
    assert talk["usage"]["completion_tokens"] == again["usage"]["completion_tokens"] > 15
    assert completion["usage"]["completion_tokens"] == 16


async def test_max_completion_tokens_beats_max_tokens() -> None:
    async with serving() as client:
        usage = await client.usage(CHAT, chat(max_tokens=9, max_completion_tokens=2))
    assert usage["completion_tokens"] == 2


async def test_an_answer_is_clipped_at_the_context_length() -> None:
    async with serving(max_model_len=64) as client:
        _, answer = await client.post(COMPLETIONS, {"prompt": list(range(60)), "max_tokens": 50})
        _, endless = await client.post(CHAT, {"messages": HELLO, "ignore_eos": True})
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (4, "length")
    assert endless["usage"]["total_tokens"] == 64


async def test_a_stop_string_ends_the_answer_and_is_left_out() -> None:
    said = words("Hello there, pod.", 8)
    async with serving() as client:
        _, cut = await client.post(CHAT, chat(max_tokens=8, stop=said[5].strip()))
        streamed = events(await client.stream(CHAT, chat(max_tokens=8, stop=[said[5].strip()])))
        _, kept = await client.post(CHAT, chat(max_tokens=8, stop=said[5], include_stop_str_in_output=True))
    choice = cut["choices"][0]
    assert choice["message"]["content"] == "".join(said[:5]) + " "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", said[5].strip())
    assert cut["usage"]["completion_tokens"] == 6
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed[:-1]) == "".join(said[:5]) + " "
    assert kept["choices"][0]["message"]["content"] == "".join(said[:6])


async def test_several_prompts_and_choices_are_one_answer_with_summed_usage() -> None:
    async with serving() as client:
        body = {"prompt": [[7], [1, 2, 3]], "n": 2, "max_tokens": 2, "temperature": 1.0}
        _, answer = await client.post(COMPLETIONS, body)
        streamed = events(await client.stream(COMPLETIONS, body))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 8)
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert len(set(texts.values())) == 4
    said = dict.fromkeys(range(4), "")
    for event in streamed[:-1]:
        said[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert said == texts


# --- the prefix cache, through the API -----------------------------------------------------------------------


async def test_a_repeated_prompt_is_cached_but_for_its_last_block() -> None:
    async with serving() as client:
        found = [await client.cached(CHAT, chat(LONG)) for _ in range(2)]
        prompt = (await client.usage(CHAT, chat(LONG)))["prompt_tokens"]
    assert found == [0, (prompt - 1) // 16 * 16]


async def test_salts_and_adapters_share_nothing() -> None:
    async with serving(loras=("ad1",)) as client:
        bodies = [chat(LONG), chat(LONG, cache_salt="s1"), chat(LONG, cache_salt="s2"), chat(LONG, model="ad1")]
        assert [await client.cached(CHAT, body) for body in bodies] == [0, 0, 0, 0]
        assert all([await client.cached(CHAT, body) for body in bodies])


async def test_the_next_turn_finds_the_answer_before_it() -> None:
    async with serving() as client:
        _, first = await client.post(CHAT, chat(LONG, max_tokens=100))
        said = first["choices"][0]["message"]
        turns = [{"role": "user", "content": LONG}, said, {"role": "user", "content": "Go on."}]
        found = await client.cached(CHAT, {"messages": turns, "max_tokens": 1})
    assert found == (first["usage"]["total_tokens"] - 1) // 16 * 16


async def test_content_parts_and_tools_reach_the_prompt() -> None:
    parts = [{"type": "text", "text": LONG}]
    async with serving() as client:
        await client.post(CHAT, chat(LONG))
        as_parts = await client.cached(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
        with_tools = await client.cached(CHAT, chat(LONG, tools=[{"type": "function", "function": {"name": "f"}}]))
    assert as_parts > 0
    assert with_tools == 0


async def test_prompt_token_ids_of_the_gateway_are_used() -> None:
    async with serving() as client:
        usage = await client.usage(CHAT, chat(LONG, kv_transfer_params={"prompt_token_ids": [1, 2, 3, 4, 5]}))
    assert usage["prompt_tokens"] == 5


async def test_prompt_tokens_details_can_be_off() -> None:
    async with serving(prompt_tokens_details=False) as client:
        usage = await client.usage(CHAT, chat())
        streamed = await client.stream(CHAT, chat(stream_options={"include_usage": True}))
    assert usage["prompt_tokens_details"] is None
    assert "prompt_tokens_details" not in streamed


async def test_reset_empties_the_cache() -> None:
    async with serving() as client:
        await client.post(CHAT, chat(LONG))
        assert await client.post("/reset_prefix_cache", {}) == (200, {"success": True})
        assert await client.cached(CHAT, chat(LONG)) == 0


async def test_a_pod_that_sleeps_says_so_lets_requests_wait_and_has_forgotten_when_it_wakes() -> None:
    async with serving() as client:
        await client.post(CHAT, chat(LONG))
        assert await client.get("/is_sleeping") == (200, {"is_sleeping": False})
        assert await client.post("/sleep", None) == (200, {"status": "sleeping", "level": 1})
        assert await client.get("/is_sleeping") == (200, {"is_sleeping": True})
        assert (await client.get("/health"))[0] == 200
        assert await client.sleep() is Sleep.DEEP
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(client.cached(CHAT, chat(LONG)))
            await until(lambda: bool(client.pod.in_flight))
            assert not asked.done()
            assert await client.post("/wake_up", None) == (200, {"status": "awake", "tags": None})
        assert asked.result() == 0
        assert await client.sleep() is Sleep.AWAKE


@pytest.mark.parametrize(("level", "seen", "kept"), [(0, Sleep.LIGHT, True), (2, Sleep.DEEP, False)])
async def test_how_deep_a_pod_sleeps_decides_what_it_keeps(level: int, seen: Sleep, kept: bool) -> None:
    async with serving() as client:
        await client.post(CHAT, chat(LONG))
        await client.post(f"/sleep?level={level}", None)
        assert await client.sleep() is seen
        await client.post("/wake_up", None)
        assert (await client.cached(CHAT, chat(LONG)) > 0) is kept
        assert (await client.post("/sleep?level=3", None))[0] == 400


async def test_tokenize_gives_the_ids_that_chat_uses_and_detokenize_their_text() -> None:
    async with serving() as client:
        _, ids = await client.post("/tokenize", {"messages": HELLO})
        _, text = await client.post("/detokenize", {"tokens": ids["tokens"]})
        usage = await client.usage(CHAT, chat(HELLO[0]["content"]))
        _, plain = await client.post("/tokenize", {"prompt": "abcdefgh"})
    assert ids["count"] == len(ids["tokens"]) == usage["prompt_tokens"]
    assert text == {"prompt": "<|im_start|>user\nHello there, pod.<|im_end|>\n<|im_start|>assistant\n"}
    assert (plain["count"], plain["token_strs"]) == (2, None)


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param", "message"),
    [
        (
            CHAT,
            chat(model="nope"),
            404,
            "NotFoundError",
            "model",
            "The model `nope` does not exist. Valid aliases: tiny.",
        ),
        (CHAT, chat(model="nope", stream=True), 404, "NotFoundError", "model", "does not exist"),
        (
            CHAT,
            {"model": "tiny"},
            400,
            "Bad Request",
            "body.messages",
            "'loc': 'body.messages', 'msg': 'Field required'",
        ),
        (CHAT, chat(max_tokens="x"), 400, "Bad Request", "body.max_tokens", "1 validation error:\n  {'type'"),
        (CHAT, [1], 400, "Bad Request", "body", "1 validation error"),
        (CHAT, chat(max_tokens=0), 400, "BadRequestError", "max_tokens", "max_tokens must be at least 1, got 0."),
        (
            COMPLETIONS,
            {"prompt": list(range(300))},
            400,
            "BadRequestError",
            "input_tokens",
            "This model's maximum context length is 256 tokens. However, your prompt contains 300 input tokens, which "
            "exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
            "(parameter=input_tokens, value=300)",
        ),
        (
            COMPLETIONS,
            {"prompt": list(range(256))},
            400,
            "BadRequestError",
            "max_tokens",
            "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)",
        ),
        (
            COMPLETIONS,
            {"prompt": "x", "max_tokens": 5000},
            400,
            "BadRequestError",
            "max_tokens",
            "max_tokens=5000 cannot be greater than max_model_len=256. Please request fewer output tokens. "
            "(parameter=max_tokens, value=5000)",
        ),
        (COMPLETIONS, {"prompt": [-1]}, 400, "BadRequestError", None, "Token id -1 is out of vocabulary"),
        (COMPLETIONS, {"prompt": ""}, 400, "BadRequestError", None, "cannot be empty"),
        (COMPLETIONS, {"prompt": "x", "n": 2, "temperature": 0}, 400, "BadRequestError", "n", "greedy"),
        (COMPLETIONS, {"prompt": "x", "cache_salt": "a/b"}, 400, "BadRequestError", "cache_salt", "cache_salt"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "Bad Request", "body", "stream=True"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, 400, "BadRequestError", "echo", "not simulated"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "BadRequestError",
            None,
            "tiny is not a multimodal model",
        ),
        ("/v1/completions/render", {"prompt": "x"}, 403, "PermissionDeniedError", None, "Scale-out endpoints"),
    ],
)
async def test_refusals_are_vllms(
    path: str, body: Any, status: int, kind: str, param: str | None, message: str
) -> None:
    async with serving(max_model_len=256) as client:
        found, answer = await client.post(path, body)
    error = answer["error"]
    assert (found, error["code"], error["type"], error["param"]) == (status, status, kind, param)
    assert message in error["message"]


async def test_broken_json_and_wrong_content_types_are_bad_requests() -> None:
    async with serving() as client:
        url = client.pod.url + CHAT
        headers = {"content-type": "application/json"}
        async with client.session.post(url, data=b'{"model":!}', headers=headers) as response:
            broken = (await response.json())["error"]
        async with client.session.post(url, data=b'{"model":"\xff"}', headers=headers) as response:
            assert response.status == 400
        async with client.session.post(url, data=b"{}", headers={"content-type": "text/plain"}) as response:
            plain = (await response.json())["error"]
    assert (broken["code"], broken["type"], broken["param"]) == (400, "Bad Request", "body.9")
    assert (plain["code"], plain["param"]) == (400, None)
    assert plain["message"].endswith("Unsupported Media Type: Only 'application/json' is allowed")


async def test_unknown_routes_and_methods_have_fastapis_bodies() -> None:
    async with serving() as client:
        assert await client.get("/nope") == (404, {"detail": "Not Found"})
        assert await client.get(CHAT) == (405, {"detail": "Method Not Allowed"})


async def test_a_rank_that_does_not_exist_is_refused() -> None:
    async with serving() as client:
        status, answer = await client.post(CHAT, chat(), x_data_parallel_rank="7")
        fine, _ = await client.post(CHAT, chat(), x_data_parallel_rank="0")
        ignored, _ = await client.post(CHAT, chat(), x_data_parallel_rank="seven")
    assert (status, answer["error"]["message"]) == (400, "data_parallel_rank 7 is out of range [0, 1).")
    assert (fine, ignored) == (200, 200)


async def test_more_requests_than_may_queue_are_turned_away_with_503() -> None:
    async with serving(max_queued=2, fault=Fault(hang=True)) as client, asyncio.TaskGroup() as group:
        held = [group.create_task(client.post(COMPLETIONS, {"prompt": "x"})) for _ in range(2)]
        await until(lambda: client.pod.engine.num_waiting == 2)
        status, answer = await client.post(COMPLETIONS, {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (503, "Service Unavailable")
        assert answer["error"]["message"].startswith("The engine is currently busy and cannot accept new requests.")
        assert await client.metric("admission_rejections_total") == 1
        await client.post("/_sim/fault", {"hang": False})
        assert [status for status, _ in [await task for task in held]] == [200, 200]


@pytest.mark.parametrize("how", ["leaves", "is reset"])
async def test_a_request_that_ends_early_gives_its_place_back_once(how: str) -> None:
    body = {"prompt": "x"}

    async def ask_in_vain(client: Client) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            await client.post(COMPLETIONS, body)

    async with serving(max_queued=1, fault=Fault(hang=True)) as client, asyncio.TaskGroup() as group:
        asked = group.create_task(ask_in_vain(client))
        await until(lambda: client.pod.engine.num_waiting == 1)
        if how == "leaves":
            asked.cancel()
        else:
            await client.post("/_sim/fault", {"restart": True})
        await until(lambda: client.pod.in_flight == 0)
        held = group.create_task(client.post(COMPLETIONS, body))
        await until(lambda: client.pod.engine.num_waiting == 1)
        assert (await client.post(COMPLETIONS, body))[0] == 503
        await client.post("/_sim/fault", {"hang": False})
        assert (await held)[0] == 200


# --- clients that leave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(stream: bool) -> None:
    async with serving(time_scale=1.0) as client:
        engine = client.pod.engine
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            body = chat(LONG, max_tokens=100_000, stream=stream)
            asked = group.create_task(session.post(client.pod.url + CHAT, json=body).__aenter__())
            await until(lambda: engine.num_running == 1)
            if stream:
                (await asked).close()
            asked.cancel()
        await until(lambda: engine.idle)
        assert engine.kv_usage == 0.0
        assert await client.metric("request_success_total") == 0
        assert await client.cached(CHAT, chat(LONG)) > 0


async def test_a_client_that_leaves_while_the_front_end_works_never_reaches_the_engine() -> None:
    wall = Wall()
    async with serving(wall=wall) as client:
        _, writer = await asyncio.open_connection(*client.pod.url.removeprefix("http://").split(":"))
        body = json.dumps(chat(LONG)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await until(lambda: client.pod.in_flight == 1)
        writer.transport.abort()
        await until(lambda: client.pod.in_flight == 0)
        wall.seconds = 10.0
        client.pod.clock.catch_up()
        assert client.pod.engine.counters.queries == 0


async def test_a_request_is_stamped_when_it_comes_and_after_all_that_was_due() -> None:
    wall = Wall()
    async with serving(wall=wall) as client:
        wall.seconds = 5.0
        await client.get("/version")
        assert client.pod.clock.now == 5.0


async def test_steps_merged_to_catch_up_end_where_the_next_request_comes_in() -> None:
    wall = Wall()
    async with serving(wall=wall) as client, asyncio.TaskGroup() as group:
        group.create_task(client.post(COMPLETIONS, {"prompt": "x", "max_tokens": 500}))
        group.create_task(client.post(COMPLETIONS, {"prompt": LONG * 10, "max_tokens": 1}))
        await until(lambda: client.pod.in_flight == 2)
        wall.seconds = 100.0
        client.pod.clock.catch_up()
        # The second is in the front end 30 ms longer, and then waits for the end of a step of 7 ms, not of a run.
        assert 0 < await client.metric("request_queue_time_seconds_sum") < 0.0075
        assert await client.metric("iteration_tokens_total_count") == 500


async def test_many_clients_of_which_some_leave_get_all_their_tokens_and_leave_nothing_behind() -> None:
    async def ask(client: Client, number: int) -> int:
        body = chat(LONG[number % 7 : 400], max_tokens=80 + number, stream=True)
        async with client.session.post(client.pod.url + CHAT, json=body) as response:
            if number % 3 == 0:
                response.close()
                return 0
            return len(events(await response.text())) - 2

    small: dict[str, Any] = {"kv_tokens": 800, "max_num_seqs": 8, "fault": Fault(hang=True)}
    async with serving(**small) as client, asyncio.TaskGroup() as group:
        engine = client.pod.engine
        asked = [group.create_task(ask(client, number)) for number in range(60)]
        await until(lambda: sum(task.done() for task in asked) == 20)
        await until(lambda: engine.num_waiting == client.pod.in_flight == 40)
        await client.post("/_sim/fault", {"hang": False})
        assert [await task for task in asked] == [80 + number if number % 3 else 0 for number in range(60)]
        assert (engine.idle, engine.kv_usage, engine.counters.success.total()) == (True, 0.0, 40)
        assert engine.counters.preemptions > 0


# --- what a gateway reads -------------------------------------------------------------------------------------


async def test_models_aliases_and_adapters_are_listed() -> None:
    async with serving(aliases=("small",), loras=("ad1",), max_model_len=4096) as client:
        _, models = await client.get("/v1/models")
        _, by_alias = await client.post(CHAT, chat(model="small"))
        _, by_adapter = await client.post(CHAT, chat(model="ad1"))
    listed = [(m["id"], m["parent"], m["max_model_len"]) for m in models["data"]]
    assert listed == [("tiny", None, 4096), ("small", None, 4096), ("ad1", "tiny", None)]
    assert (by_alias["model"], by_adapter["model"]) == ("tiny", "ad1")


async def test_small_routes_answer_as_vllm_does() -> None:
    async with serving() as client:
        assert await client.get("/version") == (200, {"version": "0.32.0"})
        assert await client.get("/kv_event_sources") == (200, {})
        assert await client.get("/load") == (200, {"server_load": 0})
        assert await client.get("/ping") == (200, "")


async def test_server_load_counts_requests_at_once_where_it_is_tracked() -> None:
    async with serving(track_server_load=True, fault=Fault(hang=True)) as client, asyncio.TaskGroup() as group:
        asked = group.create_task(client.post(CHAT, chat()))
        await until(lambda: client.pod.in_flight == 1)
        assert await client.get("/load") == (200, {"server_load": 1})
        await client.post("/_sim/fault", {"hang": False})
        await asked
        assert await client.get("/load") == (200, {"server_load": 0})


async def test_metrics_follow_the_requests() -> None:
    async with serving() as client:
        for _ in range(2):
            await client.post(CHAT, chat(LONG))
        prompt = (await client.usage(CHAT, chat(LONG)))["prompt_tokens"]
        assert await client.metric("prefix_cache_queries_total") == 3 * prompt
        assert await client.metric("prefix_cache_hits_total") == 2 * ((prompt - 1) // 16 * 16)
        assert await client.metric("request_success_total") == 3
        assert await client.metric("generation_tokens_total") == 9
        assert await client.metric("num_requests_running") == 0


@pytest.mark.parametrize("scale", [200.0, 100_000.0])
async def test_latencies_are_virtual_and_exact_at_any_speed(scale: float) -> None:
    async with serving(time_scale=scale) as client:
        prompt = (await client.usage(CHAT, chat(LONG, max_tokens=100)))["prompt_tokens"]
        ttft, e2e = [await client.metric(f"{n}_seconds_sum") for n in ("time_to_first_token", "e2e_request_latency")]
        profile = client.pod.profile
    first = profile.step_time(prefill_tokens=prompt, prefill_work=prompt * prompt / 2, decodes=0, context=0)
    rest = (profile.step_time(prefill_tokens=0, prefill_work=0, decodes=1, context=prompt + said) for said in range(99))
    assert ttft == pytest.approx(profile.front_end(prompt) + first)
    assert e2e == pytest.approx(profile.front_end(prompt) + first + sum(rest))


async def test_a_load_report_comes_with_the_answer_when_asked_for() -> None:
    async with serving() as client:
        for format_, report in (
            ("TEXT", "TEXT named_metrics.num_requests_waiting=0.0, named_metrics.kv_cache_usage_perc=0.0"),
            ("JSON", 'JSON {"named_metrics": {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}}'),
        ):
            headers = {"endpoint-load-metrics-format": format_}
            async with client.session.post(client.pod.url + CHAT, json=chat(), headers=headers) as response:
                assert response.headers["endpoint-load-metrics"] == report


async def test_priority_comes_from_the_header_before_the_body() -> None:
    async with (
        serving(policy=Policy.PRIORITY, max_num_seqs=1, fault=Fault(hang=True)) as client,
        asyncio.TaskGroup() as group,
    ):
        ended = list[str]()

        async def ask(name: str, header: str, body: int) -> None:
            await client.post(COMPLETIONS, {"prompt": "x", "priority": body}, x_vllm_priority=header)
            ended.append(name)

        for number, (name, header, body) in enumerate((("late", "5", -9), ("first", "-9", 5), ("middle", "0", 7))):
            group.create_task(ask(name, header, body))
            await until(lambda number=number: client.pod.engine.num_waiting == number + 1)  # type: ignore[misc]
        await client.post("/_sim/fault", {"hang": False})
        await until(lambda: len(ended) == 3)
        assert ended == ["first", "middle", "late"]


# --- faults ---------------------------------------------------------------------------------------------------


async def test_faults_can_be_shown_changed_and_refused() -> None:
    async with serving() as client:
        fine = {"reset": False, "hang": False, "error_status": None, "metrics": "none", "slowdown": 1.0}
        assert await client.get("/_sim/fault") == (200, fine)
        assert await client.post("/_sim/fault", {"error_status": 500}) == (200, fine | {"error_status": 500})
        assert await client.post("/_sim/fault", {"slowdown": 2.0}) == (
            200,
            fine | {"error_status": 500, "slowdown": 2.0},
        )
        for wrong in ({"hangs": True}, {"slowdown": 0}, {"error_status": 99}, {"hang": "yes"}):
            status, answer = await client.post("/_sim/fault", wrong)
            assert (status, next(iter(wrong)) in answer["error"]["message"]) == (400, True)
        assert client.pod.fault == Fault(error_status=500, slowdown=2.0)


async def test_an_erring_pod_answers_its_error_and_looks_healthy() -> None:
    async with serving(fault=Fault(error_status=500)) as client:
        status, answer = await client.post(CHAT, chat())
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")
        assert await client.get("/health") == (200, "")


async def test_a_resetting_pod_breaks_generate_connections_only() -> None:
    async with serving(fault=Fault(reset=True)) as client:
        with pytest.raises(aiohttp.ClientError):
            await client.post(CHAT, chat())
        assert (await client.get("/health"))[0] == 200


async def test_a_hanging_pod_says_nothing_and_goes_on_where_it_was() -> None:
    async with serving() as client:
        await client.post("/_sim/fault", {"hang": True})
        async with client.session.post(client.pod.url + CHAT, json=chat(stream=True)) as response:
            assert response.status == 200  # the head comes before the first token, as vLLM sends it
            assert (await client.get("/health"))[0] == 200
            assert client.pod.engine.num_waiting == 1
            await client.post("/_sim/fault", {"hang": False})
            assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_metrics_can_be_refused_or_be_a_web_page() -> None:
    async with serving(fault=Fault(metrics=MetricsFault.REFUSE)) as client:
        with pytest.raises(aiohttp.ClientError):
            await client.get("/metrics")
        await client.post("/_sim/fault", {"metrics": "html"})
        status, page = await client.get("/metrics")
        assert (status, "<html>" in page) == (200, True)
        assert (await client.post(CHAT, chat()))[0] == 200


async def test_a_slow_pod_takes_longer() -> None:
    async with serving() as client:
        times = []
        for slowdown in (1.0, 4.0):
            await client.post("/_sim/fault", {"slowdown": slowdown})
            before = await client.metric("request_decode_time_seconds_sum")
            await client.post(CHAT, chat(max_tokens=50))
            times.append(await client.metric("request_decode_time_seconds_sum") - before)
    assert times[1] == pytest.approx(4 * times[0])


async def test_a_restart_resets_what_is_in_flight_and_empties_the_cache() -> None:
    async with serving() as client:
        await client.post(CHAT, chat(LONG))
        started_at = client.pod.started_at
        await client.post("/_sim/fault", {"hang": True})
        async with client.session.post(client.pod.url + CHAT, json=chat(stream=True)) as response:
            await client.post("/_sim/fault", {"hang": False, "restart": True})
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        assert client.pod.started_at > started_at
        assert await client.metric("request_success_total") == 0
        assert await client.cached(CHAT, chat(LONG)) == 0
        assert client.pod.in_flight == 0


async def test_a_dead_pod_resets_connections_until_it_is_back() -> None:
    async with serving(time_scale=1.0) as client:
        await client.post("/_sim/fault", {"down_s": 1e6})
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(client.pod.url + "/health")
    async with serving(time_scale=1e9) as client:
        await client.post("/_sim/fault", {"down_s": 1e-3})
        await until(lambda: client.pod.up)
        assert (await client.post(CHAT, chat()))[0] == 200


# --- sockets --------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as client:
        reader, writer = await asyncio.open_connection(*client.pod.url.removeprefix("http://").split(":"))
        body = b'{"prompt":"x","max_tokens":50}'
        slow = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(
            slow + b"content-length: %d\r\n\r\n%b" % (len(body), body) + b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        heads = []
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            heads.append(await reader.readexactly(length))
        writer.close()
    assert b'"text_completion"' in heads[0]
    assert heads[1] == b'{"version":"0.32.0"}'


async def test_a_client_may_ask_before_it_sends_and_close_after() -> None:
    async with serving() as client:
        reader, writer = await asyncio.open_connection(*client.pod.url.removeprefix("http://").split(":"))
        writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\nconnection: close\r\n")
        writer.write(b"content-length: 17\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"prompt":"abcd"}')
        assert b'"count":1' in await reader.read()
        writer.close()


async def test_what_is_no_http_is_refused() -> None:
    async with serving() as client:
        reader, writer = await asyncio.open_connection(*client.pod.url.removeprefix("http://").split(":"))
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        writer.close()


async def test_pods_have_ports_of_their_own_and_a_taken_port_is_a_config_error() -> None:
    async with running_pods(3, model="tiny") as urls:
        assert len(set(urls)) == 3
        port = int(urls[1].rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: another program listens there; "):
            async with running_pods(1, port=port):
                pass


async def test_pods_take_ports_in_a_row_and_serve_until_told_to_stop() -> None:
    (free,) = free_ports(1)
    stop, ready = asyncio.Event(), list[str]()

    def on_ready(urls: list[str]) -> None:
        ready.extend(urls)
        stop.set()

    await serve_pods(PodOptions(count=1, port=free), stop=stop, on_ready=on_ready)
    assert ready == [f"http://127.0.0.1:{free}"]


def test_options_that_make_no_sense_are_config_errors() -> None:
    for options in ({"count": 0}, {"time_scale": 0.0}):
        with pytest.raises(ConfigError, match="simulated pods"):
            PodOptions(**options)
    with pytest.raises(ConfigError, match="no model profile"):
        PodOptions(profile="nope").resolve()


def test_a_small_cache_limits_the_context() -> None:
    assert PodOptions(kv_tokens=1600).resolve().max_model_len == 1584


def test_pods_run_on_uvloop_too() -> None:
    async def main() -> str:
        async with serving() as client:
            return await client.stream(CHAT, chat())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()).endswith("data: [DONE]\n\n")
