import dataclasses
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_stories import BLOCK, HASHER, TEXTS, Story, assert_sound, chain, match, store
from picker.prefix.precise import PreciseIndex
from picker.types import Reading, Tier

PLENTY = 1 << 26


def index(rows: int = 4, budget: int = PLENTY) -> PreciseIndex:
    return PreciseIndex(budget, rows)


def test_a_stored_prefix_is_found_by_its_text() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    assert store(known, 1, told) == 3
    found = match(known, b"the quick fox jumps")
    assert found.blocks.tolist() == [0, 3, 0, 0]
    assert found.tokens.tolist() == [0, 3 * BLOCK, 0, 0]
    assert (found.position, found.depth_tokens) == (13, 3 * BLOCK)


def test_only_the_blocks_that_the_prompt_begins_with_count() -> None:
    known = index()
    store(known, 0, chain(b"the ", b"quick ", b"fox"))
    store(known, 2, chain(b"the "))
    assert match(known, b"the quick dog").blocks.tolist() == [2, 0, 1, 0]
    assert match(known, b"quick fox").blocks.tolist() == [0, 0, 0, 0]
    assert match(known, b"").blocks.tolist() == [0, 0, 0, 0]


def test_chains_of_another_adapter_or_salt_are_not_matched() -> None:
    known = index()
    store(known, 0, chain(b"the ", b"fox", root="salted"))
    assert not match(known, b"the fox").blocks.any()
    assert match(known, b"the fox", root="salted").blocks[0] == 2


def test_a_continuation_begins_where_its_parent_ended() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told, stop=1)
    assert known.parent_of(0, told.hashes[0]) == (4, HASHER.hashes(b"the ").item(4))
    assert known.parent_of(1, told.hashes[0]) is None
    store(known, 0, told, start=1)
    assert match(known, b"the quick fox").blocks[0] == 3


def test_blocks_of_an_unknown_parent_are_counted_and_not_guessed() -> None:
    known = index()
    assert store(known, 0, chain(b"the ", b"quick ", b"fox"), start=1) == 0
    assert (known.orphans(0), known.resident(0), known.blocks) == (2, 0, 0)


def test_another_rows_blocks_are_no_parents() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told)
    assert store(known, 1, told, start=1) == 0
    assert known.orphans(1) == 2


def test_a_hash_that_the_row_uses_for_another_block_is_refused() -> None:
    known = index()
    told, other = chain(b"the ", b"fox"), chain(b"a ", b"fox")
    store(known, 0, told)
    clash = dataclasses.replace(other, hashes=(other.hashes[0], told.hashes[1]))
    assert store(known, 0, clash) == 1
    assert (known.orphans(0), known.resident(0)) == (1, 3)
    assert match(known, b"the fox").blocks[0] == 2
    assert match(known, b"a fox").blocks[0] == 1
    assert_sound(known)


def test_a_lie_of_one_row_changes_nothing_of_another() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told)
    store(known, 1, dataclasses.replace(chain(b"my ", b"own ", b"lie"), hashes=told.hashes))
    known.removed(1, told.hashes)
    known.clear(1)
    assert match(known, b"the quick fox").blocks.tolist() == [3, 0, 0, 0]


def test_a_block_stored_twice_is_held_until_it_is_removed_twice() -> None:
    known = index()
    told = chain(b"the ", b"fox")
    store(known, 0, told)
    store(known, 0, told, start=1)
    known.removed(0, told.hashes[1:])
    assert match(known, b"the fox").blocks[0] == 2
    known.removed(0, told.hashes[1:])
    assert match(known, b"the fox").blocks[0] == 1


def test_a_hash_twice_in_one_event_is_two_copies() -> None:
    known = index()
    told = chain(b"the ", b"fox")
    twice = dataclasses.replace(told, hashes=(told.hashes[0], told.hashes[0]))
    assert store(known, 0, twice) == 1  # a block cannot continue itself
    assert_sound(known)


def test_counting_stops_at_a_hole_and_goes_on_when_it_is_filled() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"brown ", b"fox")
    store(known, 0, told)
    known.removed(0, told.hashes[1:2])
    assert match(known, told.text).blocks[0] == 1
    assert known.resident(0) == 3
    store(known, 0, told, start=1, stop=2)
    assert match(known, told.text).blocks[0] == 4


