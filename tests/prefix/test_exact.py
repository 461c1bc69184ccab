"""Exact knowledge: what a stream's state makes of what was told, and what is read out of it."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.prefix.exact import Exact, Known
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, ByHash, ByTokens
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    EventsChanged,
    EventState,
    Reading,
    Request,
    Tier,
    UInt64Array,
)

SIZE = 4
HASHER = PrefixHasher(b"secret", max_units=1 << 16)
LETTERS = Vocabulary([bytes([65 + i]) for i in range(26)])


def request(*hashes: int) -> Request:
    return Request(1, None, 0.0, np.array(hashes, dtype=np.uint64))


def stored(*hashes: int, parent: int | None = None, name: str = "a", **more: Any) -> BlocksStored:
    return BlocksStored(name, hashes, parent, block_size=SIZE, **more)


def knowledge(state: EventState = EventState.WHOLE, rows: int = 4) -> Exact:
    exact = Exact(PreciseIndex(1 << 22, rows), ByHash(), rows)
    for row in (0, 1):
        exact.apply(row, EventsChanged("ab"[row], state))
    return exact


def known(exact: Exact, *hashes: int) -> Known:
    found = exact.match(None, request(*hashes))
    assert found is not None
    return found


def test_what_was_stored_is_known_until_it_is_removed() -> None:
    exact = knowledge()
    exact.apply(0, stored(1, 2, 3))
    exact.apply(1, stored(1))
    assert known(exact, 1, 2, 3, 9).tokens.tolist() == [12.0, 4.0, 0.0, 0.0]
    exact.apply(0, BlocksRemoved("a", (3,)))
    assert known(exact, 1, 2, 3, 9).tokens.tolist() == [8.0, 4.0, 0.0, 0.0]


def test_blocks_that_continue_others_follow_them() -> None:
    exact = knowledge()
    exact.apply(0, stored(1, 2))
    exact.apply(0, stored(3, parent=2))
    assert known(exact, 1, 2, 3).tokens[0] == 12.0


def test_blocks_whose_parent_nobody_told_of_are_counted_and_not_guessed() -> None:
    exact = knowledge()
    exact.apply(0, stored(3, parent=2))
    assert known(exact, 1, 2, 3).tokens[0] == 0.0
    assert exact.stream(0).unread == 1


def test_nothing_is_known_of_a_pool_without_streams() -> None:
    exact = Exact(PreciseIndex(1 << 22), ByHash())
    exact.apply(0, stored(1))
    assert exact.match(None, request(1)) is None


def test_a_whole_stream_tells_all_and_a_partial_one_tells_the_least() -> None:
    whole, partial = knowledge(), knowledge(EventState.PARTIAL)
    assert (known(whole, 1).whole[0], known(whole, 1).partial[0]) == (True, False)
    assert (known(partial, 1).whole[0], known(partial, 1).partial[0]) == (False, True)


def test_a_partial_stream_is_whole_when_it_has_stored_what_the_cache_holds() -> None:
    exact = knowledge(EventState.PARTIAL)
    exact.set_capacity(0, 8)
    exact.apply(0, stored(1, tokens=(0,) * 4))
    assert not known(exact, 1).whole[0]
    exact.apply(0, stored(2, parent=1, tokens=(0,) * 4))
    assert known(exact, 1).whole.tolist() == [True, False, False, False]


@pytest.mark.parametrize("state", [EventState.SUSPECT, EventState.ABSENT])
def test_a_stream_that_cannot_be_relied_on_is_forgotten(state: EventState) -> None:
    exact = knowledge()
    exact.apply(0, stored(1))
    exact.apply(0, EventsChanged("a", state, "why"))
    assert exact.index.resident(0) == 0
    exact.apply(0, stored(2))
    assert exact.index.resident(0) == 0, "events outside of a stream were believed"
    assert exact.stream(0).reason == "why"


def test_an_emptied_cache_is_empty_and_its_stream_goes_on() -> None:
    exact = knowledge()
    exact.apply(0, stored(1))
    exact.apply(0, CacheCleared("a"))
    exact.apply(0, stored(2))
    assert (known(exact, 1).tokens[0], known(exact, 2).tokens[0]) == (0.0, 4.0)


@pytest.mark.parametrize("odd", [{"attention": "sliding_window"}, {"attention": "mamba"}, {"group": 1}])
def test_hybrid_caches_are_refused_by_name(odd: dict[str, Any]) -> None:
    exact = knowledge()
    exact.apply(0, stored(1))
    exact.apply(0, stored(2, **odd))
    refused = exact.stream(0).refused
    assert refused is not None
    assert str(odd.get("attention", "several")) in refused
    assert known(exact, 1).whole.tolist() == [False, True, False, False]
    exact.apply(0, EventsChanged("a", EventState.WHOLE, "restarted"))
    assert exact.stream(0).refused is not None, "a new stream of the same engine has the same groups"


def test_a_row_that_is_used_again_starts_from_nothing() -> None:
    exact = knowledge()
    exact.apply(0, stored(1))
    exact.remove_row(0)
    assert exact.stream(0).state is EventState.ABSENT
    assert known(exact, 1).tokens[0] == 0.0


def test_rows_that_join_later_have_streams_of_their_own() -> None:
    exact = knowledge()
    exact.grow_rows(70)
    exact.apply(69, EventsChanged("z", EventState.WHOLE))
    exact.apply(69, stored(1, name="z"))
    assert known(exact, 1).tokens[69] == 4.0


# --- in bytes and in tokens ---


def by_bytes(rows: int = 4) -> Exact:
    exact = Exact(PreciseIndex(1 << 22, rows), ByBytes(HASHER, lambda name: LETTERS), rows)
    exact.apply(0, EventsChanged("a", EventState.WHOLE))
    return exact


def text(data: bytes, **more: Any) -> Reading:
    return Reading(HASHER.hashes(data), **more)


def spelled(word: bytes, *hashes: int, parent: int | None = None, **more: Any) -> BlocksStored:
    return stored(*hashes, parent=parent, tokens=tuple(letter - 65 for letter in word), **more)


def tokens(exact: Exact, reading: Reading) -> float:
    found = exact.match(reading, request())
    return 0.0 if found is None else found.tokens.item(0)


def test_blocks_are_found_by_the_text_that_their_tokens_spell() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCDEFGH", 1, 2))
    exact.apply(0, spelled(b"IJKL", 3, parent=2))
    assert tokens(exact, text(b"ABCDEFGHIJKLM")) == 12.0
    assert tokens(exact, text(b"ABCDEFGHXXXXX")) == 8.0
    assert tokens(exact, text(b"BBCDEFGHIJKLM")) == 0.0


def test_a_block_that_ends_with_the_prompt_is_computed_again() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCDEFGH", 1, 2))
    assert tokens(exact, text(b"ABCDEFGH")) == 4.0
    assert tokens(exact, text(b"ABCDEFGH", whole=False)) == 8.0, "more follows what could not be read"


def test_where_no_token_of_the_prompt_ends_a_block_does_not_either() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCDEFGH", 1, 2))
    assert tokens(exact, text(b"ABCDEFGHI", splits=lambda position: position != 8)) == 4.0


@pytest.mark.parametrize("differs", [{"salt": "other"}, {"adapter": "lora"}])
def test_salts_and_adapters_share_nothing(differs: dict[str, str]) -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCD", 1, salt="mine"))
    assert tokens(exact, text(b"ABCDE", salt="mine")) == 4.0
    assert tokens(exact, text(b"ABCDE", **({"salt": "mine"} | differs))) == 0.0


def test_blocks_from_the_first_image_on_are_left_out() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCDEFGHIJKL", 1, 2, 3, media=(None, "image-1", None)))
    assert tokens(exact, text(b"ABCDEFGHIJKLM")) == 4.0
    assert exact.stream(0).unread == 2


def test_ids_nobody_can_spell_are_counted() -> None:
    exact = by_bytes()
    exact.apply(0, stored(1, tokens=(0, 1, 2, 99)))
    assert exact.stream(0).unread == 1


def test_in_tokens_the_ids_are_what_is_matched() -> None:
    exact = Exact(PreciseIndex(1 << 22), ByTokens(HASHER))
    exact.apply(0, EventsChanged("a", EventState.WHOLE))
    exact.apply(0, stored(1, 2, tokens=(5, 6, 7, 8, 9, 10, 11, 12)))
    ids: UInt64Array = HASHER.hashes_of_ids([5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert tokens(exact, Reading(ids)) == 8.0


@given(st.data(), st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_an_engines_hashes_are_names_and_nothing_else(data: st.DataObject, factor: int, shift: int) -> None:
    """Another algorithm or seed gives every block another number; equal numbers stay equal."""

    def renamed(number: int) -> int:
        return (number * (factor | 1) + shift) % 2**64

    words = st.lists(st.sampled_from([b"ABCD", b"EFGH", b"IJKL"]), min_size=1, max_size=6)
    one, other = by_bytes(), by_bytes()
    for chain in data.draw(st.lists(words, max_size=8)):
        numbers = [hash_of(b"".join(chain[: end + 1])) for end in range(len(chain))]
        for exact, name in ((one, int), (other, renamed)):
            exact.apply(0, spelled(b"".join(chain), *[name(each) for each in numbers]))
    for chain in data.draw(st.lists(words, max_size=3)):
        gone = hash_of(b"".join(chain))
        one.apply(0, BlocksRemoved("a", (gone,)))
        other.apply(0, BlocksRemoved("a", (renamed(gone),)))
    for prompt in data.draw(st.lists(words, min_size=1, max_size=4)):
        reading = text(b"".join(prompt) + b"X")
        assert tokens(one, reading) == tokens(other, reading)


def hash_of(word: bytes) -> int:
    return zlib.crc32(word)


# --- lower tiers ---


def offloaded(*hashes: int, tier: Tier = Tier.CPU, **more: Any) -> BlocksStored:
    """As vLLM's offloading connectors tell it: hashes, and nothing else."""
    return BlocksStored("a", hashes, tier=tier, **more)


