import functools
import json

import pytest
from click.testing import CliRunner

from picker.bench.events import TABLES, rows
from picker.bench.exact_match import Chats
from picker.commands.bench import command


@pytest.fixture(autouse=True)
def few_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = functools.partial(Chats.made, 1)
    monkeypatch.setattr("picker.bench.events.Chats.made", chats)


def test_a_row_has_what_the_tables_show() -> None:
    (row,) = rows(endpoints=(3,), blocks=3000, events=600, repeats=2)
    assert {column for columns in TABLES.values() for column in columns} <= set(row)
    assert all(isinstance(value, int | float) and value > 0 for value in row.values())
    assert row["shared_bytes_per_block"] < row["bytes_per_block"]
    assert row["exact_32k_read_p50_us"] < row["exact_32k_p50_us"] < row["exact_32k_tokens_p50_us"]


def test_command_prints_contract_json() -> None:
    options = [
        *("events", "--json", "--endpoints", "2", "--endpoints", "5"),
        *("--blocks", "1000", "--events", "300", "--repeats", "1"),
    ]
    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bench"] == "events"
    assert [row["endpoints"] for row in found["rows"]] == [2, 5]
    assert {"events_per_s", "bytes_per_block", "match_p50_us"} <= set(found["rows"][0])