def test_ways_to_spell_the_same_text_are_all_followed() -> None:
    known = index()
    store(known, 0, chain(b"ab", b"a", b"b"))
    store(known, 0, chain(b"ab", b"ab", b"ab", b"a"))
    store(known, 1, chain(b"a", b"ba", b"b"))
    store(known, 2, chain(b"abab", b"a"))
    assert match(known, b"abababa").blocks.tolist() == [4, 3, 2, 0]


def test_ways_of_one_row_do_not_hide_those_of_another() -> None:
    known = index()
    text = b"a" * 400
    for length in range(2, 400):
        store(known, 0, chain(text[:length]))
    for number in range(400):
        told = chain(b"a", b"a" * 9)
        store(known, 0, dataclasses.replace(told, hashes=(number, 1000 + number)))
    store(known, 1, chain(b"a", b"a" * 9, b"a" * 390))
    assert match(known, text).blocks[1] == 3


def test_a_row_may_hold_one_text_in_two_tokenisations() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    other = dataclasses.replace(told, hashes=tuple(number ^ 1 for number in told.hashes))
    store(known, 0, told, stop=2)
    store(known, 0, other)
    assert match(known, told.text).blocks[0] == 3
    known.removed(0, other.hashes)
    assert match(known, told.text).blocks[0] == 2
    assert known.resident(0) == 2


def test_one_block_more_than_a_few_children_are_all_found() -> None:
    known = index()
    for number in range(40):
        store(known, number % 4, chain(b"head ", b"%03d" % number * (1 + number % 3), b"tail"))
    for number in range(40):
        prompt = b"head " + b"%03d" % number * (1 + number % 3) + b"tail"
        assert match(known, prompt).blocks[number % 4] == 3
    for row in range(4):
        known.clear(row)
    assert known.blocks == 0
    assert_sound(known)


def test_bytes_of_zero_are_counted_by_their_number() -> None:
    known = index()
    for length in range(1, 40):
        store(known, length % 4, chain(b"head", bytes(length), b"tail"))
    for length in range(1, 40):
        found = match(known, b"head" + bytes(length) + b"tail")
        assert found.blocks[length % 4] == 3
        assert found.position == 8 + length
        head = known.tree.child_at(known.tree.roots[known.name("root")][BLOCK], 4, HASHER.hashes(b"head").item(4))
        branches = known.tree.branches(next(head), HASHER.hashes(b"head" + bytes(length)))
        assert len(branches) == len(set(branches))
    assert match(known, b"head" + bytes(40) + b"tail").blocks.max() == 2


def test_a_block_in_a_lower_tier_counts_and_is_worth_less() -> None:
    known = PreciseIndex(PLENTY, 4, worth={Tier.GPU: 1.0, Tier.CPU: 0.75, Tier.DISK: 0.5})
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told, stop=1)
    store(known, 0, told, start=1, stop=2, tier=Tier.CPU)
    store(known, 0, told, start=2, tier=Tier.DISK)
    store(known, 1, told)
    store(known, 1, told, tier=Tier.CPU)
    found = match(known, told.text)
    assert found.blocks.tolist() == [3, 3, 0, 0]
    assert found.tokens.tolist() == [2.25 * BLOCK, 3 * BLOCK, 0, 0]


def test_a_block_stays_known_while_any_tier_has_it() -> None:
    known = index()
    told = chain(b"the ", b"fox")
    store(known, 0, told)
    store(known, 0, told, tier=Tier.CPU)
    known.removed(0, told.hashes, Tier.GPU)
    assert match(known, told.text).blocks[0] == 2
    known.removed(0, told.hashes, Tier.DISK)
    assert match(known, told.text).blocks[0] == 2
    known.removed(0, told.hashes, Tier.CPU)
    assert (known.resident(0), known.blocks) == (0, 0)


def test_clearing_one_tier_leaves_the_others() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told)
    store(known, 0, told, stop=2, tier=Tier.CPU)
    known.clear(0, Tier.GPU)
    assert match(known, told.text).blocks[0] == 2
    assert known.resident(0) == 2