def seen(exact: Exact, reading: Reading) -> tuple[float, float]:
    """(what the stored tokens are worth, how many the engine will report)."""
    found = exact.match(reading, request())
    assert found is not None
    return found.tokens.item(0), found.cached.item(0)


@pytest.mark.parametrize("size", [0, SIZE])
def test_a_block_that_is_offloaded_stays_known_when_it_leaves_the_gpu(size: int) -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCDEFGH", 1, 2))
    exact.apply(0, offloaded(1, 2, block_size=size))
    assert seen(exact, text(b"ABCDEFGHI")) == (8.0, 8.0)
    exact.apply(0, BlocksRemoved("a", (2, 1)))
    assert seen(exact, text(b"ABCDEFGHI")) == pytest.approx((6.4, 8.0))
    exact.apply(0, BlocksRemoved("a", (2,), Tier.CPU))
    assert seen(exact, text(b"ABCDEFGHI")) == pytest.approx((3.2, 4.0))


def test_a_block_in_several_tiers_is_worth_what_the_best_is() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCD", 1))
    exact.apply(0, offloaded(1))
    exact.apply(0, offloaded(1, tier=Tier.DISK))
    exact.apply(0, BlocksRemoved("a", (1,)))
    assert seen(exact, text(b"ABCDE")) == pytest.approx((3.2, 4.0))
    exact.apply(0, BlocksRemoved("a", (1,), Tier.CPU))
    assert seen(exact, text(b"ABCDE")) == pytest.approx((1.6, 4.0))


