"""The codec of KV events on what a real vLLM server has published; see `recording`."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from picker.types import BlocksRemoved, BlocksStored, CacheCleared
from picker.wire.kv_events import Cleared, Removed, Stored, decode_batch, encode_batch, tell
from real_vllm.recording import load

BATCHES = load().batches
KINDS: dict[str, type] = {"BlockStored": Stored, "BlockRemoved": Removed, "AllBlocksCleared": Cleared}


@pytest.mark.parametrize("payload", BATCHES, ids=range(len(BATCHES)))
def test_a_batch_read_and_written_again_is_the_same_bytes(payload: bytes) -> None:
    batch = decode_batch(payload)
    assert batch.skipped == 0
    assert encode_batch(batch.ts, batch.events, batch.rank) == payload


def test_events_are_what_a_plain_decoder_sees() -> None:
    seen: Counter[str] = Counter()
    for payload in BATCHES:
        _, events, rank = msgspec.msgpack.decode(payload)
        batch = decode_batch(payload)
        assert batch.rank == rank
        for plain, event in zip(events, batch.events, strict=True):
            seen[plain["type"]] += isinstance(event, KINDS[plain["type"]])
            if isinstance(event, Stored):
                assert list(event.hashes) == plain["block_hashes"]
                assert list(event.tokens) == plain["token_ids"]
                assert event.parent == plain["parent_block_hash"]
    assert min(seen.values()) > 0
    assert set(seen) == set(KINDS)


def test_facts_leave_nothing_out_and_name_the_salt_of_a_first_block() -> None:
    salts, resident = set(), Counter[int]()
    for payload in BATCHES:
        told = tell(decode_batch(payload).events, "pod")
        assert told.wrong is None
        for fact in told.facts:
            match fact:
                case CacheCleared():
                    resident.clear()
                case BlocksStored():
                    salts.add(fact.salt)
                    assert len(fact.tokens) == len(fact.hashes) * fact.block_size == len(fact.hashes) * 32
                    assert fact.media == ()
                    resident.update(fact.hashes)
                case BlocksRemoved():
                    resident.subtract(fact.hashes)
        assert min(resident.values(), default=0) >= 0
        assert sum(resident.values()) <= 160
    assert salts == {None, "a", "b"}
