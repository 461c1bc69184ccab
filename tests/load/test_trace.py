from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import ConfigError
from picker.load.text import render
from picker.load.trace import Traced, TraceFormat, load, parse, plan, sniff

# Mooncake's FAST25 conversation trace and Azure's 2023 code trace, where somebody has them.
REAL = Path(os.environ.get("PICKER_TRACES", "/nonexistent"))
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def line(**changes: object) -> str:
    return json.dumps({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2], **changes})


def mooncake(*lines: str) -> list[Traced]:
    return parse(lines, TraceFormat.MOONCAKE, path="t.jsonl")


def test_mooncake_prompt_has_the_recorded_length() -> None:
    planned = plan(mooncake(line()), rng(), name="t", seed=0)
    turn = planned.conversations[0].turns[0]
    assert [piece.tokens for piece in turn.text] == [512, 88]
    assert turn.max_tokens == 5
    assert len(render(turn.text)) == 4 * 600


def test_equal_hash_ids_share_their_bytes_and_others_do_not() -> None:
    requests = mooncake(line(), line(hash_ids=[1, 3]), line(input_length=1500, hash_ids=[1, 2, 4]))
    texts = [render(c.turns[0].text) for c in plan(requests, rng(), name="t", seed=0).conversations]
    assert texts[0][:2048] == texts[1][:2048]
    assert texts[0][2048:2100] != texts[1][2048:2100]
    assert texts[2].startswith(texts[0])


def test_three_second_ticks_are_spread_in_the_order_of_the_file() -> None:
    requests = mooncake(*(line(timestamp=3000 * (i // 50), hash_ids=[i, i]) for i in range(150)))
    conversations = plan(requests, rng(), name="t", seed=0).conversations
    times = np.array([conversation.at for conversation in conversations])
    keys = [conversation.turns[0].text[0] for conversation in conversations]
    original = [c.turns[0].text[0] for r in requests for c in plan([r], rng(), name="t", seed=0).conversations]
    assert np.all(np.diff(times) >= 0)
    assert keys == original
    # 150 requests over 9 s without a hole as long as half a tick.
    assert np.diff(times).max() < 1.5
    assert 7.0 < times[-1] < 9.0


@given(st.lists(st.integers(min_value=0, max_value=6), min_size=2, max_size=30))
@settings(max_examples=50)
def test_a_spread_request_stays_within_its_tick(ticks: list[int]) -> None:
    requests = mooncake(*(line(timestamp=3000 * tick) for tick in sorted(ticks)))
    times = [c.at for c in plan(requests, rng(), name="t", seed=0).conversations]
    start = 3.0 * min(ticks)
    for at, tick in zip(times, sorted(ticks), strict=True):
        assert 3.0 * tick - start - 3.0 <= at <= 3.0 * tick - start + 3.0


def test_exact_time_stamps_are_left_alone() -> None:
    requests = mooncake(line(timestamp=1000), line(timestamp=1250), line(timestamp=9000))
    assert [c.at for c in plan(requests, rng(), name="t", seed=0).conversations] == [0.0, 0.25, 8.0]


def test_rate_scale_and_limit_cut_a_trace_down() -> None:
    requests = mooncake(*(line(timestamp=1000 * i + 1) for i in range(10)))
    planned = plan(requests, rng(), name="t", seed=0, limit=4, rate_scale=2.0, max_tokens=3)
    assert [c.at for c in planned.conversations] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert planned.source_requests == 10
    assert {c.turns[0].max_tokens for c in planned.conversations} == {3}


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("{", "truncated"),
        (line(hash_ids=[1]), "needs 2 hash_ids"),
        (line(input_length=0, hash_ids=[]), "input_length 0"),
        (line(output_length="many"), "output_length"),
        ('{"timestamp": 1}', "input_length"),
    ],
)
def test_a_bad_mooncake_line_is_named_by_its_number(bad: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^t\.jsonl, line 3: .*{complaint}"):
        mooncake(line(), "", bad)


def test_azure_rows_become_arrivals_and_lengths_without_shared_text() -> None:
    rows = [
        AZURE_HEADER,
        "2023-11-16 18:17:03.9799600,100,10\n",
        "2023-11-16 18:17:04.9799600,200,8\n",
    ]
    planned = plan(parse(rows, TraceFormat.AZURE_CSV, path="a.csv"), rng(), name="a", seed=0)
    first, second = planned.conversations
    assert [first.at, second.at] == pytest.approx([0.0, 1.0])
    assert [c.turns[0].text[0].tokens for c in planned.conversations] == [100, 200]
    assert render(first.turns[0].text)[:64] != render(second.turns[0].text)[:64]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([AZURE_HEADER, "2023-11-16 18:17:03,1,2\n", "yesterday,1,2\n"], "line 3: .*yesterday"),
        ([AZURE_HEADER, "2023-11-16 18:17:03,many,2\n"], "line 2: .*many"),
        ([AZURE_HEADER, "2023-11-16 18:17:03\n"], "line 2"),
        (["TIMESTAMP,Tokens\n", "2023-11-16 18:17:03,1\n"], "line 1: .*ContextTokens"),
        ([AZURE_HEADER, "2023-11-16 18:17:03,1,2\n", "2023-11-16 18:17:04Z,1,2\n"], "line 3"),
    ],
)
def test_a_bad_azure_row_is_named_by_its_line(rows: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"^a\.csv, {complaint}"):
        parse(rows, TraceFormat.AZURE_CSV, path="a.csv")


@pytest.mark.parametrize("trace_format", list(TraceFormat))
def test_a_trace_without_requests_is_refused(trace_format: TraceFormat) -> None:
    with pytest.raises(ConfigError, match="no requests"):
        parse([AZURE_HEADER] if trace_format is TraceFormat.AZURE_CSV else [], trace_format, path="x")


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_senseless_rate_scale_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError):
        plan(mooncake(line()), rng(), name="t", seed=0, rate_scale=scale)