def test_a_block_that_is_offloaded_twice_is_there_until_it_is_removed_twice() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCD", 1))
    exact.apply(0, offloaded(1))
    exact.apply(0, offloaded(1))
    exact.apply(0, BlocksRemoved("a", (1,)))
    exact.apply(0, BlocksRemoved("a", (1,), Tier.CPU))
    assert seen(exact, text(b"ABCDE"))[1] == 4.0
    exact.apply(0, BlocksRemoved("a", (1,), Tier.CPU))
    assert exact.index.blocks == 0


@pytest.mark.parametrize("told", [offloaded(1, 2), spelled(b"ABCDEFGH", 1, 2, tier=Tier.CPU)])
def test_blocks_of_lower_tiers_that_nobody_told_of_are_counted_and_not_guessed(told: BlocksStored) -> None:
    """Their salt is not told: this block may be of anybody's prompt that begins so."""
    exact = by_bytes()
    exact.apply(0, told)
    assert seen(exact, text(b"ABCDEFGHI")) == (0.0, 0.0)
    assert (exact.stream(0).nameless, exact.index.blocks) == (2, 0)


def test_an_offloaded_block_of_a_salted_prompt_stays_within_its_salt() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCD", 1, salt="mine"))
    exact.apply(0, spelled(b"ABCD", 1, tier=Tier.CPU))
    exact.apply(0, BlocksRemoved("a", (1,)))
    assert seen(exact, text(b"ABCDE", salt="mine"))[1] == 4.0
    assert seen(exact, text(b"ABCDE"))[1] == 0.0


