from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from picker.errors import WireError
from picker.types import BlocksRemoved, BlocksStored, CacheCleared, Tier
from picker.wire.kv_events import (
    MAX_BATCH_BYTES,
    Batch,
    Cleared,
    Event,
    Removed,
    Stored,
    decode_batch,
    encode_batch,
    tell,
    tier_of,
)

# What vLLM 0.32.0 published, whole payloads.
CLEARED = "93cb41dac027a12c0b159181a474797065b0416c6c426c6f636b73436c656172656400"
REMOVED = (
    "93cb41dac0278e111f079184a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cf35e3a6a3dd3362d3a66d656469"
    "756da3475055a967726f75705f6964780000"
)
RESET_AND_STORED = (
    "93cb41dac0277f3323799381a474797065b0416c6c426c6f636b73436c656172656481a474797065b0416c6c426c6f636b73436c65617265648b"
    "a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cfb658ee8b441f5869b1706172656e745f626c6f636b5f68617368"
    "c0a9746f6b656e5f696473dc00200505050505050505050505050505050505050505050505050505050505050505aa626c6f636b5f73697a6520"
    "a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b65797391c0a967726f75705f69647800b26b76"
    "5f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
)
SALTED = (
    "93cb41dac0277f8235f0918ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cfb58148fccb79ed99b1706172656e"
    "745f626c6f636b5f68617368c0a9746f6b656e5f696473dc00200707070707070707070707070707070707070707070707070707070707070707"
    "aa626c6f636b5f73697a6520a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b6579739191a573"
    "616c7441a967726f75705f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
)

BIG = (1 << 64) - 7


def stored(hashes: tuple[int | bytes, ...] = (1, 2), parent: int | bytes | None = None, **more: Any) -> Stored:
    """Two blocks of two tokens unless told otherwise, as vLLM tells of them."""
    size = more.pop("block_size", 2)
    tokens = more.pop("tokens", tuple(range(size * len(hashes))))
    fields: dict[str, Any] = {"medium": "GPU", "group": 0, "kind": "full_attention"}
    return Stored(hashes, parent, tokens, size, **(fields | more))


def pack(*events: Any, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), rank])


def as_map(**fields: Any) -> dict[str, Any]:
    known = {"block_hashes": [1, 2], "parent_block_hash": None, "token_ids": [5, 6, 7, 8], "block_size": 2}
    return {"type": "BlockStored", **known, **fields}


def facts(payload: bytes) -> list[BlocksStored | BlocksRemoved | CacheCleared]:
    return tell(decode_batch(payload).events, "a").facts


def only(payload: bytes) -> BlocksStored:
    (fact,) = facts(payload)
    assert isinstance(fact, BlocksStored)
    return fact


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [CLEARED, REMOVED, RESET_AND_STORED, SALTED])
def test_what_vllm_published_is_read_and_written_again_byte_for_byte(frame: str) -> None:
    batch = decode_batch(bytes.fromhex(frame))
    assert encode_batch(batch.ts, batch.events, batch.rank).hex() == frame


def test_a_session_is_the_last_field_of_the_map() -> None:
    batch = decode_batch(bytes.fromhex(SALTED))
    event = batch.events[0]
    assert isinstance(event, Stored)
    event.session = "sess-1"
    written = encode_batch(batch.ts, [event], 0).hex()
    assert written.endswith("aa73657373696f6e5f6964a6736573732d3100")
    assert written.startswith("93cb41dac0277f8235f0918ca474797065")


def test_every_field_of_a_store_is_read() -> None:
    payload = pack(
        as_map(
            lora_id=3,
            medium="CPU",
            lora_name="ad1",
            extra_keys=[None, None],
            group_idx=2,
            kv_cache_spec_kind="sliding_window",
            kv_cache_spec_sliding_window=96,
            locality="LOCAL",
            ownership="tier-1",
            session_id="s",
        )
    )
    event = decode_batch(payload).events[0]
    assert event == Stored(
        (1, 2), None, (5, 6, 7, 8), 2, 3, "CPU", "ad1", [None, None], 2, "sliding_window", 96, "LOCAL", "tier-1", "s"
    )


