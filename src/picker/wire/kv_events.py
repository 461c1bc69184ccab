"""KV events as engines publish them, in msgpack: the bytes of one batch, and what they say as facts.

Reads every form that vLLM and SGLang have sent: the batch as array or map, its events as maps or as tagged arrays whose
last fields are missing, hashes as numbers or bytes. Holds no state: order, gaps and trust are `sources.kv_stream`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import msgspec

from picker.errors import WireError
from picker.types import BlocksRemoved, BlocksStored, CacheCleared, Tier

# One step of an engine makes some 100 kB; re-announcing a prompt of 800,000 tokens takes this.
MAX_BATCH_BYTES = 4 << 20
MAX_BLOCK_SIZE = 1 << 16  # tokens

Hash: TypeAlias = int | bytes

_MASK = (1 << 64) - 1
_MAX_DEPTH = 4  # of an extra key: vLLM's media are pairs
_FULL = "full_attention"
# Only these spell their blocks out; of a window or a recurrent state, what is kept of a prompt is listed without its
# tokens' places (vLLM, `kv_cache_spec_kind`).
_SPELLED = frozenset({_FULL, "mla_attention", "sink_full_attention", "unknown", ""})
# What SGLang and Dynamo write before a salt among the extra keys.
_SALT_PREFIX = "dynamo-cache-salt:"

# vLLM says GPU, CPU and STORAGE; SGLang GPU, CPU_PINNED, DISK and EXTERNAL; the others are Dynamo's.
_TIERS = {
    **dict.fromkeys(("GPU", "DEVICE", "HBM", "CUDA", ""), Tier.GPU),
    **dict.fromkeys(("CPU", "CPU_PINNED", "CPU_TIER1", "HOST", "HOST_PINNED"), Tier.CPU),
}


# --- events, as they are on the wire -----------------------------------------------------------------------


class Stored(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    """Blocks entered the cache. Fields in vLLM's order; None: not said. Token ids are left out of its repr."""

    hashes: tuple[Hash, ...] = msgspec.field(name="block_hashes")
    parent: Hash | None = msgspec.field(name="parent_block_hash")
    tokens: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)], ...] = msgspec.field(name="token_ids")
    block_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCK_SIZE)]
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | dict[str, Any] | None = None  # SGLang's first salted arrays have a map with the salt here
    extra_keys: list[Any] | None = None
    group: int | None = msgspec.field(name="group_idx", default=None)
    kind: str | None = msgspec.field(name="kv_cache_spec_kind", default=None)
    window: int | None = msgspec.field(name="kv_cache_spec_sliding_window", default=None)
    locality: str | None = None
    ownership: Any = None
    session: Any = msgspec.field(name="session_id", default=None)  # in SGLang's later arrays, that map
    cache_salt: str | None = None  # SGLang

    def __repr__(self) -> str:
        return f"Stored({len(self.hashes)} blocks of {self.block_size}, {self.medium})"


