"""A table kept by events alone says of every request what the engine will have cached: the most that can be known.

The plainest table there is, fed with the engine's own tokens: where picker predicts something else, the fault is not in
the events.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from real_vllm.listener import Frame, replay
from real_vllm.pod import Pod
from real_vllm.prediction import Comparison, Row
from real_vllm.script import RESET, Answer, Step, play
from real_vllm.test_reading import prompt_ids, telling
from real_vllm.tiny_model import NAME
from real_vllm.workload import workload

_REQUESTS = 200
_BLOCK = 32

Chain = tuple[int | None, str | None, tuple[int, ...]]  # hash of the block before, else adapter or salt; the tokens


@dataclass(slots=True)
class Table:
    """hashes: of blocks ever stored, by what they are. copies: how many of each are in the cache."""

    hashes: dict[Chain, int] = field(default_factory=dict)
    copies: Counter[int] = field(default_factory=Counter)

    def apply(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "AllBlocksCleared":
                self.copies.clear()
            case "BlockRemoved":
                self.copies.subtract(event["block_hashes"])
            case "BlockStored":
                self._store(event)

    def _store(self, event: dict[str, Any]) -> None:
        parent, tokens = event["parent_block_hash"], event["token_ids"]
        for i, value in enumerate(event["block_hashes"]):
            keys = (event.get("extra_keys") or [None] * (i + 1))[i]
            root = keys[0] if keys else None
            self.hashes[parent, root if parent is None else None, tuple(tokens[i * _BLOCK : (i + 1) * _BLOCK])] = value
            self.copies[value] += 1
            parent = value

    def cached(self, tokens: list[int], root: str | None) -> int:
        """Leading tokens of a prompt that are cached; its last token never is."""
        parent: int | None = None
        for start in range(0, (len(tokens) - 1) // _BLOCK * _BLOCK, _BLOCK):
            chain = (parent, root if parent is None else None, tuple(tokens[start : start + _BLOCK]))
            parent = self.hashes.get(chain)
            if parent is None or self.copies[parent] < 1:
                return start
        return (len(tokens) - 1) // _BLOCK * _BLOCK


def test_events_tell_what_is_cached_to_the_token(client: httpx.Client, pod: Pod) -> None:
    client.post(RESET).raise_for_status()
    asked: list[tuple[float, Step, Answer]] = []
    sent_at = time.time()
    for step, answer in play(client, telling(workload(3, _REQUESTS))):
        assert answer.status == 200, answer.body
        asked.append((sent_at, step, answer))
        sent_at = time.time()
    frames = replay(pod)[0]
    assert any(
        event["type"] == "BlockRemoved" for frame in frames for event in msgspec.msgpack.decode(frame.payload)[1]
    )
    compared = predictions(asked, frames)
    assert len(compared.rows) == _REQUESTS
    assert not compared.wrong(), f"{compared}\n{compared.wrong()}"
    assert sum(row.cached > 0 for row in compared.rows) > _REQUESTS / 2


def predictions(asked: list[tuple[float, Step, Answer]], frames: list[Frame]) -> Comparison:
    """What the table said when each request was sent; the engine stamps its batches with the same machine's clock."""
    table, compared = Table(), Comparison()
    batches = [msgspec.msgpack.decode(frame.payload) for frame in frames]
    for number, (sent_at, step, answer) in enumerate(asked):
        while batches and batches[0][0] < sent_at:
            for event in batches.pop(0)[1]:
                table.apply(event)
        ids = prompt_ids(answer)
        adapter = step.body["model"] if step.body["model"] != NAME else None
        predicted = table.cached(ids, step.body.get("cache_salt", adapter))
        assert answer.cached is not None
        compared.add(Row(number, step.name, "pod", len(ids), predicted, answer.cached))
    return compared