@pytest.mark.parametrize("fields", range(4, 12))
def test_events_as_arrays_may_lack_their_last_fields(fields: int) -> None:
    row = [[1, 2], None, [5, 6, 7, 8], 2, None, "GPU", None, None, 0, "full_attention", None, "later", "still"]
    event = decode_batch(pack(["BlockStored", *row[:fields]], ["BlockRemoved", [9]], ["AllBlocksCleared"])).events
    assert tell(event, "a").facts == [
        BlocksStored("a", (1, 2), None, (5, 6, 7, 8), 2),
        BlocksRemoved("a", (9,)),
        CacheCleared("a"),
    ]


def test_the_array_form_is_written_as_older_releases_did() -> None:
    events: list[Event] = [stored((1,), kind=None, group=None), Removed((4,), "GPU"), Cleared()]
    written = msgspec.msgpack.decode(encode_batch(1.5, events, None, arrays=True))
    assert written == [
        1.5,
        [
            ["BlockStored", [1], None, [0, 1], 2, None, "GPU", None],
            ["BlockRemoved", [4], "GPU"],
            ["AllBlocksCleared"],
        ],
    ]


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("bytes_hashes", [False, True])
def test_all_forms_say_the_same(arrays: bool, bytes_hashes: bool) -> None:
    events: list[Event] = [stored((BIG, 2), BIG - 1), Removed((BIG,), "GPU", 0), Cleared(), stored(lora_name="ad1")]
    payload = encode_batch(1.5, events, 3, arrays=arrays, bytes_hashes=bytes_hashes)
    assert decode_batch(payload).rank == 3
    assert facts(payload) == [
        BlocksStored("a", (BIG, 2), BIG - 1, (0, 1, 2, 3), 2),
        BlocksRemoved("a", (BIG,)),
        CacheCleared("a"),
        BlocksStored("a", (1, 2), None, (0, 1, 2, 3), 2, "ad1"),
    ]


@pytest.mark.parametrize("events", [[as_map()], [["BlockStored", [1, 2], None, [5, 6, 7, 8], 2]]])
def test_the_batch_may_be_a_map(events: list[Any]) -> None:
    payload = msgspec.msgpack.encode({"ts": 1.5, "events": events, "data_parallel_rank": 3, "more": [1]})
    batch = decode_batch(payload)
    assert (batch.ts, batch.rank, len(batch.events)) == (1.5, 3, 1)


def test_a_batch_without_a_rank_has_none() -> None:
    assert decode_batch(msgspec.msgpack.encode([1, []])) == Batch(1.0, [], None)


def test_maps_and_arrays_may_be_mixed() -> None:
    assert facts(pack(["BlockRemoved", [9]], as_map())) == [
        BlocksRemoved("a", (9,)),
        BlocksStored("a", (1, 2), None, (5, 6, 7, 8), 2),
    ]


def test_unknown_events_and_fields_are_passed_over_and_counted() -> None:
    batch = decode_batch(pack({"type": "BlockMoved", "x": [[1]]}, as_map(offsets=[1, 2]), ["BlockCopied", 1]))
    assert batch.skipped == 2
    assert len(batch.events) == 1


# --- hashes, tiers, adapters, salts ------------------------------------------------------------------------


def test_hashes_are_the_last_64_bits_whatever_their_form() -> None:
    wide = bytes(range(32))
    low = int.from_bytes(wide[-8:], "big")
    payload = pack(as_map(block_hashes=[wide, -1], parent_block_hash=-(1 << 63)))
    assert only(payload).hashes == (low, (1 << 64) - 1)
    assert only(payload).parent == 1 << 63
    assert facts(pack({"type": "BlockRemoved", "block_hashes": [-2, b"\x01"]}))[0] == BlocksRemoved(
        "a", ((1 << 64) - 2, 1)
    )


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        (None, Tier.GPU),
        ("GPU", Tier.GPU),
        ("gpu", Tier.GPU),
        ("CPU", Tier.CPU),
        ("CPU_PINNED", Tier.CPU),
        ("STORAGE", Tier.DISK),
        ("DISK", Tier.DISK),
        ("EXTERNAL", Tier.DISK),
        ("TAPE", Tier.DISK),
    ],
)
def test_media_become_tiers(medium: str | None, tier: Tier) -> None:
    assert tier_of(medium) is tier
    assert only(pack(as_map(medium=medium))).tier is tier


