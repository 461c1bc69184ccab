"""What is said at the start, and that endpoints which do not answer are asked until they do."""

import asyncio
import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from picker.engine_survey import SGLANG, VLLM, Found
from picker.startup_summary import Summary, advice, hints, line, show
from picker.types import Endpoint, EndpointAdded, EndpointRemoved

GOOD = Found("a:80", None, VLLM, "0.32.0", ("m",), (), 4096, 16, 65_536, True, True, True, loaded=True)


def lacking(**less: object) -> Found:
    known = {name: getattr(GOOD, name) for name in GOOD.__slots__}
    return Found(**(known | less))


def flags(found: Found) -> list[str]:
    return [each.flag for each in advice(found)]


def test_an_engine_that_lacks_nothing_gets_no_advice() -> None:
    assert advice(GOOD) == []
    assert advice(lacking(caching=None, events=None, told=None)) == []


def test_what_is_off_comes_with_the_flag_that_sets_it() -> None:
    assert flags(lacking(caching=False)) == ["--enable-prefix-caching"]
    assert flags(lacking(told=False)) == ["--enable-prompt-tokens-details"]
    assert flags(lacking(events=False))[0].startswith("--kv-events-config")
    assert flags(lacking(loaded=False)) == ["start it without --disable-log-stats"]


def test_flags_are_those_of_the_engine() -> None:
    found = lacking(kind=SGLANG, caching=False, told=False, loaded=False)
    assert flags(found) == ["start it without --disable-radix-cache", "--enable-metrics", "--enable-cache-report"]


def test_what_many_lack_is_said_once() -> None:
    (hint,) = hints([lacking(name=f"{name}:80", told=False) for name in "abcde"])
    assert hint.startswith("hint: all endpoints: answers do not say")
    (hint,) = hints([*(lacking(name=f"{name}:80", told=False) for name in "abcde"), GOOD])
    assert hint.startswith("hint: a:80, b:80, c:80 and 2 more: ")


def test_a_line_says_all_that_was_found() -> None:
    assert line(GOOD) == (
        "endpoint a:80: vLLM 0.32.0, model m, context 4096 tokens, KV cache 65536 tokens, blocks of 16, "
        "prefix caching on, KV events on"
    )
    assert line(Found("b:80", "connection refused")) == "endpoint b:80: connection refused; it is asked again"
    assert line(Found("c:80")) == "endpoint c:80: unknown engine"


def test_a_terminal_gets_a_table_and_others_get_lines() -> None:
    for terminal, word in ((True, "caching"), (False, "prefix caching on")):
        written = io.StringIO()
        show(Console(file=written, force_terminal=terminal, width=120), [GOOD])
        assert word in written.getvalue()
        assert terminal == ("endpoint a:80:" not in written.getvalue())


def test_many_endpoints_do_not_fill_the_screen() -> None:
    written = io.StringIO()
    show(Console(file=written, width=200), [lacking(name=f"e{number}:80") for number in range(50)])
    assert len(written.getvalue().splitlines()) == 21
    assert "and 30 more endpoints" in written.getvalue()


class Engines:
    """Answers for endpoints; those in `up` are well."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.batches: list[list[str]] = []
        self.said = asyncio.Event()

    async def ask(self, endpoint: Endpoint) -> Found:
        return lacking(name=endpoint.name) if endpoint.name in self.up else Found(endpoint.name, "connection refused")

    def say(self, batch: Sequence[Found]) -> None:
        self.batches.append([f"{each.name} {'up' if each.problem is None else 'down'}" for each in batch])
        self.said.set()

    async def next(self) -> list[str]:
        async with asyncio.timeout(60):
            await self.said.wait()
        self.said.clear()
        return self.batches[-1]


async def test_those_that_do_not_answer_are_asked_until_they_do_and_complained_of_once() -> None:
    engines = Engines("a")
    summary = Summary(engines.ask, engines.say, again=0.001)
    for name in "ab":
        summary.observe(EndpointAdded(Endpoint(name, f"{name}:80")))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(summary.run())
        assert await engines.next() == ["a up", "b down"]
        engines.up.add("b")
        assert await engines.next() == ["b up"]
        summary.observe(EndpointAdded(Endpoint("c", "c:80")))
        assert await engines.next() == ["c down"]
        summary.observe(EndpointRemoved("c"))
        summary.observe(EndpointAdded(Endpoint("a", "a:81")))
        assert await engines.next() == ["a up"]
        task.cancel()
    assert len(engines.batches) == 4


def test_one_server_under_two_names_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    summary = Summary(Engines().ask, lambda batch: None)
    for endpoint in (
        *(Endpoint("a", "h:80"), Endpoint("a", "h:80", models=frozenset("m")), Endpoint("b", "h:81")),
        *(Endpoint("r0", "h:90", rank=0), Endpoint("r1", "h:90", rank=1)),
    ):
        summary.observe(EndpointAdded(endpoint))
    assert caplog.messages == []
    summary.observe(EndpointAdded(Endpoint("c", "h:80")))
    assert caplog.messages == [
        "endpoints a and c have the same address: list it once, or give each a rank if they are ranks"
    ]
    summary.observe(EndpointRemoved("a"))
    summary.observe(EndpointAdded(Endpoint("c", "h:80", models=frozenset("m"))))
    assert len(caplog.messages) == 1


async def test_a_bug_in_the_words_ends_nothing() -> None:
    engines, failed = Engines("a", "b"), asyncio.Event()

    def say(batch: Sequence[Found]) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError
        engines.say(batch)

    summary = Summary(engines.ask, say, again=0.001)
    summary.observe(EndpointAdded(Endpoint("a", "a:80")))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(summary.run())
        await failed.wait()
        summary.observe(EndpointAdded(Endpoint("b", "b:80")))
        assert await engines.next() == ["b up"]
        task.cancel()
