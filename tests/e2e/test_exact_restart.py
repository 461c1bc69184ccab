"""Picker goes and comes again: what a snapshot is worth to the next one, and what it must not be taken for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from e2e.exact_world import World, converse, fault, options, watching, world, write_model
from picker.sim.pod import open_pods
from picker.sim.pod_options import EventOptions
from picker.types import BlocksStored
from tiny_tokenizers import PROSE

pytestmark = pytest.mark.e2e

SALT = "salt-of-a-tenant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "picker.snapshot"


def is_private(path: Path) -> bool:
    return path.stat().st_mode & 0o077 == 0


def shown(path: Path, text: str, tokens: Iterable[Sequence[int]]) -> list[object]:
    """The words of a text and the runs of four tokens, in any spelling, that stand in a file."""
    data = path.read_bytes()
    assert len(data) > 1000
    words: list[object] = [word for word in set(text.split(" ")) if len(word) > 4 and word.encode() in data]
    runs = {tuple(ids[at : at + 4]) for ids in tokens for at in range(0, len(ids) - 3, 4)}
    assert runs
    return words + [run for run in runs if any(spelled in data for spelled in spellings(run))]


def spellings(run: Sequence[int]) -> Iterator[bytes]:
    yield msgspec.msgpack.encode(list(run))[1:]
    for kind in ("<u2", ">u2", "<u4", ">u4", "<u8", ">u8"):
        yield np.array(run).astype(kind).tobytes()


async def dies(made: World) -> None:
    """Save as every so often; then it hears and saves no more, like a picker that was killed."""
    snapshots = made.gate.app.snapshots
    assert snapshots is not None
    assert await snapshots.save()
    made.gate.app.snapshots = None


def hearing(made: World, pod: int = 0) -> Any:
    """Counts of one pod's stream."""
    events = made.gate.app.hearing
    assert events is not None
    return events.events.stats[made.pods[pod].url.removeprefix("http://")]


async def test_a_restarted_picker_knows_what_the_last_one_did(folder: Path, saved: Path) -> None:
    async with open_pods(options(folder, kv_tokens=30_000)) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 12)
            known = [before.resident(row) for row in (0, 1)]
        assert is_private(saved)
        async with watching("proxy", folder, pods, snapshot=str(saved)) as made:
            assert [made.resident(row) for row in (0, 1)] == known
            assert [hearing(made, pod).batches for pod in (0, 1)] == [0, 0], "all was replayed"
            await converse(made, 12)
            assert made.wrong == []
            assert sum(state.predictions for state in made.states()) == 12


async def test_what_happened_meanwhile_is_replayed(folder: Path, saved: Path) -> None:
    async with open_pods(options(folder, count=1, kv_tokens=30_000)) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 6)
        async with watching("proxy", folder, pods) as other:
            await converse(other, 6, seed=2)
            published = pods[0].publishers[0].next_seq
        async with watching("proxy", folder, pods, snapshot=str(saved)) as made:
            await made.gate.until(made.heard)
            assert 0 < hearing(made).batches < published
            await converse(made, 6, seed=2)
            assert made.wrong == []


async def test_an_engine_that_restarted_meanwhile_is_known_to_be_empty(folder: Path, saved: Path) -> None:
    async with open_pods(options(folder, count=1)) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 6)
            await dies(before)
            await fault(before, 0, restart=True)
        async with watching("proxy", folder, pods, snapshot=str(saved)) as made:
            assert (made.resident(), hearing(made).restarts) == (0, 1)
            assert made.states()[0].kv_events == "whole"
            await converse(made, 6)
            assert made.wrong == []


async def test_a_replay_that_no_longer_reaches_back_clears_what_was_saved(
    folder: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    few = options(folder, count=1, kv_tokens=30_000, events=EventOptions(buffer_steps=4))
    async with open_pods(few) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 6)
        async with watching("proxy", folder, pods) as other:
            await converse(other, 6, seed=2)
        async with watching("proxy", folder, pods, snapshot=str(saved)) as made:
            (state,) = made.states()
            assert state.kv_events == "partial"
            assert "no longer replayed" in state.kv_events_reason
            await converse(made, 6, seed=3)
    assert "what was saved of it is dropped: batches before number" in caplog.text


async def test_without_replays_nothing_that_was_saved_is_believed(folder: Path, saved: Path) -> None:
    silent = options(folder, count=1, events=EventOptions(replay=False))
    async with open_pods(silent) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 4)
        async with watching("proxy", folder, pods, snapshot=str(saved)) as made:
            (state,) = made.states()
            assert (state.kv_events, made.resident()) == ("partial", 0)
            assert "picker was away" in state.kv_events_reason


async def test_a_snapshot_holds_neither_text_nor_tokens_nor_salts(folder: Path, saved: Path) -> None:
    async with world("proxy", folder, options(folder, count=1, kv_tokens=30_000), snapshot=str(saved)) as made:
        await converse(made, 6, cache_salt=SALT)
        tokens = [fact.tokens for fact in made.gate.facts if isinstance(fact, BlocksStored)]
    assert shown(saved, f"{PROSE} {SALT}", tokens) == []


async def test_a_tokenizer_that_changed_makes_a_snapshot_foreign(
    folder: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_model(tmp_path)
    (other / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}', encoding="utf-8")
    async with open_pods(options(folder, count=1)) as pods:
        async with watching("proxy", folder, pods, snapshot=str(saved)) as before:
            await converse(before, 3)
        async with watching("proxy", other, pods, snapshot=str(saved)) as made:
            assert hearing(made).batches > 0
    assert "made with another tokenizer" in caplog.text


@pytest.mark.parametrize("by", ["tokens", "bytes"])
async def test_other_ways_to_match_are_saved_too(folder: Path, saved: Path, by: str) -> None:
    told = {"by": by, "snapshot": str(saved)}
    model = folder if by == "tokens" else None
    async with open_pods(options(folder, count=1, kv_tokens=30_000, scale_out=True)) as pods:
        async with watching("proxy", model, pods, **told) as before:
            await converse(before, 6)
            known = before.resident()
        async with watching("proxy", model, pods, **told) as made:
            assert made.resident() == known > 0
            assert made.states()[0].kv_events == "whole"