def test_the_salt_is_the_last_bare_text_of_a_prompts_first_block() -> None:
    assert only(bytes.fromhex(SALTED)).salt == "saltA"
    image = ["0badcafe", 3]
    told = only(pack(as_map(lora_name="ad1", extra_keys=[["ad1", image, "s1"], ["ad1", image]])))
    assert (told.adapter, told.salt, told.media) == ("ad1", "s1", ("0badcafe@3", "0badcafe@3"))


def test_bare_text_on_a_later_block_is_no_salt() -> None:
    told = only(pack(as_map(parent_block_hash=7, extra_keys=[["image"], None])))
    assert (told.salt, told.media) == (None, ("image", None))
    told = only(pack(as_map(extra_keys=[None, ["image"]])))
    assert (told.salt, told.media) == (None, (None, "image"))


def test_the_adapters_name_among_the_extra_keys_is_nothing_more() -> None:
    told = only(pack(as_map(lora_name="ad1", extra_keys=[["ad1"], ["ad1"]])))
    assert (told.adapter, told.salt, told.media) == ("ad1", None, ())


def test_prompt_embeddings_are_told_apart() -> None:
    told = only(pack(as_map(extra_keys=[["s1", b"\x01\x02"], [b"\x03"]])))
    assert (told.salt, told.media) == ("s1", ("0102", "03"))


def test_tagged_extra_keys_are_understood() -> None:
    keys = [[["lora", "ad1", "/path"], ["mm", "img", -4], ["cache_salt", "s1"]], None]
    told = only(pack(as_map(lora_name="ad1", extra_keys=keys)))
    assert (told.salt, told.media) == ("s1", ("img@-4", None))


def test_an_adapter_known_by_number_alone_is_not_the_base_model() -> None:
    assert only(pack(as_map(lora_id=7, extra_keys=[[7], [7]]))) == BlocksStored(
        "a", (1, 2), None, (5, 6, 7, 8), 2, "lora-id:7"
    )


@pytest.mark.parametrize(
    "event",
    [
        as_map(cache_salt="s1", namespaced_block_hashes=None),
        as_map(parent_block_hash=4, extra_keys=[["dynamo-cache-salt:s1"]]),
        ["BlockStored", [1, 2], None, [5, 6, 7, 8], 2, None, "GPU", {"cache_salt": "s1"}],
        ["BlockStored", [1, 2], None, [5, 6, 7, 8], 2, None, "GPU", *[None] * 7, {"cache_salt": "s1"}],
    ],
)
def test_sglangs_salts_are_found_in_all_their_places(event: Any) -> None:
    assert only(pack(event)).salt == "s1"


# --- facts -------------------------------------------------------------------------------------------------


def test_removals_that_follow_each_other_become_one_fact() -> None:
    events: list[Event] = [
        Removed((1,), "GPU", 0),
        Removed((2, 3), "GPU", 0),
        Removed((4,), "CPU", 0),
        Removed((5,), "CPU", 1),
        stored((6,)),
        Removed((1,), "CPU", 1),
    ]
    told = tell(events, "a")
    assert told.facts == [
        BlocksRemoved("a", (1, 2, 3)),
        BlocksRemoved("a", (4,), Tier.CPU),
        BlocksRemoved("a", (5,), Tier.CPU, 1),
        BlocksStored("a", (6,), None, (0, 1), 2),
        BlocksRemoved("a", (1,), Tier.CPU, 1),
    ]
    assert (told.stored, told.removed) == (1, 6)


@pytest.mark.parametrize("tokens", [(1,), (1, 2, 3, 4, 5)])
def test_a_store_whose_tokens_do_not_fill_its_blocks_is_left_out(tokens: tuple[int, ...]) -> None:
    told = tell([stored(tokens=tokens), stored((3,), kind=None)], "a")
    assert [fact.hashes for fact in told.facts if isinstance(fact, BlocksStored)] == [(3,)]
    assert told.wrong == f"{len(tokens)} tokens in 2 blocks of 2"
    assert told.dropped == 1


@pytest.mark.parametrize(("medium", "tier"), [("CPU", Tier.CPU), ("STORAGE", Tier.DISK), ("GPU", Tier.GPU)])
@pytest.mark.parametrize("size", [0, 2])
def test_a_placeholder_tells_hashes_only(size: int, medium: str, tier: Tier) -> None:
    told = tell([stored(tokens=(), block_size=size, medium=medium)], "a")
    assert told.facts == [BlocksStored("a", (1, 2), block_size=size, tier=tier)]
    assert told.wrong is None


