from picker.prefix.row_sets import EMPTY, RowSets, unpack
from picker.types import Tier


def test_equal_sets_are_one() -> None:
    sets = RowSets(8)
    first = sets.move(EMPTY, sets.bit(3, Tier.GPU))
    assert sets.move(EMPTY, sets.bit(3, Tier.GPU), 2) == first
    assert (sets.users(first), len(sets)) == (3, 2)


def test_a_set_without_users_is_forgotten_and_its_number_given_again() -> None:
    sets = RowSets(8)
    first = sets.move(EMPTY, sets.bit(3, Tier.GPU), 2)
    both = sets.move(first, sets.bit(3, Tier.GPU) | sets.bit(4, Tier.GPU))
    assert len(sets) == 3
    sets.move(first, sets.bits(both))
    assert len(sets) == 2
    assert sets.move(EMPTY, sets.bit(7, Tier.CPU)) == first


def test_rows_are_those_of_any_tier() -> None:
    sets = RowSets(8)
    number = sets.move(EMPTY, sets.bit(1, Tier.GPU) | sets.bit(2, Tier.CPU) | sets.bit(2, Tier.DISK))
    assert sets.rows(number) == 0b110
    assert sets.by_tier(number) == (0b10, 0b100, 0b100)


def test_sets_keep_their_members_when_rows_grow() -> None:
    sets = RowSets(4)
    number = sets.move(EMPTY, sets.bit(3, Tier.GPU) | sets.bit(0, Tier.DISK))
    sets.grow_rows(70)
    assert sets.by_tier(number) == (0b1000, 0, 0b1)
    assert sets.move(number, sets.bit(3, Tier.GPU) | sets.bit(0, Tier.DISK)) == number


def test_memory_follows_the_sets_there_are() -> None:
    sets = RowSets(1000)
    before = sets.nbytes
    numbers = [sets.move(EMPTY, 1 << row) for row in range(1000)]
    assert sets.nbytes - before > 1000 * 100
    for number in numbers:
        sets.move(number, 0)
    assert len(sets) == 1
    assert sets.nbytes - before < 1000 * 120


def test_sets_are_unpacked_by_row() -> None:
    assert unpack([0b101, 0b10], 3).tolist() == [[True, False, True], [False, True, False]]