def test_tiers_keep_their_rows_when_rows_grow() -> None:
    known = index(rows=2)
    told = chain(b"the ", b"fox")
    store(known, 0, told, tier=Tier.CPU)
    store(known, 1, told)
    known.grow_rows(200)
    store(known, 199, told, tier=Tier.DISK)
    assert np.flatnonzero(match(known, told.text).blocks).tolist() == [0, 1, 199]
    assert match(known, told.text).tokens[[0, 1, 199]].tolist() == pytest.approx([25.6, 32, 12.8])
    assert_sound(known)


def test_engines_with_other_block_sizes_are_matched_at_once() -> None:
    known = index()
    text = b"abcdefgh"
    for row, size in ((0, 2), (1, 4)):
        ends = np.arange(size, len(text) + 1, size)
        keys = HASHER.hashes(text)[ends]
        known.stored(row, ("root", size), tuple(range(1, len(ends) + 1)), None, ends, keys, size)
    found = match(known, text[:7])
    assert found.blocks.tolist() == [3, 1, 0, 0]
    assert found.tokens.tolist() == [6, 4, 0, 0]


def test_a_boundary_inside_a_token_is_given_up() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fo", b"x")
    store(known, 0, told)
    store(known, 1, told, stop=1)
    asked: list[int] = []

    def splits(position: int) -> bool:
        asked.append(position)
        return position <= 10

    found = known.match(Reading(HASHER.hashes(told.text), splits=splits), "root")
    assert found.blocks.tolist() == [2, 1, 0, 0]
    assert (found.position, found.depth_tokens) == (10, 2 * BLOCK)
    assert asked == [13, 12, 10]


def test_a_prompt_without_boundaries_is_given_up_in_few_questions() -> None:
    known = index()
    told = chain(*[b"a"] * 1000)
    store(known, 0, told)
    asked: list[int] = []

    def splits(position: int) -> bool:
        asked.append(position)
        return False

    found = known.match(Reading(HASHER.hashes(told.text), splits=splits), "root")
    assert not found.blocks.any()
    assert len(asked) < 40


def test_what_nobody_holds_is_forgotten() -> None:
    known = index()
    told = chain(*[b"word "] * 300)
    for row in range(4):
        store(known, row, told)
    assert known.blocks == 300
    for row in range(3):
        known.removed(row, told.hashes[::-1])
    assert known.blocks == 300
    known.remove_row(3)
    assert (known.blocks, known.tree.roots) == (0, {})
    assert_sound(known)


@pytest.mark.parametrize("count", [1, 40, 300])
def test_blocks_are_removed_one_by_one_as_all_at_once(count: int) -> None:
    known, other = index(), index()
    told = chain(*[b"word "] * 400)
    for each in (known, other):
        store(each, 0, told)
        store(each, 1, told, stop=350)
        store(each, 0, told, start=120, stop=130, tier=Tier.CPU)
    gone = told.hashes[100 : 100 + count][::-1]
    assert known.removed(0, (*gone, *gone, 7)) == count  # each is there once
    assert sum(other.removed(0, (number,)) for number in gone) == count
    for row in (0, 1):
        assert known.resident(row) == other.resident(row)
    assert match(known, told.text).blocks.tolist() == match(other, told.text).blocks.tolist()
    assert known.blocks == other.blocks
    assert_sound(known)


def test_a_parent_that_left_is_no_parent() -> None:
    known = index()
    told = chain(b"the ", b"quick ", b"fox")
    store(known, 0, told, stop=2)
    assert known.parent_of(0, told.hashes[1]) is not None
    known.removed(0, told.hashes[1:2])
    assert store(known, 0, told, start=2) == 0
    store(known, 1, told, stop=2)
    assert known.parent_of(1, told.hashes[1]) is not None
    assert store(known, 0, told, start=2) == 0
    known.clear(1)
    assert store(known, 1, told, start=2) == 0
    assert_sound(known)


