"""A simulated pod and a real vLLM server, given the same requests, cache and publish the same, byte for byte."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
import zmq.asyncio

from picker.sim.pod import running_pods
from picker.sim.pod_options import EventOptions
from real_vllm.listener import END, replay
from real_vllm.pod import POOL, Pod
from real_vllm.recording import Recorded, Recording, load, perform, untimed
from real_vllm.script import Answer, Step, completion, ids
from real_vllm.tiny_model import CONTEXT, NAME

_BLOCK = 32


@pytest.fixture(scope="module")
def recording() -> Recording:
    return load()


def counts(steps: list[Recorded]) -> list[tuple[str, int | None, int | None]]:
    return [(step.name, step.prompt, step.cached) for step in steps]


async def asked(client: httpx.AsyncClient, step: Step) -> Answer:
    response = await client.post(step.path, json=step.body)
    return Answer(response.status_code, response.json())


async def test_a_simulated_pod_does_what_the_real_one_did(recording: Recording, model: Path) -> None:
    options: dict[str, Any] = {
        "model": NAME,
        "tokenizer": model,
        "block_size": _BLOCK,
        "kv_tokens": POOL + _BLOCK,
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "events": EventOptions(),
        "time_scale": 1000.0,
    }
    async with running_pods(1, **options) as (url,), httpx.AsyncClient(base_url=url, timeout=60.0) as client:
        steps = await perform(lambda step: asked(client, step), recording)
        source = (await client.get("/kv_event_sources")).json()["0"]
        batches = await replayed(int(source["replay_endpoint"].rpartition(":")[2]))
    assert counts(steps) == counts(recording.steps)
    assert [untimed(batch) for batch in batches] == recording.batches


async def test_the_recording_is_what_a_server_does(recording: Recording, pod: Pod) -> None:
    async with httpx.AsyncClient(base_url=pod.url, timeout=60.0) as client:
        await asked(client, completion("", ids(1, 31)))  # has the reset before this test published
        before = len(replay(pod)[0])
        steps = await perform(lambda step: asked(client, step), recording)
    assert counts(steps) == counts(recording.steps)
    assert [untimed(frame.payload) for frame in replay(pod, before)[0]] == recording.batches


async def replayed(port: int) -> list[bytes]:
    """All payloads that are kept behind a replay socket."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://127.0.0.1:{port}")
        await socket.send_multipart([b"", struct.pack(">q", 0)])
        batches = []
        async with asyncio.timeout(20.0):
            while (parts := await socket.recv_multipart())[-2] != END:
                batches.append(parts[-1])
    return batches
