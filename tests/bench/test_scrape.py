"""`picker bench scrape` in small: real processes, real sockets, one short window."""

from picker.bench.pages import Pages, page
from picker.bench.scrape import COLUMNS, rows
from picker.wire.metrics_text import decode_metrics


def test_the_engines_show_what_a_scraper_wants() -> None:
    load = decode_metrics(page(), name="engine", observed_at=0.0)
    assert (load.waiting, load.running, load.kv_usage) == (0.0, 0.0, 0.0)
    assert load.kv_capacity_tokens
    assert len(page()) > 40_000


def test_served_pages_are_counted_and_nothing_else_is() -> None:
    pages = Pages()
    for path in (b"/metrics", b"/v1/models", b"/metrics", b"/served"):
        answer = pages.take(path)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n2")


async def test_watching_costs_little_and_ages_are_known() -> None:
    (row,) = await rows(endpoints=[5], interval=0.1, seconds=0.5)
    assert set(COLUMNS) <= row.keys()
    assert row["endpoints"] == 5
    assert row["interval_s"] == 0.1
    assert 0.0 < row["cores"] < 1.0
    assert row["scrapes_per_s"] > 0.0
    assert 0.0 <= row["age_p50_s"] <= row["age_p99_s"] <= row["age_max_s"] < 10.0