def test_the_format_follows_from_the_name_of_the_file() -> None:
    assert TraceFormat.of_path(Path("a/b.CSV")) is TraceFormat.AZURE_CSV
    assert TraceFormat.of_path(Path("a/b.jsonl")) is TraceFormat.MOONCAKE


@pytest.mark.skipif(not REAL.is_dir(), reason="PICKER_TRACES names no folder of real traces")
def test_the_real_traces_are_read_whole() -> None:
    conversation = load(REAL / "mooncake_conversation.jsonl")
    code = load(REAL / "azure_llm_2023_code.csv")
    assert (len(conversation), len(code)) == (12_031, 8_819)
    planned = plan(conversation, rng(), name="m", seed=0)
    assert planned.prompt_tokens == sum(request.prompt_tokens for request in conversation)


def test_broken_lines_are_named_counted_and_left_out_where_somebody_listens() -> None:
    broken: list[str] = []
    lines = [line(), "{", line(hash_ids=[1]), line()]
    assert len(parse(lines, TraceFormat.MOONCAKE, path="t", on_broken=broken.append)) == 2
    assert [complaint.split(":")[0] for complaint in broken] == ["t, line 2", "t, line 3"]
    rows = [AZURE_HEADER, "2023-11-16 18:17:03,1,2\n", "yesterday,1,2\n", "2023-11-16 18:17:05,1,2\n"]
    assert len(parse(rows, TraceFormat.AZURE_CSV, path="a", on_broken=broken.append)) == 2
    assert broken[-1].startswith("a, line 3: ")


def logged(*entries: object) -> list[Traced]:
    return parse([json.dumps(entry) for entry in entries], TraceFormat.ACCESS_LOG, path="log")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"time": "2026-01-01T00:00:00Z"}, {"time": "2026-01-01T00:00:02.500Z"}),
        ({"ts": 1_700_000_000.0}, {"ts": 1_700_000_002.5}),
        ({"timestamp": 1_700_000_000_000}, {"timestamp": 1_700_000_002_500}),
        ({"at": 0}, {"at": 2.5}),
    ],
)
def test_an_access_log_is_read_whatever_its_clock(first: dict[str, object], second: dict[str, object]) -> None:
    counts = {"prompt_tokens": 100, "output_tokens": 7, "status": 200}
    requests = logged({**second, **counts}, {**first, "usage": {"input_tokens": 5, "completion_tokens": 3}})
    assert requests == [Traced(0.0, 5, 3), Traced(2.5, 100, 7)]


def test_pickers_own_log_has_bytes_where_the_engine_told_no_tokens() -> None:
    entry = {"time": "2026-01-01T00:00:00Z", "prompt_bytes": 400, "prompt_tokens": None, "output_tokens": 2}
    assert logged(entry) == [Traced(0.0, 100, 2)]
    assert logged({**entry, "output_tokens": None, "status": 503}) == [Traced(0.0, 100, 1)]


def test_requests_that_ask_for_no_tokens_are_no_load_and_not_broken() -> None:
    models = {"time": "2026-01-01T00:00:00Z", "method": "GET", "path": "/v1/models", "prompt_tokens": None}
    asked = {**models, "method": "POST", "prompt_tokens": 8, "output_tokens": 2}
    assert logged(models, asked) == [Traced(0.0, 8, 2)]


@pytest.mark.parametrize("bad", [{"time": 0, "prompt_tokens": 1}, {"prompt_tokens": 1, "output_tokens": 1}, [1]])
def test_a_bad_log_line_is_named(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"^log, line 1: "):
        logged(bad)


def test_a_log_is_known_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"time": 0, "prompt_tokens": 1, "output_tokens": 1}))
    assert sniff(path) is TraceFormat.ACCESS_LOG
    path.write_text(line())
    assert sniff(path) is TraceFormat.MOONCAKE
