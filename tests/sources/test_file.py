from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import ConfigError
from picker.sources.file import (
    MAX_FILE_BYTES,
    Entry,
    FileSource,
    Terms,
    load_endpoints,
    load_entries,
    parse_endpoints,
    parse_entries,
)
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact, Role


def parse(text: str) -> tuple[Endpoint, ...]:
    return parse_endpoints(text, origin="pool.yaml")


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    message = str(refused.value)
    assert message.startswith("pool.yaml: ")
    assert "\n" not in message
    return message


# --- reading -----------------------------------------------------------------------------------------------


def test_every_key_is_read() -> None:
    text = """
endpoints:
  - name: pod-a
    address: 10.0.0.1
    port: 8000
    models: [tiny, ad1]
    role: prefill
    rank: 1
    scheme: https
    labels: {zone: "a"}
"""
    assert parse(text) == (
        Endpoint(
            name="pod-a",
            address="10.0.0.1:8000",
            models=frozenset({"tiny", "ad1"}),
            role=Role.PREFILL,
            scheme="https",
            rank=1,
            labels={"zone": "a"},
        ),
    )


def test_an_address_is_enough() -> None:
    assert parse("endpoints:\n- address: h:8000\n") == (Endpoint("h:8000", "h:8000"),)
    assert parse("endpoints: [{address: 'https://h:8000/'}]") == (Endpoint("h:8000", "h:8000", scheme="https"),)
    assert parse("endpoints: [{address: 'fe80::1', port: 80}]") == (Endpoint("[fe80::1]:80", "[fe80::1]:80"),)


def test_llm_ds_discovery_file_is_read() -> None:
    text = """
endpoints:
  - {name: a, namespace: default, address: 10.0.0.1, port: "8000", labels: {llm-d.ai/role: decode, app: x}}
  - {name: a, namespace: prod, address: 10.0.0.2, port: "8000", labels: {llm-d.ai/role: prefill-decode}}
  - {name: b, address: 10.0.0.3, port: "8000"}
"""
    assert [(e.name, e.address, e.role) for e in parse(text)] == [
        ("a", "10.0.0.1:8000", Role.DECODE),
        ("prod/a", "10.0.0.2:8000", Role.BOTH),
        ("b", "10.0.0.3:8000", Role.BOTH),
    ]


def test_the_role_key_wins_over_the_label() -> None:
    assert parse("endpoints: [{address: 'h:1', role: decode, labels: {llm-d.ai/role: prefill}}]")[0].role is Role.DECODE


def test_ranks_of_one_address_get_names_of_their_own() -> None:
    text = "endpoints: [{address: 'h:1', rank: 0}, {address: 'h:1', rank: 1}]"
    assert [(e.name, e.rank) for e in parse(text)] == [("h:1-rank-0", 0), ("h:1-rank-1", 1)]


def test_an_empty_list_is_an_empty_pool() -> None:
    assert parse("endpoints: []") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no 'endpoints:' list"]),
        ("- address: h:1", ["no 'endpoints:' list"]),
        ("endpoint: []", ["unknown key 'endpoint'", "did you mean 'endpoints'"]),
        ("endpoints:", ["'endpoints' must be a list, not nothing"]),
        ("endpoints: {a: 1}", ["must be a list, not a mapping"]),
        ("endpoints: ['h:1']", ["endpoint 1", "must be a mapping", "'h:1'"]),
        ("endpoints: [{address: 'h:1'}, {adress: 'h:1'}]", ["endpoint 2", "'adress'", "did you mean 'address'"]),
        ("endpoints: [{name: pod, address: 'h:1', xyzzy: 1}]", ["endpoint 1 ('pod')", "'xyzzy'", "known are name,"]),
        ("endpoints: [{name: pod}]", ["endpoint 1 ('pod')", "'address' is missing"]),
        ("endpoints: [{address: 10.0.0.1}]", ["port is missing"]),
        ("endpoints: [{address: 10.0.0.1, port: http}]", ["port 'http'"]),
        ("endpoints: [{address: 10.0.0.1, port: 0}]", ["port '0'"]),
        ("endpoints: [{address: h, port: true}]", ["'port' must be a number", "true or false"]),
        ("endpoints: [{address: 'h:1', port: 1}]", ["'h:1' is no host"]),
        ("endpoints: [{address: 'h:1', models: tiny}]", ["'models' must be a list of model names, not 'tiny'"]),
        ("endpoints: [{address: 'h:1', rank: '1'}]", ["'rank' must be a whole number"]),
        ("endpoints: [{address: 'h:1', rank: -1}]", ["'rank' must be a whole number"]),
        ("endpoints: [{address: 'h:1', role: prefil}]", ["unknown role 'prefil'", "did you mean 'prefill'"]),
        ("endpoints: [{address: 'h:1', labels: {llm-d.ai/role: decoder}}]", ["'decoder'", "did you mean 'decode'"]),
        ("endpoints: [{address: 'h:1', labels: {v: 1}}]", ["'labels' must be a mapping of text to text"]),
        ("endpoints: [{address: 'h:1', scheme: httpss}]", ["unknown scheme 'httpss'", "did you mean 'https'"]),
        ("endpoints: [{address: 'http://h:1', scheme: https}]", ["scheme is given twice"]),
        ("endpoints: [{name: on, address: 'h:1'}]", ["'name' must be text", "in quotes"]),
        ("endpoints: [{address: 'h:1'}, {address: 'h:1'}]", ["'h:1' is listed 2 times"]),
        ("endpoints:\n- address: h:1\n  address: h:2\n", ["line 3, column 3", "'address' comes twice"]),
        ("endpoints: [\n  {address: 'h:1'\n", ["line 3", "not usable YAML"]),
        ("endpoints: [2020-13-45]", ["not usable YAML", "month"]),
        ("\x00", ["not usable YAML"]),
    ],
)
def test_a_mistake_is_refused_with_its_place_and_a_way_out(text: str, words: list[str]) -> None:
    message = refusal(text)
    assert [word for word in words if word not in message] == []