def test_one_endpoint_offloading_says_nothing_of_another() -> None:
    exact = by_bytes()
    exact.apply(1, EventsChanged("b", EventState.WHOLE))
    exact.apply(0, spelled(b"ABCD", 1))
    exact.apply(1, BlocksStored("b", (1,), tier=Tier.CPU))
    found = exact.match(text(b"ABCDE"), request())
    assert found is not None
    assert found.cached.tolist() == [4.0, 0.0, 0.0, 0.0]
    assert exact.stream(1).nameless == 1


def test_blocks_without_tokens_in_the_gpu_are_known_by_their_hash_or_not_at_all() -> None:
    exact = by_bytes()
    exact.apply(0, spelled(b"ABCD", 1))
    exact.apply(0, offloaded(1, 2, tier=Tier.GPU))
    assert exact.stream(0).nameless == 1
    exact.apply(0, BlocksRemoved("a", (1,)))
    assert seen(exact, text(b"ABCDE"))[1] == 4.0


def test_what_is_offloaded_does_not_make_a_stream_whole() -> None:
    exact = by_bytes()
    exact.apply(0, EventsChanged("a", EventState.PARTIAL))
    exact.set_capacity(0, 8)
    exact.apply(0, spelled(b"ABCD", 1))
    for _ in range(5):
        exact.apply(0, spelled(b"ABCD", 1, tier=Tier.CPU))
    exact.apply(0, spelled(b"EFGHIJKL", 2, 3, parent=1))
    assert exact.stream(0).state is EventState.PARTIAL, "what lies in lower tiers since before is not known"


def test_offloading_holds_to_the_budget() -> None:
    exact = Exact(PreciseIndex(100_000, 4), ByBytes(HASHER, lambda name: LETTERS), 4)
    exact.apply(0, EventsChanged("a", EventState.WHOLE))
    exact.apply(0, spelled(b"ABCD", 1))
    for _ in range(10_000):
        exact.apply(0, offloaded(*range(1, 50)))
    assert exact.index.nbytes <= 100_000


def test_block_sizes_may_differ_between_endpoints() -> None:
    exact = by_bytes()
    exact.apply(1, EventsChanged("b", EventState.WHOLE))
    exact.apply(0, spelled(b"ABCDEFGH", 1, 2))
    exact.apply(1, BlocksStored("b", (7,), None, tuple(range(8)), 8))
    found = exact.match(text(b"ABCDEFGHI"), request())
    assert found is not None
    assert found.tokens.tolist() == [8.0, 8.0, 0.0, 0.0]


def test_a_row_that_lost_blocks_to_the_budget_tells_the_least() -> None:
    exact = Exact(PreciseIndex(200_000, 4), ByHash(), 4)
    for row in (0, 1):
        exact.apply(row, EventsChanged("ab"[row], EventState.WHOLE))
    for start in range(0, 8000, 100):
        exact.apply(0, stored(*range(start + 1, start + 101)))
    for start in range(10_000, 14_000, 100):
        exact.apply(1, stored(*range(start + 1, start + 101), name="b"))
    assert exact.index.truncated(0)
    assert exact.index.nbytes <= 200_000
    found = known(exact, 1)
    assert (found.whole[0], found.partial[0]) == (False, True)