def test_a_lower_budget_holds_from_the_next_event_on() -> None:
    known = index()
    for number in range(200):
        store(known, number % 4, chain(b"%03d" % number, *[b"word "] * 20))
    before = known.nbytes
    known.budget_bytes = before * 3 // 4
    store(known, 0, chain(b"one", b"more"))
    assert known.nbytes <= known.budget_bytes


def test_a_row_that_is_given_away_begins_from_nothing() -> None:
    known = index()
    store(known, 0, chain(b"the ", b"fox"), start=1)
    store(known, 0, chain(b"the ", b"fox"))
    known.remove_row(0)
    assert (known.resident(0), known.orphans(0), known.truncated(0)) == (0, 0, False)
    assert not match(known, b"the fox").blocks.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 5, 5, 200]))
def test_what_rows_hold_is_what_their_engines_said(seed: int, longest: int) -> None:
    story = Story(seed, index(rows=5), rows=5, longest=longest)
    for _ in range(40):
        story.step()
        prompt, root = story.prompt()
        wanted = [story.account.match(row, prompt, root) for row in range(5)]
        assert match(story.index, prompt, root).blocks.tolist() == wanted
        assert [story.index.resident(row) for row in range(5)] == [len(held) for held in story.account.rows]
    assert_sound(story.index)
    for row in range(5):
        story.index.clear(row)
    assert (story.index.tree.live, len(story.index.sets)) == (0, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1_000, 60_000, 120_000, 250_000]))
def test_budget_is_never_exceeded_and_what_is_left_is_true(seed: int, room: int) -> None:
    known = index(rows=5)
    known.budget_bytes = known.nbytes + room
    story = Story(seed, known, rows=5, longest=60)
    for _ in range(60):
        story.step()
        assert known.nbytes <= known.budget_bytes
        prompt, root = story.prompt()
        for row, blocks in enumerate(match(known, prompt, root).blocks.tolist()):
            wanted = story.account.match(row, prompt, root)
            assert blocks == wanted or (blocks < wanted and known.truncated(row))
    assert_sound(known)


def test_a_full_budget_takes_the_tail_of_what_is_oldest_from_who_has_most() -> None:
    known = index(rows=2)
    shared = chain(*[b"system "] * 20)
    old = shared.longer([b"old "] * 200)
    store(known, 0, old)
    store(known, 1, shared)
    known.budget_bytes = known.nbytes + 300_000
    for number in range(60):
        newest = shared.longer([b"%06d" % number] * 100)
        store(known, 0, newest)
    assert known.truncated(0)
    assert not known.truncated(1)
    assert match(known, newest.text).blocks.tolist() == [120, 20]
    assert 20 <= match(known, old.text).blocks[0] < 220


def test_an_event_too_large_for_the_budget_costs_nobody_anything() -> None:
    known = index(rows=2, budget=300_000)
    told = chain(b"the ", b"fox")
    store(known, 0, told)
    assert store(known, 1, chain(*[b"flood "] * 5000)) == 0
    assert known.truncated(1)
    assert match(known, told.text).blocks.tolist() == [2, 0]


def test_a_row_is_whole_again_after_it_was_cleared() -> None:
    known = index(rows=2, budget=300_000)
    store(known, 1, chain(*[b"flood "] * 5000))
    known.clear(1)
    assert not known.truncated(1)


def test_memory_is_what_is_counted() -> None:
    rng = random.Random(0)
    tracemalloc.start()
    known = index(rows=8)
    for number in range(160):
        store(known, number % 8, chain(b"%d" % number, *rng.choices(TEXTS, k=250)))
    before = tracemalloc.get_traced_memory()[0]
    counted = known.nbytes
    del known
    released = before - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.95 * counted < released < 1.05 * counted


def test_memory_stays_within_the_budget_at_its_worst_moment() -> None:
    rng = random.Random(0)
    chains = [chain(b"%d" % number, *rng.choices(TEXTS, k=250)) for number in range(100)]
    store(index(), 0, chains[0])
    tracemalloc.start()
    known = index(rows=8, budget=1_000_000)
    for number, told in enumerate(chains):
        store(known, number % 8, told)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any(known.truncated(row) for row in range(8))
    assert peak < 1_100_000  # what passes through an event comes on top
