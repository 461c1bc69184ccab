"""The official OpenAI SDK, through the proxy and through a real Envoy with ext-proc."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from e2e.gateway import FRONT_ENDS, Gateway, gateway
from picker.sim.pod import running_pods

pytestmark = pytest.mark.e2e

MODEL = "demo"


@pytest.fixture(params=FRONT_ENDS)
async def gate(request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    async with running_pods(2, model=MODEL, time_scale=50.0) as pods, gateway(request.param, pods) as gate:
        yield gate


@pytest.fixture
async def client(gate: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def messages(text: str) -> list[Any]:
    return [{"role": "system", "content": "You are terse. " * 40}, {"role": "user", "content": text}]


async def test_chat_answers_with_usage(client: openai.AsyncOpenAI, gate: Gateway) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=messages("Hello"), max_tokens=7)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    await gate.settled()


async def test_streamed_chat_ends_with_usage(client: openai.AsyncOpenAI, gate: Gateway) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=messages("Hello"), max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    await gate.settled()


async def test_completions_plain_and_streamed(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5)
    assert answer.choices[0].text
    stream = await client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == answer.choices[0].text


async def test_a_conversation_returns_to_the_endpoint_that_holds_it(client: openai.AsyncOpenAI, gate: Gateway) -> None:
    history = [{"role": "user", "content": "Tell me a story. " * 100}]
    served = []
    for turn in range(4):
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=history, max_tokens=20)  # type: ignore[arg-type]
        answer = raw.parse()
        served.append(raw.headers["x-picker-endpoint"])
        history.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        history.append({"role": "user", "content": f"Go on, part {turn}."})
    assert len(set(served)) == 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > answer.usage.prompt_tokens // 2


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]


async def test_an_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nope", messages=messages("Hello"))
    assert caught.value.body == {
        "message": "The model `nope` does not exist. Valid aliases: demo.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_a_request_without_messages_is_a_bad_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        await client.chat.completions.create(model=MODEL, messages=[])


async def test_engines_own_errors_pass_unchanged(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await client.chat.completions.create(model=MODEL, messages=messages("Hello"), max_tokens=10_000_000)


async def test_without_an_endpoint_the_service_is_unavailable() -> None:
    async with gateway("proxy", [], known=False) as gate:
        await gate.until(lambda: [state.healthy for state in gate.app.runtime.scheduler.snapshot(0.0)] == [False])
        async with openai.AsyncOpenAI(base_url=f"{gate.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="No healthy endpoint") as caught:
                await client.chat.completions.create(model=MODEL, messages=messages("Hello"))
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
