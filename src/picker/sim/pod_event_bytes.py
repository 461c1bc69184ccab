"""KV events as vLLM's msgpack: maps inside an array. Owns the bytes; knows no cache and no socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Stored:
    hashes: tuple[int | bytes, ...]
    parent: int | bytes | None
    tokens: tuple[int, ...] = field(repr=False)
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"
    lora_name: str | None = None
    extra_keys: tuple[tuple[str, ...] | None, ...] | None = None
    group: int | None = 0
    kind: str | None = "full_attention"
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[int | bytes, ...]
    medium: str | None = "GPU"
    group: int | None = 0


@dataclass(frozen=True, slots=True)
class Cleared:
    pass


def encode_batch(
    ts: float, rank: int | None, events: Sequence[Stored | Removed | Cleared], *, arrays: bool = False
) -> bytes:
    shaped = [_event(event) for event in events]
    return msgspec.msgpack.encode([ts, [list(e.values()) if arrays else e for e in shaped], rank])


def _event(event: Stored | Removed | Cleared) -> dict[str, Any]:
    match event:
        case Stored():
            body = {
                "type": "BlockStored",
                "block_hashes": event.hashes,
                "parent_block_hash": event.parent,
                "token_ids": event.tokens,
                "block_size": event.block_size,
                "lora_id": event.lora_id,
                "medium": event.medium,
                "lora_name": event.lora_name,
            }
            more = {
                "extra_keys": event.extra_keys,
                "group_idx": event.group,
                "kv_cache_spec_kind": event.kind,
                "session_id": event.session,
            }
            return body | {key: value for key, value in more.items() if value is not None}
        case Removed():
            return {
                "type": "BlockRemoved",
                "block_hashes": event.hashes,
                "medium": event.medium,
                "group_idx": event.group,
            }
        case Cleared():
            return {"type": "AllBlocksCleared"}
