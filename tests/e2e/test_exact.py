"""Exact knowledge over real sockets: simulated pods that tokenise and publish as vLLM does; what picker predicts."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from e2e.gateway import FRONT_ENDS, Gateway, gateway
from picker.config import ExactConfig
from picker.core.snapshot import EndpointState
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import EventOptions, PodOptions
from picker.types import Decision
from tiny_tokenizers import CHAT_TEMPLATE, PROSE, spec

pytestmark = pytest.mark.e2e

MODEL = "tiny"
WORDS = PROSE.split(" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's tokenizer files."""
    made = tmp_path_factory.mktemp("model")
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
            await self.gate.until(self._heard)
        return str(answer["choices"][0]["message"]["content"])

    def _heard(self) -> bool:
        """Whether all that the pods have published has arrived: it does so a moment after the answer."""
        hearing = self.gate.app.hearing
        assert hearing is not None
        told = [(hearing.events.stats[pod.name].last_seq, pod.published) for pod in self._named()]
        return hearing.ingest.idle and all(sent == (0 if last is None else last + 1) for last, sent in told)

    def _named(self) -> list[Publishing]:
        urls = [pod.url.removeprefix("http://") for pod in self.pods]
        return [Publishing(url, pod.publishers[0].next_seq) for url, pod in zip(urls, self.pods, strict=True)]

    def resident(self) -> int:
        """Blocks that the first pod is known to hold."""
        exact = self.gate.app.runtime.scheduler.exact
        assert exact is not None
        return exact.index.resident(0)

    def states(self) -> list[EndpointState]:
        return self.gate.app.runtime.scheduler.snapshot(0.0)


@asynccontextmanager
async def world(front_end: str, folder: Path | None, pods: PodOptions, **exact: Any) -> AsyncIterator[World]:
    told = ExactConfig(**({"tokenizer": None if folder is None else str(folder)} | exact))
    async with (
        open_pods(pods) as opened,
        gateway(front_end, [pod.url for pod in opened], exact=told) as gate,
        aiohttp.ClientSession() as client,
    ):
        made = World(gate, opened, client)
        await gate.until(lambda: all(state.kv_events == "whole" for state in made.states()))
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


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_predictions_are_what_the_engines_report(front_end: str, folder: Path) -> None:
    async with world(front_end, folder, options(folder)) as made:
        await converse(made, 30)
        assert made.wrong == []
        assert sum(state.predictions for state in made.states()) == 30


async def test_the_reference_mode_predicts_the_same(folder: Path) -> None:
    async with world("proxy", folder, options(folder), by="tokens", budget_ms=5000.0) as made:
        await converse(made, 20)
        assert made.wrong == []


async def test_salts_share_nothing(folder: Path) -> None:
    async with world("proxy", folder, options(folder, count=1)) as made:
        await converse(made, 6, cache_salt="one")
        await converse(made, 6, cache_salt="two")
        await converse(made, 6)
        assert made.wrong == []


async def test_tools_are_part_of_the_prompt(folder: Path) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": parameters}}
    ]
    async with world("proxy", folder, options(folder, count=1)) as made:
        await converse(made, 6, tools=tools)
        await converse(made, 6)
        assert made.wrong == []


async def test_without_tokenizer_files_the_engines_are_asked(folder: Path) -> None:
    pods = options(folder, count=1, scale_out=True)
    async with world("proxy", None, pods, by="bytes", budget_ms=5000.0) as made:
        for _ in range(3):
            made.wrong.clear()  # at first, what ids spell is only being learned
            await converse(made, 12)
        assert made.wrong == []


# --- trouble ---


async def fault(made: World, pod: int, **change: Any) -> None:
    async with made.client.post(made.pods[pod].url + "/_sim/fault", json=change) as response:
        assert response.status == 200, await response.text()


async def test_a_gap_is_repaired_by_a_replay(folder: Path) -> None:
    async with world("proxy", folder, options(folder, count=1)) as made:
        await converse(made, 5)
        await fault(made, 0, events={"drop": 3})
        made.patient = False  # nobody hears of what was not sent
        await converse(made, 10, seed=2)
        made.patient = True
        assert made.gate.app.hearing is not None
        (stats,) = made.gate.app.hearing.events.stats.values()
        assert (stats.gaps > 0, stats.replays > 1) == (True, True)
        made.wrong.clear()  # of those between the gap and its repair
        await converse(made, 10, seed=3)
        assert (made.wrong, made.states()[0].kv_events) == ([], "whole")


async def test_a_restarted_engine_is_known_to_be_empty(folder: Path) -> None:
    async with world("proxy", folder, options(folder, count=1)) as made:
        await converse(made, 8)
        await fault(made, 0, restart=True)
        await made.gate.until(lambda: made.resident() == 0)
        await made.gate.until(lambda: made.states()[0].kv_events == "whole")
        await converse(made, 12, seed=1)
        assert made.wrong == []


async def test_an_engine_that_lies_about_its_blocks_is_found_out(folder: Path) -> None:
    async with world("proxy", folder, options(folder, count=1)) as made:
        await fault(made, 0, events={"block_size": 8})
        await converse(made, 6)
        (state,) = made.states()
        assert state.kv_events in ("suspect", "doubted")
        assert state.kv_events_reason


async def test_an_engine_with_another_chat_template_is_found_out(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text((folder / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    changed = CHAT_TEMPLATE.replace("'<|im_start|>' + message.role", "'<|im_start|>' + message.role + ' '")
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": changed}), encoding="utf-8")
    async with world("proxy", other, options(folder, count=1, kv_tokens=30_000)) as made:
        await converse(made, 24)
        (state,) = made.states()
        assert state.kv_events == "doubted"
        assert "too low" in state.kv_events_reason
