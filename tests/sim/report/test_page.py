"""The page is read as a browser would: its structure by a parser, its figures by their text."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from picker.errors import ConfigError
from sim.rows import row

page = pytest.importorskip(
    "picker.sim.report.page",
    reason="needs matplotlib and jinja2: pip install matplotlib jinja2",
    exc_type=ModuleNotFoundError,
)

ORIGIN = page.Origin("Some <title>", ("picker simulate --scenario 'S2'",), ("0.1.0",), (("machine", "2 cores"),))
POLICIES = {"round-robin": 4.0, "lmetric": 1.5, "picker": 1.2, "pooled-fcfs": 1.0, "floor": 0.8}
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Text by where it stands, and whether every tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def grid(loads: tuple[float, ...] = (0.5, 0.7), **ttfts: float) -> list[dict[str, Any]]:
    means = POLICIES | {name.replace("_", "-"): ttft for name, ttft in ttfts.items()}
    return [
        row(policy, seed, ttft * (1 + 0.1 * seed) * (1 + load), load=load)
        for policy, ttft in means.items()
        for load in loads
        for seed in (1, 2, 3)
    ]


def render(runs: list[dict[str, Any]]) -> str:
    text: str = page.render(runs, ORIGIN)
    return text


@functools.cache
def two_loads() -> str:
    return render(grid())


@functools.cache
def one_load() -> str:
    return render(grid((0.5,)))


def text_of(text: str) -> str:
    return Reader(text).text


def test_a_page_is_whole_and_asks_for_nothing() -> None:
    found = Reader(two_loads())
    assert all(reference.startswith("#") for reference in found.references)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert "url(http" not in two_loads()


def test_names_in_a_page_are_there_once() -> None:
    found = two_loads()
    sections = re.findall(r'<(?:h2|section)[^>]* id="([^"]+)"', found)
    assert len(sections) == len(set(sections)) == 5
    assert 'id="figure_1"' not in found


def test_the_same_runs_give_the_same_page() -> None:
    assert render(grid((0.5,))) == one_load()


def test_a_page_says_what_made_it_and_escapes_it() -> None:
    found = two_loads()
    assert "Some &lt;title&gt;" in found
    text = text_of(found)
    assert "picker simulate --scenario 'S2'" in text
    assert "1-3 (30 runs)" in text
    assert "2 cores" in text


def test_plots_are_in_the_style_sheets_colours_and_text_stays_text() -> None:
    found = two_loads()
    assert not re.search(r"#a0[bc]0[0-9a-f]{2}", found)
    assert "var(--policy-2)" in found
    assert all(title in text_of(found) for title in ("Mean TTFT, seconds", "Hit ratio", "times the floor"))


def test_one_load_gives_bars_that_carry_names_and_values() -> None:
    text = text_of(one_load())
    # 1.2 s of picker times the mean of 1.1, 1.2, 1.3 and the load's 1.5
    assert re.search(r"2\.16", text)
    assert "load, of the highest rate" not in text
    assert "load, of the highest rate" in text_of(two_loads())


def test_picker_is_set_against_the_best_peer_and_against_each() -> None:
    text = text_of(two_loads())
    assert "mean TTFT 0.800 2 of 2" in text
    assert "agentic at 0.5: 0.800 of lmetric" in text
    assert "round-robin 0.300 0.300 0.300 2" in text
    assert "In none of 6 comparisons" in text


def test_losses_are_named_with_their_size() -> None:
    text = text_of(render(grid((0.7,), lmetric=1.0)))
    assert "In 3 of 3 comparisons" in text
    assert "agentic at 0.7 mean TTFT lmetric 1.200" in text


def test_gap_closed_and_floor_are_told_when_the_references_ran() -> None:
    text = text_of(two_loads())
    assert "gap closed" in text
    assert f"{100 * (4.0 - 1.2) / (4.0 - 1.0):.1f} %" in text
    assert "1.50 x" in text.replace("1.50x", "1.50 x")
    without = text_of(render([run for run in grid() if run["policy"] not in ("pooled-fcfs", "floor")]))
    assert "gap closed" not in without
    assert "times the floor" not in without


def test_failing_more_than_a_peer_is_told() -> None:
    runs = [run | {"failed": 4} if run["policy"] == "picker" else run for run in grid((0.5,))]
    assert re.search(r"agentic at 0\.5: picker failed 12 requests, round-robin 0", text_of(render(runs)))


def test_the_best_of_a_column_is_marked_among_routers_only() -> None:
    found = one_load()
    marked = re.findall(r'<td class="best">([^<]+)</td>', found)
    assert marked
    assert set(marked) == {"2.16"}


def test_a_page_needs_neither_picker_nor_a_second_policy() -> None:
    text = text_of(render([row("random")]))
    assert "against the best peer" not in text
    assert "random" in text


def test_a_ladder_is_drawn_by_rate_and_its_warm_up_is_not() -> None:
    def stages(tokens: float) -> list[dict[str, Any]]:
        figures = {"requests": 9, "ttft_p90_s": 1.0}
        return [{"rate": rate, "output_tokens_per_s": tokens * rate, **figures} for rate in (15.0, 3.0, 10.0)] + [
            {"rate": 15.0, "output_tokens_per_s": 777.0, **figures}
        ]

    runs = [row(policy, load=None, scenario="b2b", stages=stages(10.0)) for policy in ("picker", "lmetric")]
    text = text_of(render(runs))
    assert "Output tokens a second, by rate of requests" in text
    assert "P90 TTFT, seconds, by rate of requests" in text
    assert "B2B shared prefixes" in text


def test_a_run_at_its_own_rate_has_no_place_among_loads() -> None:
    runs = [row(policy, load=load, rate=load or 9.0) for policy in ("picker", "lmetric") for load in (None, 0.5, 0.7)]
    found = render(runs)
    plot = found.partition('class="plots">')[2].partition("</svg>")[0]
    assert ">0.5</text>" in plot
    assert ">0</text>" not in plot
    assert "agentic: rate 9.00" in text_of(found)


def test_a_figure_that_is_missing_leaves_a_dash_and_no_point() -> None:
    runs = [run | {"ttft_p95_s": None} if run["policy"] == "lmetric" else run for run in grid()]
    assert "–" in text_of(render(runs))


def test_runs_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="differ in pods"):
        render([row("a"), row("b", pods=9)])
