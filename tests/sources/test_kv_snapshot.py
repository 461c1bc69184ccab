from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picker.errors import ConfigError
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.precise_snapshot import copied
from picker.prefix.spellers import ByHash
from picker.sources import kv_snapshot
from picker.sources.kv_snapshot import Snapshots, read_key, write
from picker.sources.kv_stream import Mark, Resumed, Stream
from picker.types import (
    BlocksStored,
    Endpoint,
    EndpointAdded,
    EndpointRemoved,
    EventsChanged,
    EventState,
    Request,
)
from picker.wire.kv_events import Stored, encode_batch

SECRET = b"s" * 32
BUDGET = 1 << 22
MARK = Mark(7, b"digest", 1.5, 0, EventState.WHOLE, "seen from its first batch on")


class Streams:
    """Streams that have got to MARK; what they were told to go on from."""

    def __init__(self, *names: str) -> None:
        self.named = names
        self.resumed_from: Mapping[str, Mark] = {}
        self.resumed: Callable[[str], None] = lambda name: None
        self.quiets = 0

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        self.quiets += 1
        yield

    def marks(self) -> Mapping[str, Mark]:
        return dict.fromkeys(self.named, MARK)

    def resume(self, marks: Mapping[str, Mark], resumed: Callable[[str], None]) -> None:
        self.resumed_from, self.resumed = marks, resumed


class Rows(dict[str, int]):
    def row(self, name: str) -> int | None:
        return self.get(name)


class Process:
    """One picker's part in it: what it knows, and its snapshots. place: of the file."""

    def __init__(self, place: Path, *, secret: bytes = SECRET, budget: int = BUDGET, **more: Any) -> None:
        self.exact = Exact(PreciseIndex(budget, secret=secret), ByHash())
        self.streams = Streams("a", "b")
        self.rows = Rows(a=0, b=1)
        fields: dict[str, Any] = {"fingerprint": b"f", "idle": lambda: True, "interval": 60.0, "wall": lambda: 100.0}
        self.snapshots = Snapshots(
            place,
            secret=secret,
            exact=self.exact,
            events=self.streams,
            rows=self.rows,
            fresh=lambda: PreciseIndex(budget, secret=secret),
            **(fields | more),
        )

    def learn(self, *hashes: int, row: int = 0) -> None:
        name = "ab"[row]
        self.exact.apply(row, EventsChanged(name, EventState.WHOLE, "seen from its first batch on"))
        self.exact.apply(row, BlocksStored(name, hashes, block_size=4))

    def cached(self, *hashes: int) -> list[float] | None:
        found = self.exact.match(None, Request(1, None, 0.0, np.array(hashes, dtype=np.uint64)))
        return None if found is None else (found.tokens * (found.whole | found.partial))[:2].tolist()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "snapshot"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


async def saved(place: Path, **more: Any) -> None:
    process = Process(place, **more)
    process.learn(1, 2, 3)
    process.learn(1, row=1)
    assert await process.snapshots.save()


async def test_what_was_saved_is_known_again_once_the_engine_goes_on_from_there(place: Path) -> None:
    await saved(place)
    process = Process(place)
    await process.snapshots.restore()
    assert process.streams.resumed_from == {"a": MARK, "b": MARK}
    assert process.cached(1, 2, 3) is None, "believed before the engine was asked"
    process.streams.resumed("a")
    assert process.cached(1, 2, 3, 4) == [12.0, 0.0]
    assert process.exact.stream(0).reason == "seen from its first batch on"
    process.streams.resumed("b")
    assert process.cached(1, 2, 3, 4) == [12.0, 4.0]


async def test_a_stream_that_begins_anew_begins_from_nothing(place: Path) -> None:
    await saved(place)
    process = Process(place)
    await process.snapshots.restore()
    process.exact.apply(0, EventsChanged("a", EventState.PARTIAL, "the engine restarted"))
    process.streams.resumed("a")
    assert process.cached(1, 2, 3, 4) == [0.0, 0.0]
    assert process.exact.index.resident(0) == 0


async def test_an_endpoint_that_left_leaves_its_row_empty(place: Path) -> None:
    await saved(place)
    process = Process(place)
    await process.snapshots.restore()
    process.exact.remove_row(0)
    process.streams.resumed("a")
    assert process.exact.index.resident(0) == 0


