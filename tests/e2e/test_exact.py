"""Exact knowledge over real sockets: simulated pods that tokenise and publish as vLLM does; what picker predicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.exact_world import converse, fault, options, world, write_model
from e2e.gateway import FRONT_ENDS
from picker.sim.engine_hashes import HashAlgorithm
from picker.sim.pod_options import EventOptions
from tiny_tokenizers import CHAT_TEMPLATE

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
async def test_predictions_are_what_the_engines_report(front_end: str, folder: Path) -> None:
    async with world(front_end, folder, options(folder)) as made:
        await converse(made, 30)
        assert made.wrong == []
        assert sum(state.predictions for state in made.states()) == 30
        page = made.gate.app.telemetry.text().decode()
        assert 'picker_prompt_readings_total{outcome="read"} 30.0' in page
        assert page.count("picker_kv_event_batches_total{") == 8


async def test_the_reference_mode_predicts_the_same(folder: Path) -> None:
    async with world("proxy", folder, options(folder), by="tokens") as made:
        await converse(made, 20)
        assert made.wrong == []


@pytest.mark.parametrize(
    "events",
    [
        EventOptions(algorithm=HashAlgorithm.SHA256_CBOR),
        EventOptions(whole_hashes=True),
        EventOptions(algorithm=HashAlgorithm.SHA256_CBOR, whole_hashes=True, arrays=True, replay_topic=False),
    ],
)
async def test_the_engines_hashes_do_not_matter(folder: Path, events: EventOptions) -> None:
    async with world("proxy", folder, options(folder, events=events)) as made:
        await converse(made, 12)
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
    async with world("proxy", None, pods, by="bytes") as made:
        for _ in range(3):
            made.wrong.clear()  # at first, what ids spell is only being learned
            await converse(made, 12)
        assert made.wrong == []


# --- trouble ---


async def test_a_gap_is_repaired_by_a_replay(folder: Path) -> None:
    async with world("proxy", folder, options(folder, count=1)) as made:
        await converse(made, 5)
        await fault(made, 0, events={"drop": 3})
        made.patient = False  # nobody hears of what was not sent
        await converse(made, 10, seed=2)
        made.patient = True
        assert made.gate.app.hearing is not None
        (stats,) = made.gate.app.hearing.events.stats.values()
        await made.gate.until(lambda: stats.gaps > 0 and stats.replays > 1)
        await made.gate.until(made.heard)
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
