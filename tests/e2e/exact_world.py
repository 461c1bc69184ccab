"""Simulated pods that tokenise and publish as vLLM does, a picker that follows them, and a client that compares."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from e2e.gateway import Gateway, gateway
from picker.config import ExactConfig
from picker.core.snapshot import EndpointState
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import EventOptions, PodOptions
from picker.types import Decision
from tiny_tokenizers import CHAT_TEMPLATE, PROSE, spec

MODEL = "tiny"
WORDS = PROSE.split(" ")


def write_model(made: Path) -> Path:
    """A model's tokenizer files."""
    (made / "tokenizer.json").write_text(json.dumps(spec("qwen")), encoding="utf-8")
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (made / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


@dataclass(frozen=True, slots=True)
class Publishing:
    """A pod by its endpoint's name, and how many batches it has sent."""

    name: str
    published: int


@dataclass(slots=True)
class World:
    """Pods, a gateway and a client; `wrong`: requests whose prediction did not come true."""

    gate: Gateway
    pods: list[Pod]
    client: aiohttp.ClientSession
    wrong: list[tuple[float, int]] = field(default_factory=list)
    patient: bool = True  # wait after each answer until what the pods say of it has arrived

    async def chat(self, messages: list[dict[str, Any]], **more: Any) -> str:
        """One request after the other; what was predicted is held against what the pod says."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 12, **more}
        async with self.client.post(self.gate.url + "/v1/chat/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        await self.gate.settled()
        record = self.gate.app.runtime.recent(1)[0]
        assert isinstance(record.outcome, Decision)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        if record.outcome.matched_tokens != cached:
            self.wrong.append((record.outcome.matched_tokens, cached))
        if self.patient:
            await self.gate.until(self.heard)
        return str(answer["choices"][0]["message"]["content"])

    def heard(self) -> bool:
        """Whether all that the pods have published has arrived: it does so a moment after the answer."""
        hearing = self.gate.app.hearing
        assert hearing is not None
        told = [(hearing.events.stats[pod.name].last_seq, pod.published) for pod in self._named()]
        return hearing.ingest.idle and all(sent == (0 if last is None else last + 1) for last, sent in told)

    def _named(self) -> list[Publishing]:
        urls = [pod.url.removeprefix("http://") for pod in self.pods]
        return [Publishing(url, pod.publishers[0].next_seq) for url, pod in zip(urls, self.pods, strict=True)]

    def resident(self, row: int = 0) -> int:
        """Blocks that a pod is known to hold."""
        exact = self.gate.app.runtime.scheduler.exact
        assert exact is not None
        return exact.index.resident(row)

    def states(self) -> list[EndpointState]:
        return self.gate.app.runtime.scheduler.snapshot(0.0)


@asynccontextmanager
async def world(front_end: str, folder: Path | None, pods: PodOptions, **exact: Any) -> AsyncIterator[World]:
    """Pods and a picker in front of them that has read all they have said."""
    async with open_pods(pods) as opened, watching(front_end, folder, opened, **exact) as made:
        yield made


@asynccontextmanager
async def watching(front_end: str, folder: Path | None, pods: list[Pod], **exact: Any) -> AsyncIterator[World]:
    """The same before pods that run already."""
    usual: dict[str, Any] = {"tokenizer": None if folder is None else str(folder), "budget_ms": 5000.0}
    told = ExactConfig(**(usual | exact))
    async with (
        gateway(front_end, [pod.url for pod in pods], exact=told) as gate,
        aiohttp.ClientSession() as client,
    ):
        made = World(gate, pods, client)
        await gate.until(lambda: all(state.kv_events in ("whole", "partial") for state in made.states()))
        yield made


def options(folder: Path, **more: Any) -> PodOptions:
    fields: dict[str, Any] = {"count": 2, "model": MODEL, "time_scale": 200.0, "block_size": 16, "kv_tokens": 3000}
    return PodOptions(**(fields | {"tokenizer": folder, "events": EventOptions()} | more))


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


async def converse(made: World, count: int, *, seed: int = 1, **more: Any) -> None:
    """A mix of new and growing conversations that share system prompts, more than fit in the pods' caches."""
    rng = random.Random(seed)
    systems = [text(rng, 60) for _ in range(3)]
    running: list[list[dict[str, Any]]] = []
    for _ in range(count):
        if running and rng.random() < 0.5:
            messages = rng.choice(running)
            messages.append({"role": "user", "content": text(rng, 10)})
        else:
            messages = [{"role": "system", "content": rng.choice(systems)}, {"role": "user", "content": text(rng, 15)}]
            running.append(messages)
        answer = await made.chat(messages, **more)
        messages.append({"role": "assistant", "content": answer})


async def fault(made: World, pod: int, **change: Any) -> None:
    async with made.client.post(made.pods[pod].url + "/_sim/fault", json=change) as response:
        assert response.status == 200, await response.text()