async def test_endpoints_that_are_discovered_later_are_waited_for(place: Path) -> None:
    await saved(place)
    process = Process(place)
    del process.rows["b"]
    looked = process.rows.row

    def row(name: str) -> int | None:
        """The first look finds one only; the other comes then."""
        found = looked(name)
        if found is None:
            process.rows["b"] = 1
            loop.call_soon(process.snapshots.observe, EndpointAdded(Endpoint("b", "127.0.0.1:1")))
        return found

    loop = asyncio.get_running_loop()
    process.rows.row = row  # type: ignore[method-assign]
    await process.snapshots.restore()
    assert set(process.streams.resumed_from) == {"a", "b"}


async def test_endpoints_that_are_gone_are_not_waited_for_long(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_snapshot, "ARRIVAL", 0.0)
    await saved(place)
    process = Process(place)
    del process.rows["b"]
    await process.snapshots.restore()
    assert set(process.streams.resumed_from) == {"a"}
    process.streams.resumed("a")
    assert process.cached(1, 2, 3, 4) == [12.0, 0.0]


async def test_without_a_snapshot_all_is_learned(place: Path, log: pytest.LogCaptureFixture) -> None:
    process = Process(place)
    await process.snapshots.restore()
    assert process.streams.resumed_from == {}
    assert "there is no snapshot yet" in log.text


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _bent(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def _older(data: bytes) -> bytes:
    return data.replace(b"picker-blocks\x00\x02", b"picker-blocks\x00\x01")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_cut, "damaged"),
        (_bent, "damaged"),
        (_older, "another version"),
        (lambda data: b"", "not a snapshot"),
        (lambda data: b"#!/bin/sh\n", "not a snapshot"),
        (lambda data: data + bytes(BUDGET + (2 << 20)), "larger than exact.budget_bytes"),
    ],
)
async def test_a_snapshot_with_something_wrong_is_named_and_ignored(
    place: Path, log: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes], complaint: str
) -> None:
    await saved(place)
    await asyncio.to_thread(_rewrite, place, spoil)
    process = Process(place)
    await process.snapshots.restore()
    assert process.streams.resumed_from == {}
    assert process.exact.index.blocks == 0
    (warning,) = [record for record in log.records if record.levelno == logging.WARNING]
    assert complaint in warning.message
    assert str(place) in warning.message


def _rewrite(place: Path, spoil: Callable[[bytes], bytes]) -> None:
    place.write_bytes(spoil(place.read_bytes()))


async def test_a_snapshot_of_another_key_or_tokenizer_is_named_and_ignored(
    place: Path, log: pytest.LogCaptureFixture
) -> None:
    await saved(place)
    await Process(place, secret=b"t" * 32).snapshots.restore()
    await Process(place, fingerprint=b"g").snapshots.restore()
    assert "another secret" in log.text
    assert "another tokenizer" in log.text


async def test_a_folder_in_its_place_is_named_and_ignored(place: Path, log: pytest.LogCaptureFixture) -> None:
    await asyncio.to_thread(place.mkdir)
    process = Process(place)
    await process.snapshots.restore()
    assert "Is a directory" in log.text
    process.learn(1)
    assert not await process.snapshots.save()
    assert "no snapshot was saved: Is a directory" in log.text


# --- writing -----------------------------------------------------------------------------------------------


async def test_streams_that_cannot_be_relied_on_are_not_saved(place: Path) -> None:
    process = Process(place)
    process.learn(1, 2)
    process.learn(1, row=1)
    process.exact.apply(1, EventsChanged("b", EventState.SUSPECT, "why"))
    assert await process.snapshots.save()
    after = Process(place)
    await after.snapshots.restore()
    assert set(after.streams.resumed_from) == {"a"}


async def test_nothing_is_saved_while_facts_are_under_way(
    place: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_snapshot, "SETTLE", 0.01)
    process = Process(place, idle=lambda: False)
    assert not await process.snapshots.save()
    assert "faster than they can be worked on" in log.text


async def test_what_was_copied_while_endpoints_came_or_went_is_copied_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(place)
    process.learn(1, 2, 3)
    times: list[int] = []

    def interrupted(index: PreciseIndex, names: Mapping[int, str], note: bytes) -> Iterator[bytes]:
        for at, piece in enumerate(copied(index, names, note)):
            if at == 1 and not times:
                times.append(at)
                process.snapshots.observe(EndpointRemoved("c"))
            yield piece

    monkeypatch.setattr(kv_snapshot, "copied", interrupted)
    assert await process.snapshots.save()
    assert process.streams.quiets == 2


