import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_stories import Story, assert_sound, chain, match, store
from picker.prefix.precise import PreciseIndex
from picker.prefix.precise_snapshot import load, save
from picker.types import Tier

SECRET = b"a secret"
NAMES = {row: f"pod-{row}" for row in range(5)}


def index(rows: int = 5) -> PreciseIndex:
    return PreciseIndex(1 << 26, rows, secret=SECRET)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 120]), st.permutations(range(5)))
def test_a_loaded_index_goes_on_as_the_saved_one(seed: int, longest: int, order: list[int]) -> None:
    story = Story(seed, index(), rows=5, longest=longest)
    for _ in range(25):
        story.step()
    loaded = index()
    load(loaded, save(story.index, NAMES, SECRET), {NAMES[row]: place for row, place in enumerate(order)}, SECRET)
    assert_sound(loaded)
    story.index = loaded
    story.account.rows = [story.account.rows[order.index(row)] for row in range(5)]
    for _ in range(25):
        story.step()
        prompt, root = story.prompt()
        wanted = [story.account.match(row, prompt, root) for row in range(5)]
        assert match(loaded, prompt, root).blocks.tolist() == wanted
    assert_sound(loaded)


def test_many_branches_are_there_again() -> None:
    saved, loaded = index(), index()
    for number in range(50):
        store(saved, number % 5, chain(b"head ", b"%03d" % number, b"tail"))
    load(loaded, save(saved, NAMES, SECRET), {name: row for row, name in NAMES.items()}, SECRET)
    for number in range(50):
        assert match(loaded, b"head %03dtail" % number).blocks[number % 5] == 3
    assert_sound(loaded)


def test_endpoints_that_are_gone_leave_nothing_behind() -> None:
    saved, loaded = index(), index()
    store(saved, 0, chain(b"the ", b"quick ", b"fox"))
    store(saved, 1, chain(b"the ", b"lazy ", b"dog"))
    store(saved, 2, chain(b"the ", b"quick "), tier=Tier.CPU)
    load(loaded, save(saved, NAMES, SECRET), {"pod-2": 0, "new": 1}, SECRET)
    assert match(loaded, b"the quick fox").blocks.tolist() == [2, 0, 0, 0, 0]
    assert loaded.blocks == 2
    assert_sound(loaded)


def test_copies_orphans_and_truncation_are_kept() -> None:
    saved, loaded = index(), index()
    told = chain(b"the ", b"fox")
    store(saved, 0, told)
    store(saved, 0, told)
    store(saved, 0, chain(b"unknown ", b"fox"), start=1)
    saved.rows[0].truncated = True
    load(loaded, save(saved, NAMES, SECRET), {"pod-0": 3}, SECRET)
    assert (loaded.orphans(3), loaded.truncated(3)) == (1, True)
    loaded.removed(3, told.hashes)
    assert match(loaded, told.text).blocks[3] == 2
    loaded.removed(3, told.hashes)
    assert loaded.blocks == 0


def test_rows_are_made_for_endpoints_beyond_those_there_are() -> None:
    saved, loaded = index(), index(rows=1)
    store(saved, 0, chain(b"the ", b"fox"))
    load(loaded, save(saved, NAMES, SECRET), {"pod-0": 99}, SECRET)
    assert match(loaded, b"the fox").blocks[99] == 2


def test_loading_holds_to_the_budget() -> None:
    saved = index()
    for number in range(200):
        store(saved, 0, chain(b"%d" % number, *[b"word"] * 50))
    small = PreciseIndex(300_000, 5, secret=SECRET)
    load(small, save(saved, NAMES, SECRET), {"pod-0": 0}, SECRET)
    assert small.nbytes <= small.budget_bytes
    assert small.truncated(0)
    assert_sound(small)


def test_a_snapshot_shows_no_salt() -> None:
    saved = index()
    store(saved, 0, chain(b"the ", b"fox", root="salt-of-a-tenant"))
    assert b"salt-of-a-tenant" not in save(saved, NAMES, SECRET)


def test_a_snapshot_under_another_secret_is_refused() -> None:
    data = save(index(), NAMES, SECRET)
    with pytest.raises(ValueError, match="another secret"):
        load(index(), data, {}, b"another")


@pytest.mark.parametrize("damaged", [-1, 60])
def test_a_damaged_snapshot_is_refused(damaged: int) -> None:
    saved = index()
    store(saved, 0, chain(b"the ", b"fox"))
    data = bytearray(save(saved, NAMES, SECRET))
    data[damaged] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        load(index(), bytes(data), {}, SECRET)


@pytest.mark.parametrize("data", [b"", b"picker-blocks\x00\x01", b"something else entirely"])
def test_what_is_no_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        load(index(), data, {}, SECRET)


def test_an_index_that_knows_something_is_not_overwritten() -> None:
    known = index()
    store(known, 0, chain(b"the ", b"fox"))
    with pytest.raises(ValueError, match="knows nothing yet"):
        load(known, save(index(), NAMES, SECRET), {}, SECRET)
