from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picker.app import App
from picker.config import Config, EndpointSpec
from picker.errors import ConfigError
from picker.load import trace
from picker.prefix.blocks import BlockHasher
from picker.record import Recorder
from picker.types import Decision, Endpoint, Failed, FailureReason, Finished, Request, Usage

BLOCK = 256
HASHER = BlockHasher(b"secret", BLOCK)
POD = Endpoint("pod-1", "10.0.0.1:8000")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Traffic:
    """Requests as the runtime tells of them."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.recorder = Recorder(path, block_bytes=BLOCK, clock=self.clock)
        self._path = path

    def ask(self, number: int, prompt: bytes, *, max_tokens: int | None = None) -> None:
        hashes = HASHER.hash(prompt, root=HASHER.root("m", None))
        request = Request(number, "m", self.clock.now, hashes, prompt_bytes=len(prompt), max_tokens=max_tokens)
        self.recorder.decision(Decision(number, POD), 0.0, request)

    def end(self, number: int, prompt: int = 10, output: int = 5, cached: int | None = 3) -> None:
        self.recorder.fact(Finished(number, 200, Usage(prompt, output, cached)))

    def lines(self) -> list[Mapping[str, Any]]:
        self.recorder.close()
        return [json.loads(line) for line in self._path.read_text().splitlines()]


@pytest.fixture
def traffic(tmp_path: Path) -> Traffic:
    return Traffic(tmp_path / "trace.jsonl")


def text(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).integers(97, 123, count, dtype=np.uint8).tobytes()


def test_a_line_has_times_lengths_and_hashes_only(traffic: Traffic) -> None:
    traffic.clock.now = 100.25
    traffic.ask(1, text(1, 5000))
    traffic.clock.now = 103.0
    traffic.end(1, prompt=1200, output=77, cached=512)
    (line,) = traffic.lines()
    assert set(line) == {"timestamp", "input_length", "output_length", "hash_ids", "prompt_tokens", "cached_tokens"}
    assert (line["timestamp"], line["input_length"], line["output_length"]) == (250, 1250, 77)
    assert (line["prompt_tokens"], line["cached_tokens"], len(line["hash_ids"])) == (1200, 512, 3)


def test_equal_prefixes_have_equal_ids_and_nothing_of_the_text_is_kept(traffic: Traffic, tmp_path: Path) -> None:
    common = text(1, 2 * 2048)
    for number, prompt in enumerate([common + text(2, 3000), common + text(3, 100), text(4, 2 * 2048)]):
        traffic.ask(number, prompt)
        traffic.end(number)
    ids = [line["hash_ids"] for line in traffic.lines()]
    assert ids[0][:2] == ids[1][:2]
    assert len({*ids[0], *ids[1], *ids[2]}) == 4 + 1 + 2
    written = (tmp_path / "trace.jsonl").read_bytes()
    assert not any(common[at : at + 8] in written for at in range(0, len(common), 8))


def test_another_process_gives_other_ids() -> None:
    prompt = text(1, 4096)
    others = BlockHasher(b"another", BLOCK)
    ours, theirs = (each.hash(prompt, root=each.root("m", None)) for each in (HASHER, others))
    assert not set(ours.tolist()) & set(theirs.tolist())


def test_a_recording_is_replayed_by_load_and_simulate(traffic: Traffic, tmp_path: Path) -> None:
    for number, size in enumerate((1, 100, 2047, 2048, 2049, 9000)):
        traffic.clock.now += 0.5
        traffic.ask(number, text(number, size))
    for number in reversed(range(6)):
        traffic.end(number)
    traffic.recorder.close()
    requests = trace.load(tmp_path / "trace.jsonl")
    plan = trace.plan(requests, np.random.default_rng(0), name="t", seed=0)
    assert [each.turns[0].max_tokens for each in plan.conversations] == [5] * 6
    tokens = [sum(piece.tokens for piece in each.turns[0].text) for each in plan.conversations]
    assert tokens == [1, 25, 512, 512, 513, 2250]


def test_a_retry_is_one_request_and_a_failure_has_the_length_that_was_asked_for(traffic: Traffic) -> None:
    for _ in range(2):
        traffic.ask(1, b"x" * 400, max_tokens=9)
    traffic.recorder.fact(Failed(1, FailureReason.RESET))
    traffic.end(1)
    (line,) = traffic.lines()
    assert (line["output_length"], "prompt_tokens" in line) == (9, False)


def test_what_has_no_prompt_is_no_line(traffic: Traffic) -> None:
    traffic.ask(1, b"")
    traffic.end(1)
    assert traffic.lines() == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        Recorder(tmp_path / "there", block_bytes=BLOCK, clock=Clock())
    with pytest.raises(ConfigError, match="cannot write"):
        Recorder(tmp_path / "no" / "folder", block_bytes=BLOCK, clock=Clock())
    with pytest.raises(ConfigError, match="block_bytes"):
        Recorder(tmp_path / "new", block_bytes=192, clock=Clock())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_lines_and_nothing_else(traffic: Traffic) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), traffic.recorder._file)
    traffic.ask(1, b"x" * 400)
    traffic.end(1)
    traffic.recorder.close()
    assert (traffic.recorder.lines, traffic.recorder.lost) == (0, 1)


async def test_a_run_that_is_cancelled_writes_what_is_left(traffic: Traffic) -> None:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(traffic.recorder.run())
        await asyncio.sleep(0)
        traffic.ask(1, b"x" * 400)
        traffic.end(1)
        task.cancel()
    assert len(traffic.lines()) == 1


def test_the_configuration_turns_it_on(tmp_path: Path) -> None:
    endpoints: list[str | EndpointSpec] = ["http://10.0.0.1:8000"]
    assert App(Config(endpoints=endpoints)).recorder is None
    app = App(Config(endpoints=endpoints, record=str(tmp_path / "trace")))
    assert app.recorder is not None
    request = Request(1, "m", app.runtime.clock(), prompt_bytes=400)
    app.telemetry.decision(Decision(1, POD), 0.0, request)
    app.telemetry.fact(Finished(1, 200, Usage(100, 5)))
    app.recorder.close()
    assert json.loads((tmp_path / "trace").read_text())["output_length"] == 5