def test_a_windows_group_lists_blocks_without_their_places() -> None:
    events = [stored((11, 12), tokens=tuple(range(12)), kind="sliding_window", group=1), stored((), kind="mamba")]
    told = tell(events, "a")
    assert told.facts == [BlocksStored("a", (11, 12), block_size=2, group=1, attention="sliding_window")]
    assert told.wrong is None


def test_token_ids_are_shown_nowhere() -> None:
    event = stored(tokens=(987654, 987654, 987654, 987654))
    assert "987654" not in repr(event) + repr(tell([event], "a"))


# --- what is no batch --------------------------------------------------------------------------------------


DEEP = b"\x91" * 100_000


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"hello",
        DEEP,
        b"\x93\xcb" + b"\x00" * 8 + b"\x91" + DEEP,
        pack(as_map(extra_keys=[1]))[:-20],
        pack(5),
        pack({}),
        pack([]),
        pack({"type": 5}),
        pack({"type": "BlockStored"}),
        pack(["BlockStored", [1]]),
        pack(as_map(token_ids=[1, -2, 3, 4])),
        pack(as_map(token_ids=[1, 1 << 32, 3, 4])),
        pack(as_map(token_ids=[[1, 2], [2, 3]])),
        pack(as_map(block_size=-1)),
        pack(as_map(block_size=1 << 40)),
        pack(as_map(block_hashes=["x"])),
        pack(as_map(lora_name=5)),
        msgspec.msgpack.encode(["x", []]),
        msgspec.msgpack.encode({"ts": 1.0}),
        b"\x93\xcb" + b"\x00" * 8 + b"\x91\x81\xa4type\xa3\xff\xff\xff\x00",
    ],
    ids=lambda payload: payload[:12].hex(),
)
def test_what_is_no_batch_is_refused_in_one_plain_line(payload: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode_batch(payload)
    message = caught.value.message
    assert "\n" not in message
    assert len(message) < 260


def test_what_is_refused_is_not_quoted() -> None:
    with pytest.raises(WireError) as caught:
        decode_batch(pack(as_map(token_ids=[4242, "4243", 4244, 4245])))
    assert "42" not in caught.value.message
    assert "token_ids" in caught.value.message


def test_a_batch_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(WireError, match="larger than 4 MiB"):
        decode_batch(b"\x00" * (MAX_BATCH_BYTES + 1))


def test_nested_extra_keys_end_somewhere() -> None:
    nest: Any = "x"
    for _ in range(200):
        nest = [nest, nest] if len(str(nest)) < 64 else [nest]
    told = only(pack(as_map(extra_keys=[[nest], None])))
    assert len(told.media[0] or "") < 4096


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
near_misses = st.builds(
    lambda fields, keys: {**as_map(), **fields, "extra_keys": keys},
    st.dictionaries(
        st.sampled_from([*as_map(), "lora_id", "lora_name", "medium", "group_idx", "x"]), trees, max_size=3
    ),
    trees,
)
FRAMES = st.sampled_from([bytes.fromhex(frame) for frame in (CLEARED, REMOVED, RESET_AND_STORED, SALTED)])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A published frame with some bytes changed, dropped or added."""
    frame = bytearray(draw(FRAMES))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(frame) - 1, 0)))
        frame[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(frame)


@settings(max_examples=300, deadline=None)
@example(pack({"type": "BlockStored", "block_hashes": {}}))
@given(damaged() | st.binary(max_size=64) | st.lists(near_misses | trees, max_size=3).map(lambda events: pack(*events)))
def test_anything_is_either_read_or_refused(payload: bytes) -> None:
    try:
        batch = decode_batch(payload)
    except WireError:
        return
    for fact in tell(batch.events, "a").facts:
        assert fact.name == "a"
        if not isinstance(fact, CacheCleared):
            assert all(0 <= each < 1 << 64 for each in fact.hashes)
        if isinstance(fact, BlocksStored):
            assert len(fact.tokens) in (0, len(fact.hashes) * fact.block_size)
            assert len(fact.media) in (0, len(fact.hashes))
