import json

import numpy as np
from click.testing import CliRunner

from picker.bench.events import COLUMNS, DictIndex, Engine, rows
from picker.commands.bench import command
from picker.wire.kv_events import Cleared, Stored, decode_batch


def small() -> list[dict[str, object]]:
    return list(rows(endpoints=(3,), blocks=3000, events=600, repeats=3))


def test_a_row_has_what_the_table_shows() -> None:
    (row,) = small()
    assert set(COLUMNS) | {"repeats"} == set(row)
    assert all(isinstance(value, int | float) and value > 0 for value in row.values())


def test_shared_blocks_take_less_than_others() -> None:
    (row,) = rows(endpoints=(10,), blocks=20_000, events=600, repeats=1)
    assert row["shared_bytes_per_block"] < row["bytes_per_block"] < row["dict_bytes_per_block"]


def test_an_engine_removes_only_blocks_it_has_stored() -> None:
    engine, held = Engine(0, 1000, np.random.default_rng(0)), set[int | bytes]()
    for _ in range(100):
        for event in decode_batch(engine.step().payload).events:
            assert not isinstance(event, Cleared)
            hashes = set(event.hashes)
            if isinstance(event, Stored):
                assert event.parent is None or event.parent in held
                held |= hashes
            else:
                assert hashes <= held
                held -= hashes
    assert 1000 <= len(held) <= 2000


def test_baseline_counts_leading_blocks() -> None:
    index = DictIndex()
    index.stored(0, [1, 2, 3])
    index.stored(1, [1, 3])
    assert index.match([1, 2, 3, 4]) == {0: 3, 1: 1}
    index.removed(0, [2])
    assert index.match([1, 2, 3, 4]) == {0: 1, 1: 1}


def test_command_prints_contract_json() -> None:
    options = [
        "events",
        "--json",
        "--endpoints",
        "2",
        "--endpoints",
        "5",
        "--blocks",
        "1000",
        "--events",
        "300",
        "--repeats",
        "2",
    ]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bench"] == "events"
    assert [row["endpoints"] for row in found["rows"]] == [2, 5]
    assert {"events_per_s", "bytes_per_block", "match_p50_us"} <= set(found["rows"][0])