class Removed(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    """Blocks left a tier of the cache."""

    hashes: tuple[Hash, ...] = msgspec.field(name="block_hashes")
    medium: str | None = None
    group: int | None = msgspec.field(name="group_idx", default=None)


class Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    """The cache is empty."""


class _StoredRow(Stored, array_like=True, tag="BlockStored", gc=False):
    pass


class _RemovedRow(Removed, array_like=True, tag="BlockRemoved", gc=False):
    pass


class _ClearedRow(Cleared, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


Event: TypeAlias = Stored | Removed | Cleared


class Batch(msgspec.Struct, gc=False, array_like=True):
    """All events of one engine step. ts: unix seconds. rank: data-parallel. skipped: events of types unknown here."""

    ts: float
    events: Sequence[Event]
    rank: int | None = None
    skipped: int = 0


# Batches by their two shapes; `msgspec` wants every pair of a type of its own.
class _MapsInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class _RowsInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[_StoredRow | _RemovedRow | _ClearedRow]
    data_parallel_rank: int | None = None


class _AnyInArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _MapsInMap(msgspec.Struct, gc=False):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class _AnyInMap(msgspec.Struct, gc=False):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


_MAPS_IN_ARRAY = msgspec.msgpack.Decoder(_MapsInArray)
_ROWS_IN_ARRAY = msgspec.msgpack.Decoder(_RowsInArray)
_ANY_IN_ARRAY = msgspec.msgpack.Decoder(_AnyInArray)
_MAPS_IN_MAP = msgspec.msgpack.Decoder(_MapsInMap)
_ANY_IN_MAP = msgspec.msgpack.Decoder(_AnyInMap)
_EVENT_MAP = msgspec.msgpack.Decoder(Stored | Removed | Cleared)
_EVENT_ROW = msgspec.msgpack.Decoder(_StoredRow | _RemovedRow | _ClearedRow)
_NAMED = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_LISTED = msgspec.msgpack.Decoder(list[msgspec.Raw])
_TEXT = msgspec.msgpack.Decoder(str)

_TYPES = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)  # ValidationError is a DecodeError


def decode_batch(payload: bytes) -> Batch:
    """The events of one published batch, in order.

    Unknown fields are passed over, events of unknown types are passed over and counted. Raises WireError for anything
    else that is not a batch; its message names the place and never what stood there.
    """
    if len(payload) > MAX_BATCH_BYTES:
        raise WireError(f"A batch of KV events is larger than {MAX_BATCH_BYTES >> 20} MiB.")
    array = payload[:1] >= b"\x90" and payload[:1] not in (b"\xde", b"\xdf")
    for shape in (_MAPS_IN_ARRAY, _ROWS_IN_ARRAY) if array else (_MAPS_IN_MAP,):
        try:
            found = shape.decode(payload)
        except _UNREADABLE:
            continue
        return Batch(found.ts, found.events, found.data_parallel_rank)
    return _one_by_one(payload, array)


def _one_by_one(payload: bytes, array: bool) -> Batch:
    try:
        found = (_ANY_IN_ARRAY if array else _ANY_IN_MAP).decode(payload)
    except _UNREADABLE as error:
        raise WireError(f"Not a batch of KV events: {_place(error)}.") from None
    events = [event for raw in found.events if (event := _event(bytes(raw))) is not None]
    return Batch(found.ts, events, found.data_parallel_rank, len(found.events) - len(events))


def _event(raw: bytes) -> Event | None:
    row = not (0x80 <= raw[0] <= 0x8F or raw[0] in (0xDE, 0xDF))
    try:
        kind = _TEXT.decode(_LISTED.decode(raw)[0] if row else _NAMED.decode(raw)["type"])
    except (*_UNREADABLE, LookupError):
        raise WireError("A KV event does not name its type.") from None
    if kind not in _TYPES:
        return None
    try:
        event: Event = (_EVENT_ROW if row else _EVENT_MAP).decode(raw)
    except _UNREADABLE as error:
        raise WireError(f"A {kind} event cannot be read: {_place(error)}.") from None
    return event


def _place(error: Exception) -> str:
    """What msgspec found wrong and where. Its messages name types and fields, and of values only tags, checked here."""
    return str(error).splitlines()[0][:160] if isinstance(error, msgspec.ValidationError) else "broken or too deep"


# --- events, as facts --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Told:
    """What a batch says of one endpoint. stored, removed: blocks. wrong: why events were left out, None: none were."""

    facts: list[BlocksStored | BlocksRemoved | CacheCleared] = field(default_factory=list)
    stored: int = 0
    removed: int = 0
    dropped: int = 0
    wrong: str | None = None


def tell(events: Iterable[Event], name: str) -> Told:
    """The facts of a batch about the endpoint `name`, in its order; removals that follow each other become one fact.

    A store whose tokens do not fill its blocks is left out and named in `wrong`. One without any tells of blocks by
    their hashes alone: offloading connectors of vLLM, of lower tiers.
    """
    told = Told()
    gone: list[Hash] = []
    left: Removed | None = None
    for event in events:
        if isinstance(event, Removed):
            if left is not None and (event.medium != left.medium or event.group != left.group):
                _flush(told, name, left, gone)
            left = event
            gone += event.hashes
            continue
        if left is not None:
            _flush(told, name, left, gone)
            left = None
        if isinstance(event, Stored):
            _store(told, name, event)
        else:
            told.facts.append(CacheCleared(name))
    if left is not None:
        _flush(told, name, left, gone)
    return told


def _flush(told: Told, name: str, last: Removed, gone: list[Hash]) -> None:
    if gone:
        told.facts.append(BlocksRemoved(name, _numbers(tuple(gone)), tier_of(last.medium), last.group or 0))
        told.removed += len(gone)
        gone.clear()


def _store(told: Told, name: str, event: Stored) -> None:
    hashes, tokens, kind = event.hashes, event.tokens, event.kind
    if not hashes:  # a window's group when it only moved on
        return
    blocks = len(hashes)
    if len(tokens) != blocks * event.block_size:
        if tokens and (kind is None or kind in _SPELLED):
            told.wrong = f"{len(tokens)} tokens in {blocks} blocks of {event.block_size}"
            told.dropped += 1
            return
        tokens = ()
    salt, media = _covered(event)
    parent = event.parent
    told.facts.append(
        BlocksStored(
            name,
            _numbers(hashes),
            parent if parent is None else _number(parent),
            tokens,
            event.block_size,
            _adapter(event),
            salt,
            media,
            tier_of(event.medium),
            event.group or 0,
            _FULL if kind is None else kind,
        )
    )
    told.stored += blocks


def _covered(event: Stored) -> tuple[str | None, tuple[str | None, ...]]:
    """The salt, and by block what its hash covers beside tokens, adapter and salt; () where that is nothing."""
    salt, keys = event.cache_salt, event.extra_keys
    if salt is None and (event.lora_name or event.session):
        salt = _salt_of(event.lora_name) or _salt_of(event.session)
    if keys is None or keys.count(None) == len(keys):
        return salt, ()
    found, media = _extras(keys, len(event.hashes), event.lora_name or event.lora_id, event.parent is None)
    return salt or found, media


def _adapter(event: Stored) -> str | None:
    if isinstance(event.lora_name, str):
        return event.lora_name
    # vLLM before LoRA names: a number that no client asks by keeps these blocks apart from the base model's.
    return None if event.lora_id is None else f"lora-id:{event.lora_id}"


def _salt_of(metadata: object) -> str | None:
    salt = metadata.get("cache_salt") if isinstance(metadata, dict) else None
    return salt if isinstance(salt, str) else None


def _extras(
    extra_keys: list[Any], blocks: int, adapter: object, root: bool
) -> tuple[str | None, tuple[str | None, ...]]:
    """As `_covered`, of extra keys alone.

    vLLM's order (`generate_block_hash_extra_keys`) is the adapter on every block, media, the salt on a prompt's first
    block, prompt embeddings; in events all are untagged.
    """
    salt: str | None = None
    media: list[str | None] = [None] * blocks
    for i, keys in enumerate(extra_keys[:blocks]):
        if keys is None:
            continue
        found, others = _sorted_out(keys if isinstance(keys, list) else [keys], adapter, root and i == 0)
        salt = salt or found
        media[i] = "|".join(others) or None
    return salt, tuple(media) if any(media) else ()


def _sorted_out(keys: list[Any], adapter: object, first: bool) -> tuple[str | None, list[str]]:
    salt: str | None = None
    others: list[str] = []
    plain: list[str] = []
    for at, key in enumerate(keys):
        match key:
            case str() if key.startswith(_SALT_PREFIX):
                salt = key.removeprefix(_SALT_PREFIX)
            case ["cache_salt", str(tagged)]:
                salt = tagged
            case ["lora", *_]:
                pass
            case str() | int() if at == 0 and adapter is not None and key == adapter:
                pass
            case str():
                plain.append(key)
            case _:
                others.append(_identity(key))
    if first and plain and salt is None:
        salt = plain.pop()  # behind the media, which were untagged text before they had an offset
    return salt, plain + others


def _identity(key: object, depth: int = 0) -> str:
    match key:
        case ["mm", *rest]:
            return _identity(rest, depth)
        case list() if depth < _MAX_DEPTH:
            return "@".join([_identity(part, depth + 1) for part in key[:_MAX_DEPTH]])
        case bytes():
            return key.hex()
        case str():
            return key
        case int() | float():
            return repr(key)
        case _:
            return type(key).__name__


def _numbers(hashes: tuple[Hash, ...]) -> tuple[int, ...]:
    try:
        if min(hashes) >= 0:  # type: ignore[operator]
            return hashes  # type: ignore[return-value]
    except TypeError:
        pass
    return tuple([_number(each) for each in hashes])


def _number(hash_: Hash) -> int:
    """The 64 bits that vLLM shows of a hash: its last bytes, or the number read as unsigned."""
    return hash_ & _MASK if isinstance(hash_, int) else int.from_bytes(hash_[-8:], "big")


def tier_of(medium: str | None) -> Tier:
    """Where a medium's name puts a block; whatever is neither GPU nor CPU memory is farther than both."""
    if medium is None or medium == "GPU":
        return Tier.GPU
    return _TIERS.get(medium.upper(), Tier.DISK)


# --- writing -----------------------------------------------------------------------------------------------


def encode_batch(
    ts: float, events: Sequence[Event], rank: int | None = None, *, arrays: bool = False, bytes_hashes: bool = False
) -> bytes:
    """One batch as vLLM writes it.

    arrays: events as tagged arrays, as until 0.23. bytes_hashes: hashes of 32 bytes that end in the numbers given.
    """
    rows = [_written(event, bytes_hashes) for event in events]
    written: list[Any] = [_as_array(row) for row in rows] if arrays else [_as_map(row) for row in rows]
    return msgspec.msgpack.encode([ts, written] if rank is None else [ts, written, rank])


_ALWAYS = {"BlockStored": 8, "BlockRemoved": 3, "AllBlocksCleared": 1}  # fields written though they be None


def _written(event: Event, bytes_hashes: bool) -> list[tuple[str, Any]]:
    config = event.__struct_config__
    row: list[tuple[str, Any]] = [("type", config.tag)]
    for name, wire in zip(event.__struct_fields__, event.__struct_encode_fields__, strict=True):
        value = getattr(event, name)
        if bytes_hashes and name == "hashes":
            value = [_wide(each) for each in value]
        elif bytes_hashes and name == "parent" and value is not None:
            value = _wide(value)
        row.append((wire, value))
    return row


def _wide(hash_: Hash) -> bytes:
    return hash_.to_bytes(32, "big") if isinstance(hash_, int) else hash_


def _as_map(row: list[tuple[str, Any]]) -> dict[str, Any]:
    always = _ALWAYS[row[0][1]]
    return {wire: value for at, (wire, value) in enumerate(row) if at < always or value is not None}


def _as_array(row: list[tuple[str, Any]]) -> list[Any]:
    values = [value for _, value in row]
    while len(values) > _ALWAYS[values[0]] and values[-1] is None:
        values.pop()
    return values
