"""The proxy in front of two real vLLM servers: what the OpenAI SDK sees, and where requests go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from e2e.gateway import Gateway, gateway
from real_vllm.conftest import Pair
from real_vllm.script import LINES, TOOLS, said
from real_vllm.tiny_model import NAME

Messages = list[Any]


@pytest.fixture
async def gate(pods: Pair) -> AsyncIterator[Gateway]:
    async with gateway("proxy", [pod.url for pod in pods]) as gate:
        yield gate


@pytest.fixture
async def sdk(gate: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def question(text: str = "Wie heißt du? 🙂", system: str = "".join(LINES[:6])) -> Messages:
    return [said("system", system), said("user", text)]


async def ask(sdk: openai.AsyncOpenAI, messages: Messages, **rest: Any) -> tuple[Any, str]:
    """The answer, and which server gave it."""
    raw = await sdk.chat.completions.with_raw_response.create(model=NAME, messages=messages, max_tokens=8, **rest)
    return raw.parse(), raw.headers["x-picker-endpoint"]


async def test_a_chat_answers_with_usage_and_cached_tokens(sdk: openai.AsyncOpenAI, gate: Gateway) -> None:
    await ask(sdk, question(), tools=TOOLS)
    answer, _ = await ask(sdk, question(), tools=TOOLS)
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens == (answer.usage.prompt_tokens - 1) // 32 * 32
    await gate.settled()


async def test_a_stream_has_one_chunk_a_token_and_ends_with_usage(sdk: openai.AsyncOpenAI, gate: Gateway) -> None:
    stream = await sdk.chat.completions.create(
        model=NAME,
        messages=question(),
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    await gate.settled()


async def test_a_stream_without_usage_shows_none(sdk: openai.AsyncOpenAI, gate: Gateway) -> None:
    stream = await sdk.completions.create(model=NAME, prompt=LINES[0], max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    await gate.settled()


async def test_prompts_of_token_ids_and_batches_pass(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model=NAME, prompt=[[5] * 40, [6] * 40], max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 80


async def test_the_engines_own_errors_pass_unchanged(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens"):
        await sdk.completions.create(model=NAME, prompt=[5] * 3000)


async def test_conversations_stay_where_they_are_cached_and_both_servers_work(sdk: openai.AsyncOpenAI) -> None:
    conversations = [question(LINES[12 + i], "".join(LINES[i : i + 9])) for i in range(4)]
    served: list[set[str]] = [set() for _ in conversations]
    for _ in range(4):
        answers = await asyncio.gather(*(ask(sdk, list(messages)) for messages in conversations))
        for messages, homes, (answer, endpoint) in zip(conversations, served, answers, strict=True):
            homes.add(endpoint)
            messages += [said("assistant", answer.choices[0].message.content), said("user", "Und weiter?")]
    assert [len(homes) for homes in served] == [1] * 4
    assert len(set.union(*served)) == 2
    for answer, _ in answers:
        assert answer.usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens / 2


async def test_a_killed_server_is_left_and_taken_back(sdk: openai.AsyncOpenAI, gate: Gateway, pods: Pair) -> None:
    _, home = await ask(sdk, question())
    (lost,) = [pod for pod in pods if pod.address == home]
    await asyncio.to_thread(lost.stop, kill=True)
    answers = [await ask(sdk, question()) for _ in range(3)]
    assert {endpoint for _, endpoint in answers} == {pod.address for pod in pods} - {home}
    lost.start()
    await asyncio.to_thread(lost.wait)
    await gate.until(lambda: all(state.healthy for state in gate.app.runtime.scheduler.snapshot(0.0)))
    # Of eight prompts that nobody has, some go to a server that is idle and empty.
    answers = [await ask(sdk, question(system=f"{start} " * 300)) for start in range(8)]
    assert home in {endpoint for _, endpoint in answers}
    await gate.settled()