def test_aliases_do_not_grow_the_work() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    assert "unknown key 'a0'" in refusal("\n".join(lines))


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet="endpoits:[]{}-adrs'\"&*!1 \n", max_size=60) | st.binary(max_size=40))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        parse_endpoints(text, origin="pool.yaml")
    except ConfigError:
        return


def test_a_file_that_cannot_be_read_or_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        load_endpoints(tmp_path / "gone.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        load_endpoints(tmp_path / "big.yaml")


# --- watching ----------------------------------------------------------------------------------------------


class Watched:
    """A file and a source on it; each edit happens during one of the source's sleeps, the end of edits ends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: list[Fact] = []
        self._edits: Iterator[Callable[[], object]] = iter(())
        self._stamp = 1_700_000_000

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self._stamp += 1  # the file system's clock may not tick between two writes
        os.utime(self.path, (self._stamp, self._stamp))

    def put(self, *addresses: str) -> None:
        self.write("endpoints:\n" + "".join(f"- address: {address}\n" for address in addresses))

    async def run(self, *edits: Callable[[], object]) -> list[Fact]:
        """The facts emitted after those of the first look."""
        self._edits = iter(edits)
        with pytest.raises(asyncio.CancelledError):
            await FileSource(self.path, sleep=self._sleep).run(self.facts.append)
        return self.facts[self._first :]

    async def _sleep(self, seconds: float) -> None:
        assert seconds == 1.0
        if not hasattr(self, "_first"):
            self._first = len(self.facts)
        edit = next(self._edits, None)
        if edit is None:
            raise asyncio.CancelledError
        edit()


def added(address: str) -> EndpointAdded:
    return EndpointAdded(Endpoint(address, address))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    file = Watched(tmp_path / "pool.yaml")
    file.put("a:1", "b:1")
    return file


def nothing() -> None:
    pass


async def test_the_first_look_announces_all(watched: Watched) -> None:
    assert await watched.run() == []
    assert watched.facts == [added("a:1"), added("b:1")]


async def test_an_unchanged_file_says_nothing(watched: Watched) -> None:
    assert await watched.run(nothing, lambda: watched.put("a:1", "b:1"), nothing) == []


async def test_an_unchanged_file_is_not_read_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []

    def load(path: Path) -> tuple[Entry, ...]:
        reads.append(path)
        return load_entries(path)

    monkeypatch.setattr("picker.sources.file.load_entries", load)
    await watched.run(nothing, nothing, lambda: watched.put("c:1"), nothing)
    assert len(reads) == 2


async def test_an_edit_that_keeps_the_size_is_seen(watched: Watched) -> None:
    assert await watched.run(lambda: watched.put("a:1", "c:1")) == [added("c:1"), EndpointRemoved("b:1")]


async def test_a_file_caught_in_the_middle_of_a_write_is_left_for_the_next_look(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path) -> tuple[Entry, ...]:
        entries = load_entries(path)
        if entries == (Entry(Endpoint("a:1", "a:1")),):  # the writer goes on right after our read
            watched.put("a:1", "b:1", "c:1")
        return entries

    monkeypatch.setattr("picker.sources.file.load_entries", load)
    assert await watched.run(lambda: watched.put("a:1"), nothing) == [added("c:1")]


async def test_new_endpoints_come_before_old_ones_go(watched: Watched) -> None:
    assert await watched.run(lambda: watched.put("c:1")) == [
        added("c:1"),
        EndpointRemoved("a:1"),
        EndpointRemoved("b:1"),
    ]


async def test_a_changed_description_is_announced_again(watched: Watched) -> None:
    changed = Endpoint("a:1", "a:1", models=frozenset({"m"}))
    text = "endpoints: [{address: 'a:1', models: [m]}, {address: 'b:1'}]"
    assert await watched.run(lambda: watched.write(text)) == [EndpointAdded(changed)]


async def test_a_replaced_file_with_equal_time_and_size_is_seen(watched: Watched) -> None:
    def swap() -> None:
        times = os.stat(watched.path)
        other = watched.path.with_suffix(".new")
        other.write_text(watched.path.read_text().replace("b:1", "c:1"))
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(watched.path)

    assert await watched.run(swap) == [added("c:1"), EndpointRemoved("b:1")]


@pytest.mark.parametrize("broken", ["", "endpoints: [", "endpoints: [{adress: 'a:1'}]"])
async def test_a_broken_edit_keeps_the_last_good_state_and_warns_once(
    watched: Watched, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        facts = await watched.run(lambda: watched.write(broken), nothing, nothing, lambda: watched.put("a:1", "c:1"))
    assert facts == [added("c:1"), EndpointRemoved("b:1")]
    warning, info = caplog.records
    assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
    assert "pool.yaml" in warning.message
    assert "keeping the last good 2 endpoints" in warning.message


async def test_each_new_mistake_is_named(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    await watched.run(lambda: watched.write("endpoints: ["), nothing, lambda: watched.write("endpoints: 1"))
    assert ["not usable YAML" in r.message for r in caplog.records] == [True, False]


async def test_a_vanished_file_keeps_the_last_good_state_and_warns_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    facts = await watched.run(watched.path.unlink, nothing, nothing, lambda: watched.put("a:1"), nothing)
    assert facts == [EndpointRemoved("b:1")]
    assert ["cannot be read" in record.message for record in caplog.records] == [True]


async def test_a_first_look_that_fails_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        await FileSource(tmp_path / "none.yaml").run(lambda fact: None)
    (tmp_path / "bad.yaml").write_text("endpoints: {")
    with pytest.raises(ConfigError, match="not usable YAML"):
        await FileSource(tmp_path / "bad.yaml").run(lambda fact: None)


# --- how endpoints are treated -----------------------------------------------------------------------------


def test_an_entry_says_its_weight_and_the_key_that_it_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "b.key"
    file.write_text("sk-b\n")
    entries = parse_entries(
        f"""
endpoints:
  - {{address: "a:1", weight: 2, api_key: sk-a}}
  - {{address: "b:1", api_key_file: {file}}}
  - address: "c:1"
""",
        origin="pool.yaml",
    )
    assert [entry.terms for entry in entries] == [Terms(2.0, "sk-a"), Terms(1.0, "sk-b", file), Terms()]
    assert "sk-" not in repr(entries)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ("weight: 0", "a weight is a number from 0.01"),
        ("weight: heavy", "'weight' must be a number"),
        ("weight: .nan", "a weight is a number from 0.01"),
        ("weight: true", "'weight' must be a number"),
        ("api_key: a, api_key_file: /b", "given twice"),
        ("api_key_file: /no/such/file", "/no/such/file: cannot be read"),
    ],
)
def test_terms_that_do_not_do_are_refused_with_their_place(terms: str, words: str) -> None:
    message = refusal(f"endpoints: [{{address: 'a:1', {terms}}}]")
    assert words in message
    assert "endpoint 1" in message


@pytest.mark.parametrize("key", ["31337", "'31337 with a space'", "[31337]", "{31337: 1}"])
def test_a_key_is_never_in_a_complaint(key: str, tmp_path: Path) -> None:
    assert "31337" not in refusal(f"endpoints: [{{address: 'a:1', api_key: {key}}}]")
    file = tmp_path / "key"
    file.write_text("31337 with a space")
    assert "31337" not in refusal(f"endpoints: [{{address: 'a:1', api_key_file: {file}}}]")


async def test_terms_are_told_before_their_endpoints_and_when_a_file_of_a_key_changes(tmp_path: Path) -> None:
    path, key, told = tmp_path / "pool.yaml", tmp_path / "key", list[object]()
    path.write_text(f"endpoints: [{{address: 'a:1', api_key_file: {key}}}]")
    key.write_text("one")

    async def turns() -> AsyncIterator[None]:
        yield
        key.write_text("other")
        yield
        path.write_text("endpoints: [{address: 'a:1', weight: 3.0}]")
        yield

    turning = turns()

    async def sleep(seconds: float) -> None:
        if await anext(turning, "over") is not None:
            raise asyncio.CancelledError

    source = FileSource(path, sleep=sleep, terms=lambda terms: told.append(dict(terms)))
    with pytest.raises(asyncio.CancelledError):
        await source.run(told.append)
    assert told == [
        {"a:1": Terms(1.0, "one", key)},
        added("a:1"),
        {"a:1": Terms(1.0, "other", key)},
        {"a:1": Terms(3.0)},
    ]


async def test_another_file_takes_the_place_of_the_first_and_none_of_both(tmp_path: Path) -> None:
    first, second, facts = tmp_path / "first", tmp_path / "second", list[Fact]()
    first.write_text("endpoints: [{address: 'a:1'}]")
    second.write_text("endpoints: [{address: 'b:1'}]")
    places = iter([first, second, None])
    source = FileSource(None, sleep=lambda seconds: move())

    async def move() -> None:
        try:
            source.move(next(places))
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        await source.run(facts.append)
    assert facts == [added("a:1"), added("b:1"), EndpointRemoved("a:1"), EndpointRemoved("b:1")]


async def test_a_file_without_endpoints_is_told_of(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    await watched.run(lambda: watched.write("endpoints: []"))
    assert "lists no endpoints" in caplog.text
