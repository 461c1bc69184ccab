import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.prefix.block_table import BlockTable

# Alike in their lower bits, so that they are led to the same slots.
NUMBERS = st.integers(0, 40).map(lambda each: (each * 0x0101_0000_0000_0001 + (each << 7)) % 2**64)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(NUMBERS, min_size=1, max_size=12)), max_size=40))
def test_a_table_is_a_dict_in_order(steps: list[tuple[bool, list[int]]]) -> None:
    table, wanted, block = BlockTable(), dict[int, int](), 1
    for adding, numbers in steps:
        if adding:
            added = table.add(numbers, block)
            for index, number in enumerate(numbers[:added]):
                assert number not in wanted
                wanted[number] = block + index
            assert added == len(numbers) or numbers[added] in wanted
            block += len(numbers)
        else:
            for entry in table.find_all(list(dict.fromkeys(numbers))):
                del wanted[table.number(entry)]
                table.drop(entry)
        assert len(table) == len(wanted)
        assert {number: table.get(number) for number in wanted} == wanted
        held, blocks = table.held()
        assert list(zip(held.tolist(), blocks.tolist(), strict=True)) == list(wanted.items())


def test_numbers_are_as_many_as_there_is_memory_for() -> None:
    table = BlockTable()
    numbers = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64).tolist()
    assert table.add(numbers, 1) == 20_000
    assert [table.get(number) for number in numbers[::1000]] == list(range(1, 20_001, 1000))
    assert 15 <= table.nbytes / 20_000 <= 36


def test_growth_covers_what_adding_takes() -> None:
    table = BlockTable()
    for start in range(0, 3000, 30):
        before, growth = table.nbytes, table.growth(30)
        table.add(range(start, start + 30), 1)
        assert table.nbytes <= before + growth


def test_renewed_entries_are_the_last_to_have_come() -> None:
    table = BlockTable()
    table.add(range(10, 20), 1)
    for number in (13, 17):
        table.drop(table.find(number))
    table.renew(table.oldest(2))
    assert table.held()[0].tolist() == [12, 14, 15, 16, 18, 19, 10, 11]
    assert [table.get(number) for number in (10, 13, 19)] == [1, 0, 10]


def test_a_table_that_lost_most_of_its_entries_gives_memory_back() -> None:
    table = BlockTable()
    table.add(range(1000), 1)
    before = table.nbytes
    table.drop_many(np.arange(900))
    table.renew(table.oldest(1))
    assert table.nbytes < before / 3
    assert [number for number in range(1000) if table.get(number)] == list(range(900, 1000))


def test_churn_does_not_make_a_table_larger() -> None:
    table = BlockTable()
    table.add(range(1000), 1)
    for start in range(1000, 30_000, 50):
        table.drop_many(table.oldest(50))
        table.add(range(start, start + 50), 1)
    assert len(table) == 1000
    assert table.nbytes < 60 * 1000


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(60, 300))
def test_many_numbers_are_found_as_few_are(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    table = BlockTable()
    numbers = (rng.permutation(400)[:count].astype(np.uint64) * np.uint64(0x0101_0000_0000_0001)).tolist()
    assert table.add(numbers, 1) == count
    for number in numbers[::7]:
        table.drop(table.find(number))
    asked = [*numbers, *range(10**6, 10**6 + 50)]
    assert sorted(table.find_all(asked)) == sorted(entry for each in asked if (entry := table.find(each)) >= 0)


def test_a_number_is_entered_once() -> None:
    table = BlockTable()
    for block in range(1, 2000):
        number = block * 0x0101_0000_0000_0001 % 2**64
        assert table.enter(number, block)
        assert not table.enter(number, block + 1)
        assert table.get(number) == block
    assert len(table) == 1999
