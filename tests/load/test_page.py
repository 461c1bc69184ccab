"""Pages are read as a browser would: the structure by a parser, the figures by their text."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from load.runs import ORIGIN, failed, measured_of, noisy, record
from picker.load.compare import compare
from picker.load.measured import Stage
from picker.load.slo import Slo
from picker.load.windows import Windows

run_page = pytest.importorskip(
    "picker.load.run_page",
    reason="needs matplotlib and jinja2: pip install matplotlib jinja2",
    exc_type=ModuleNotFoundError,
)
compare_page = pytest.importorskip("picker.load.compare_page", exc_type=ModuleNotFoundError)

SLO = Slo(ttft=0.5, e2e=10.0)
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Texts, sections and how many drawings each has; checks that every tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.drawings: dict[str, int] = {}
        self.section = ""
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._see(tag, dict(attrs))

    def _see(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.references += [value or "" for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        if tag == "section":
            self.section = attributes["id"] or ""
            self.drawings[self.section] = 0
        elif tag == "svg":
            self.drawings[self.section] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


@functools.cache
def whole() -> str:
    times = [*(record(n / 10, 0.1 + n / 100, endpoint=f"<{n % 2}>:1") for n in range(60)), failed(7.0, detail="<full>")]
    stages = (Stage(0.0, 3.0, 10.0), Stage(3.0, 8.0, 20.0))
    text: str = run_page.render(measured_of(*times, stages=stages, notes=("sent <late>",)), SLO)
    return text


def test_the_page_has_every_section_with_its_drawings() -> None:
    assert Reader(whole()).drawings == {
        "goodput": 0,
        "distributions": 3,
        "ladder": 4,
        "time": 5,
        "endpoints": 0,
        "errors": 0,
        "percentiles": 0,
    }


def test_the_page_asks_for_nothing() -> None:
    assert all(reference.startswith("#") for reference in Reader(whole()).references)
    assert "url(" not in re.sub(r"url\(#", "", whole())
    assert "<script" not in whole()


def test_what_came_from_outside_is_escaped() -> None:
    text = Reader(whole()).text
    for words in ("<0>:1", "<full>", "sent <late>"):
        assert words in text
    assert "<late>" not in whole()


def test_the_page_tells_where_its_figures_come_from() -> None:
    text = Reader(whole()).text
    for words in (ORIGIN.command, "Some CPU", "2 cores", "Python 3.11.4", "0.1.0, commit abc", "seed 1", "model llama"):
        assert words in text


def test_goodput_counts_what_met_the_objectives() -> None:
    # 0.1 to 0.5 seconds are the first 41 of 61.
    assert "67.2% of the requests met TTFT ≤ 0.5 s, E2E ≤ 10 s" in Reader(whole()).text


def test_the_knee_is_told_in_words() -> None:
    assert "kept for 95% of requests at 10/s, missed at 20/s" in Reader(whole()).text


def test_errors_are_told_by_class_endpoint_and_words() -> None:
    text = Reader(whole()).text
    assert re.search(r"http-503 1 a:8000 \(1\) <full>", text)


def test_a_percentile_among_failures_is_infinite_and_nothing_told_is_nothing_drawn() -> None:
    silent = record(1.0, 0.0, ended_at=1001.0, cached_tokens=None, output_tokens=1, gaps=[])
    reader = Reader(run_page.render(measured_of(silent, failed(2.0)), None))
    assert "TTFT P95 ∞" in reader.text
    assert reader.drawings == {"distributions": 2, "time": 4, "endpoints": 0, "errors": 0, "percentiles": 0}


def test_a_run_that_measured_nothing_has_a_page_too() -> None:
    assert Reader(run_page.render(measured_of(), SLO)).drawings == {"percentiles": 0}


def test_of_very_many_endpoints_the_range_is_drawn() -> None:
    many = measured_of(*(record(n / 10, endpoint=f"pod-{n}") for n in range(40)))
    assert [line.name for line in run_page.in_flight(many.requests, Windows(1.0, 5)) if not line.faint] == [
        *("most", "mean", "least")
    ]


def test_runs_at_several_rates_make_a_ladder() -> None:
    runs = [(f"at-{rate}", replace(noisy(rate, slower=rate / 4), rate=float(rate))) for rate in (2, 8)]
    reader = Reader(run_page.render_ladder(runs, SLO))
    assert reader.drawings == {"ladder": 4}
    assert "2/s" in reader.text
    assert reader.text.count(ORIGIN.command) == 1


def test_a_comparison_shows_ratio_interval_and_verdict() -> None:
    a, b = noisy(1), noisy(2, slower=1.5, origin=replace(ORIGIN, command="picker load other"))
    found = compare(a, b, np.random.default_rng(0), SLO)
    reader = Reader(compare_page.render([("a", a), ("b", b)], [found], ["b"], SLO))
    assert reader.drawings == {"compare-b": 0, "distributions": 3, "time": 2}
    assert "300 requests of the same plan, paired" in reader.text
    assert re.search(r"TTFT mean [\d.]+ ms [\d.]+ ms 1\.\d{3} 1\.\d{3} to 1\.\d{3} B is worse", reader.text)
    assert "command of b picker load other" in reader.text


def test_a_comparison_of_nothing_has_a_page_too() -> None:
    nothing = measured_of()
    found = compare(nothing, nothing, np.random.default_rng(0))
    assert (
        "no figure to compare"
        in Reader(compare_page.render([("a", nothing), ("b", nothing)], [found], ["b"], None)).text
    )
