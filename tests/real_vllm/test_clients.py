"""Programs that know nothing of picker, unchanged: vLLM's own benchmark and the Anthropic SDK; and `picker load`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from e2e.gateway import FRONT_ENDS, Gateway, gateway
from real_vllm.conftest import Pair
from real_vllm.tiny_model import NAME

REQUESTS = 24


@pytest.fixture(params=FRONT_ENDS)
async def gate(request: pytest.FixtureRequest, pods: Pair) -> AsyncIterator[Gateway]:
    async with gateway(request.param, [pod.url for pod in pods]) as gate:
        yield gate


async def ran(*command: str) -> str:
    """What a program that ends well wrote to stdout."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"},
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()[-2000:]
    return out.decode()


async def load(url: str, *flags: str) -> dict[str, Any]:
    """The figures of a `picker load` on this server."""
    shape = ("--rate", "12", "--requests", str(REQUESTS), "--groups", "2", "--system-tokens", "300")
    lengths = ("--question-tokens", "40", "--max-tokens", "6", "--processes", "1")
    out = await ran(sys.executable, "-m", "picker", "load", url, *shape, *lengths, *flags, "--json")
    return json.loads(out)  # type: ignore[no-any-return]


async def test_vllms_own_benchmark_runs_through_picker(gate: Gateway, venv: Path, model: Path, tmp_path: Path) -> None:
    await ran(
        *(str(venv / "bin" / "vllm"), "bench", "serve", "--backend", "openai-chat", "--base-url", gate.url),
        *("--endpoint", "/v1/chat/completions", "--model", NAME, "--tokenizer", str(model), "--disable-tqdm"),
        *("--dataset-name", "random", "--random-input-len", "120", "--random-output-len", "8", "--ignore-eos"),
        *("--num-prompts", str(REQUESTS), "--request-rate", "20", "--save-result", "--result-dir", str(tmp_path)),
        *("--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == REQUESTS
    assert result["total_output_tokens"] == REQUESTS * 8
    await gate.settled()


async def test_picker_load_measures_through_picker_what_the_servers_cached(gate: Gateway) -> None:
    figures = await load(gate.url)
    assert (figures["requests"], figures["failed"]) == (REQUESTS, 0)
    assert figures["hit_ratio"] > 0.5  # two system prompts, twelve requests each
    assert sum(figures["by_endpoint"].values()) == REQUESTS
    assert "unknown" not in figures["by_endpoint"]
    await gate.settled()


async def test_picker_load_measures_a_server_without_picker(pods: Pair) -> None:
    figures = await load(pods[0].url)
    assert (figures["requests"], figures["failed"]) == (REQUESTS, 0)
    assert figures["hit_ratio"] > 0.5
    assert figures["by_endpoint"] == {"unknown": REQUESTS}


async def test_the_anthropic_sdk_talks_to_vllm_through_picker(gate: Gateway) -> None:
    ask: dict[str, Any] = {"model": NAME, "max_tokens": 6, "messages": [{"role": "user", "content": "Hello there."}]}
    async with anthropic.AsyncAnthropic(base_url=gate.url, api_key="none", max_retries=0) as client:
        answer = await client.messages.create(**ask)
        assert answer.usage.output_tokens == 6
        async with client.messages.stream(**ask) as stream:
            final = await stream.get_final_message()
    assert final.usage.output_tokens == 6
    await gate.settled()