async def test_a_pool_that_never_rests_is_not_saved(
    place: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(place)

    def interrupted(index: PreciseIndex, names: Mapping[int, str], note: bytes) -> Iterator[bytes]:
        process.snapshots.observe(EndpointRemoved("c"))
        yield b""

    monkeypatch.setattr(kv_snapshot, "copied", interrupted)
    assert not await process.snapshots.save()
    assert "come and go all the time" in log.text


def test_a_file_is_replaced_at_once_and_is_its_owners_alone(place: Path) -> None:
    write(place, [b"old"])
    place.with_name("snapshot.new").write_bytes(b"left behind by one that died")
    assert write(place, [b"ne", b"w"]) == 3
    assert place.read_bytes() == b"new"
    assert [path.name for path in place.parent.iterdir()] == ["snapshot"]
    assert place.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_last_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, [b"old"])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(place, [b"new"])
    assert place.read_bytes() == b"old"


def test_a_key_is_made_once_for_its_owner_alone(place: Path) -> None:
    key = read_key(place)
    assert len(key) == 32
    assert read_key(place) == key
    assert place.with_name("snapshot.key").stat().st_mode & 0o777 == 0o600


def test_a_key_that_cannot_be_used_is_an_error_of_usage(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"exact\.snapshot: cannot use .*nowhere.*No such file"):
        read_key(place / "nowhere" / "snapshot")
    place.with_name("snapshot.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"no key of 32 bytes"):
        read_key(place)


# --- streams -----------------------------------------------------------------------------------------------


def batch(number: int) -> bytes:
    return encode_batch(float(number), [Stored((number,), None, (1, 1), 2)], 0)


def marked(last: int, secret: bytes = b"") -> Mark:
    """Where a stream that has seen batches up to `last` has got to."""
    stream = Stream("a", secret=secret)
    stream.connected(replay=False, now=0.0)
    for number in range(last + 1):
        stream.receive(number, batch(number), now=0.0)
    mark = stream.mark()
    assert mark is not None
    return mark


def resumed(mark: Mark, secret: bytes = b"", *, replay: bool = True) -> Stream:
    stream = Stream("a", secret=secret)
    stream.resume(mark)
    stream.connected(replay=replay, now=0.0)
    return stream


def test_a_stream_goes_on_from_a_mark_whose_last_batch_the_engine_replays() -> None:
    stream = resumed(marked(3))
    assert stream.wants == 3
    assert stream.replayed(3, batch(3), now=0.0) == [Resumed("a")]
    (fact,) = stream.replayed(4, batch(4), now=0.0)
    assert isinstance(fact, BlocksStored)
    stream.replay_ended(complete=True, now=0.0)
    assert (stream.state, stream.stats.batches) == (EventState.WHOLE, 1)


@pytest.mark.parametrize("answer", [(3, batch(9)), (5, batch(5))])
def test_a_stream_of_another_engine_does_not_go_on(answer: tuple[int, bytes]) -> None:
    stream = resumed(marked(3))
    assert stream.replayed(*answer, now=0.0) == []
    said = stream.replay_ended(complete=True, now=0.0)
    assert Resumed("a") not in said
    assert stream.wants == 0


def test_digests_in_marks_are_of_their_secret() -> None:
    assert marked(3, b"one").digest != marked(3, b"two").digest
    stream = resumed(marked(3, b"one"), b"two")
    assert stream.replayed(3, batch(3), now=0.0) == []


def test_an_engine_that_replays_nothing_leaves_nothing_to_go_on_from() -> None:
    stream = Stream("a")
    stream.resume(marked(3))
    (said,) = stream.connected(replay=False, now=0.0)
    assert isinstance(said, EventsChanged)
    assert (said.state, "picker was away" in said.reason) == (EventState.PARTIAL, True)


def test_a_stream_without_a_batch_or_without_trust_has_no_mark() -> None:
    stream = Stream("a")
    assert stream.mark() is None
    stream.connected(replay=False, now=0.0)
    assert stream.mark() is None
    stream.receive(0, batch(0), now=0.0)
    assert stream.mark() is not None
    stream.absent("gone")
    assert stream.mark() is None
