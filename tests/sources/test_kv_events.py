from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from dead_port import dead_port
from picker.sources import kv_stream
from picker.sources.kv_events import TURN_MESSAGES, KvEventSource
from picker.sources.kv_place import Where, configured, labelled, locate
from picker.sources.kv_stream import BAD_IN_A_ROW, DISTRUST, REPLAY_COOLDOWN, Resumed, Said, Stream
from picker.sources.scrape import FetchFailure, FetchResult
from picker.types import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    Endpoint,
    EndpointAdded,
    EndpointRemoved,
    EventsChanged,
    EventState,
    Fact,
)
from picker.wire.kv_events import Cleared, Event, Removed, Stored, encode_batch

WHOLE, PARTIAL, SUSPECT, ABSENT = EventState.WHOLE, EventState.PARTIAL, EventState.SUSPECT, EventState.ABSENT


def block(number: int, *, tokens: int = 2) -> Stored:
    return Stored((number,), None, (1,) * tokens, 2)


def batch(number: int, *events: Event, ts: float | None = None, rank: int | None = 0) -> bytes:
    """Batch `number` of an engine, which stores the block of that number unless told otherwise."""
    return encode_batch(float(number) if ts is None else ts, events or (block(number),), rank)


def told(facts: Iterable[Fact | Resumed]) -> list[object]:
    """Facts in short: states, and numbers of blocks stored; minus for removed."""
    short: list[object] = []
    for fact in facts:
        match fact:
            case EventsChanged(_, state, _):
                short.append(state)
            case BlocksStored(hashes=hashes):
                short += hashes
            case BlocksRemoved(hashes=hashes):
                short += [-each for each in hashes]
            case _:
                short.append("cleared")
    return short


@dataclass
class Engine:
    """An engine's side: numbers its batches, keeps the last `kept` of them, replays what it is asked for.

    deaf: whether replays go unanswered. sends: how many replies, the end marker among them, get through to one request,
    as with a ROUTER whose queue is full; None: all.
    """

    kept: int = 10_000
    deaf: bool = False
    sends: int | None = None
    epoch: float = 0.0
    next: int = 0
    buffer: list[tuple[int, bytes]] = field(default_factory=list)

    def publish(self, *events: Event) -> tuple[int, bytes]:
        made = (self.next, batch(self.next, *events, ts=self.epoch + self.next))
        self.buffer = [*self.buffer, made][-self.kept :]
        self.next += 1
        return made

    def restart(self) -> None:
        self.next, self.buffer, self.epoch = 0, [], self.epoch + 1e6


class Subscriber:
    """A stream and what it said, at a time that is told."""

    def __init__(self, engine: Engine, *, replay: bool = True) -> None:
        self.engine = engine
        self.replay = replay
        self.stream = Stream("a")
        self.now = 0.0
        self.said: list[Said] = []
        self.asked: list[int] = []

    def connect(self) -> None:
        self.said += self.stream.connected(replay=self.replay, now=self.now)
        self.serve()

    def receive(self, seq: int, payload: bytes) -> None:
        self.said += self.stream.receive(seq, payload, now=self.now)
        self.serve()

    def publish(self, *events: Event) -> None:
        self.receive(*self.engine.publish(*events))

    def serve(self) -> None:
        """Let the engine answer what is asked for."""
        while (start := self.stream.wants) is not None:
            self.asked.append(start)
            assert len(self.asked) < 100
            replies = [] if self.engine.deaf else [each for each in self.engine.buffer if each[0] >= start]
            for seq, payload in replies[: self.engine.sends]:
                self.said += self.stream.replayed(seq, payload, now=self.now)
            room = self.engine.sends
            complete = not self.engine.deaf and (room is None or len(replies) < room)
            self.said += self.stream.replay_ended(complete=complete, now=self.now)

    def news(self) -> list[object]:
        """What it said since the last look, in short."""
        said, self.said = told(self.said), []
        return said

    @property
    def reason(self) -> str:
        return [fact.reason for fact in self.said if isinstance(fact, EventsChanged)][-1]


def subscriber(*, replay: bool = True, published: int = 0, **engine: int | bool) -> Subscriber:
    """A subscriber to an engine that has published already, not yet connected."""
    made = Subscriber(Engine(**engine), replay=replay)  # type: ignore[arg-type]
    for _ in range(published):
        made.engine.publish()
    return made


def following(*, replay: bool = True, published: int = 0, **engine: int | bool) -> Subscriber:
    """A subscriber that is connected and up to date."""
    made = subscriber(replay=replay, published=published, **engine)
    made.connect()
    made.said, made.asked = [], []
    return made


# --- the stream --------------------------------------------------------------------------------------------


def test_who_joins_late_learns_everything_from_the_replay() -> None:
    late = subscriber(published=3)
    late.connect()
    late.publish()
    assert late.news() == [WHOLE, 0, 1, 2, 3]
    assert late.asked == [0]


def test_who_joins_an_engine_that_has_sent_nothing_misses_nothing() -> None:
    early = subscriber()
    early.connect()
    assert early.news() == [WHOLE]
    early.publish()
    assert early.news() == [0]


def test_batches_replayed_and_live_count_once() -> None:
    late = subscriber(published=3)
    late.connect()
    for seq, payload in late.engine.buffer:
        late.receive(seq, payload)
    late.publish()
    assert late.news() == [WHOLE, 0, 1, 2, 3]
    assert late.stream.stats.repeated == 3
    assert late.stream.stats.batches == 4


def test_a_replay_that_begins_later_is_partial() -> None:
    late = subscriber(published=5, kept=2)
    late.connect()
    assert late.news() == [PARTIAL, 3, 4]


def test_without_replays_it_is_partial_until_a_first_batch() -> None:
    early = subscriber(replay=False)
    early.connect()
    assert early.news() == [PARTIAL]
    early.publish()
    assert early.news() == [WHOLE, 0]
    late = subscriber(replay=False, published=4)
    late.connect()
    late.publish()
    assert late.news() == [PARTIAL, 4]


def test_a_replay_without_an_answer_is_partial_and_not_asked_again_soon() -> None:
    late = subscriber(published=3, deaf=True)
    late.connect()
    assert late.news() == [PARTIAL]
    late.publish()
    late.engine.publish()
    late.publish()
    assert late.news() == [3, SUSPECT, PARTIAL, 5]
    assert late.asked == [0]
    late.now += REPLAY_COOLDOWN
    late.engine.deaf = False
    late.engine.publish()
    late.publish()
    assert late.news() == [6, 7]
    assert late.asked == [0, 6]


def test_a_cleared_cache_makes_a_partial_stream_whole() -> None:
    late = following(replay=False, published=4)
    late.publish(Removed((1,)), Cleared(), block(9))
    assert late.news() == [-1, "cleared", WHOLE, 9]
    late.publish(Cleared())
    assert late.news() == ["cleared"]


def test_a_gap_is_filled_by_a_replay_in_order() -> None:
    follower = following(published=2)
    follower.engine.publish()
    follower.engine.publish()
    follower.publish()
    assert follower.news() == [2, 3, 4]
    assert follower.asked == [2]
    assert follower.stream.stats.gaps == 1


def test_a_gap_that_cannot_be_filled_voids_what_was_learned() -> None:
    follower = following(published=2, kept=1)
    follower.engine.publish()
    follower.engine.publish()
    follower.publish()
    assert "before number 4" in follower.reason
    assert follower.news() == [SUSPECT, PARTIAL, 4]


def test_a_gap_without_replays_voids_what_was_learned() -> None:
    follower = following(replay=False)
    follower.publish()
    follower.engine.publish()
    follower.news()
    follower.publish()
    assert follower.reason == "1 batches before number 2 were lost"
    assert follower.news() == [SUSPECT, PARTIAL, 2]


@pytest.mark.parametrize("sends", [2, 3, 4])
def test_a_replay_that_loses_its_end_is_asked_for_again(sends: int) -> None:
    late = subscriber(published=7, sends=sends)
    late.connect()
    assert late.news()[:8] == [WHOLE, 0, 1, 2, 3, 4, 5, 6]
    assert late.asked[:2] == [0, sends]


def test_holes_in_a_replay_are_asked_for_again() -> None:
    engine = Engine()
    frames = [engine.publish() for _ in range(6)]
    stream = Stream("a")
    said = stream.connected(replay=True, now=0.0)
    for seq, payload in [frames[0], frames[1], frames[4], frames[5]]:
        said += stream.replayed(seq, payload, now=0.0)
    assert stream.spoiled
    said += stream.replay_ended(complete=False, now=0.0)
    wanted = [stream.wants]
    for seq, payload in frames[2:]:
        said += stream.replayed(seq, payload, now=0.0)
    said += stream.replay_ended(complete=True, now=0.0)
    assert [*wanted, stream.wants] == [2, None]
    assert told(said) == [WHOLE, 0, 1, 2, 3, 4, 5]


def test_an_engine_that_is_never_caught_up_with_is_joined_where_it_is() -> None:
    follower = following(published=1, sends=1)
    for _ in range(100):
        follower.engine.publish()
    follower.publish()
    assert len(follower.asked) == kv_stream.MAX_ROUNDS
    assert follower.news()[-3:] == [SUSPECT, PARTIAL, 101]


def test_numbers_that_begin_again_are_a_restart() -> None:
    follower = following(published=5)
    follower.publish()
    follower.news()
    follower.engine.restart()
    follower.publish()
    assert follower.news() == ["cleared", WHOLE, 0]
    follower.publish()
    assert follower.news() == [1]
    assert follower.stream.stats.restarts == 1


def test_a_restart_is_seen_by_the_batchs_time_when_nothing_live_came_before() -> None:
    follower = following(published=5)
    follower.engine.restart()
    follower.publish()
    assert follower.news() == ["cleared", WHOLE, 0]


def test_a_restart_without_replays_begins_with_what_is_seen() -> None:
    follower = following(replay=False, published=5)
    follower.publish()
    follower.engine.restart()
    follower.news()
    follower.engine.publish()
    follower.publish()
    assert follower.news() == ["cleared", PARTIAL, 1]


def test_a_connection_to_the_same_engine_goes_on_where_it_was() -> None:
    follower = following(published=5)
    follower.engine.publish()
    follower.connect()
    assert follower.asked == [4]
    follower.publish()
    assert follower.news() == [5, 6]


@pytest.mark.parametrize("published", [1, 5, 6, 9])
def test_a_connection_to_a_restarted_engine_begins_anew_whatever_its_numbers(published: int) -> None:
    follower = following(published=5)
    follower.engine.restart()
    for _ in range(published):
        follower.engine.publish()
    follower.connect()
    assert follower.news() == ["cleared", WHOLE, *range(published)]


def test_a_connection_again_without_replays_cannot_tell_what_was_missed() -> None:
    follower = following(replay=False, published=5)
    follower.publish()
    follower.news()
    follower.connect()
    assert "interrupted" in follower.reason
    assert follower.news() == [PARTIAL]


def test_a_connection_again_whose_replay_is_deaf_cannot_tell_either() -> None:
    follower = following(published=5)
    follower.engine.deaf = True
    follower.connect()
    assert follower.news() == [PARTIAL]
    follower.publish()
    assert follower.news() == [5]


def test_without_a_connection_all_is_void_and_said_once() -> None:
    follower = following(published=2)
    said = follower.stream.absent("refused") + follower.stream.absent("refused") + follower.stream.absent("other")
    assert said == [EventsChanged("a", ABSENT, "refused"), EventsChanged("a", ABSENT, "other")]
    follower.connect()
    assert follower.news() == [WHOLE, 0, 1]


def test_an_unreadable_batch_is_read_from_the_replay() -> None:
    follower = following(published=1)
    seq, _ = follower.engine.publish()
    follower.receive(seq, b"\xc1")
    follower.publish()
    assert follower.news() == [1, 2]
    assert follower.stream.stats.bad == 1


def test_unreadable_batches_in_a_row_make_the_stream_suspect() -> None:
    follower = following(replay=False, published=1)
    for seq in range(BAD_IN_A_ROW):
        assert follower.news() == []
        follower.receive(1 + seq, b"\xc1")
    assert follower.reason.startswith("3 batches in a row could not be read: Not a batch")
    assert follower.news() == [SUSPECT]
    follower.receive(1 + BAD_IN_A_ROW, batch(4))
    assert follower.news() == []
    follower.now += DISTRUST
    follower.receive(2 + BAD_IN_A_ROW, batch(5))
    assert follower.news() == [PARTIAL, 5]


def test_unreadable_batches_apart_are_only_counted() -> None:
    follower = following(replay=False)
    for seq in range(0, 12, 2):
        follower.receive(seq, b"\xc1")
        follower.receive(seq + 1, batch(seq + 1))
    assert SUSPECT not in follower.news()
    assert follower.stream.stats.bad == 6


def test_replays_that_hold_the_same_rubbish_are_not_asked_for_forever() -> None:
    follower = following()
    for seq in range(20):
        follower.engine.buffer.append((seq, b"\xc1"))
        follower.receive(seq, b"\xc1")
    assert len(follower.asked) <= 2
    assert follower.news() == [SUSPECT]


def test_tokens_that_do_not_fill_their_blocks_make_the_stream_suspect() -> None:
    follower = following()
    follower.publish(block(1), block(2, tokens=3))
    assert follower.reason == "an event has 3 tokens in 1 blocks of 2"
    assert follower.news() == [SUSPECT]
    follower.publish()
    assert follower.news() == []
    assert follower.stream.stats.dropped == 2


def test_who_lies_again_is_believed_later_each_time() -> None:
    follower = following()
    for doubts in range(8):
        follower.publish(block(2, tokens=3))
        assert follower.news()[-1] is SUSPECT
        pause = min(DISTRUST * 2**doubts, kv_stream.MAX_DISTRUST)
        follower.now += pause - 1.0
        follower.publish()
        assert follower.news() == []
        follower.now += 1.0
        follower.publish()
        assert follower.news()[0] is PARTIAL


def test_another_ranks_batches_are_counted_and_nothing_else() -> None:
    stream = Stream("a", rank=1)
    said = stream.connected(replay=False, now=0.0)
    for seq, rank in enumerate([1, 0, None, 1]):
        said += stream.receive(seq, batch(seq, rank=rank), now=0.0)
    assert told(said) == [PARTIAL, WHOLE, 0, 2, 3]
    assert stream.stats.misdirected == 1


def test_the_first_rank_is_kept_where_none_is_known() -> None:
    stream = Stream("a")
    said = stream.connected(replay=False, now=0.0)
    for seq, rank in enumerate([2, 0, 2]):
        said += stream.receive(seq, batch(seq, rank=rank), now=0.0)
    assert told(said) == [PARTIAL, WHOLE, 0, 2]


def test_counts_follow_what_happens() -> None:
    stream = Stream("a")
    stream.connected(replay=False, now=0.0)
    stream.receive(0, batch(0, block(1), block(2), Removed((1,)), ts=10.0), now=0.0, wall=10.25)
    stats = stream.stats
    assert (stats.batches, stats.stored, stats.removed, stats.last_seq, stats.lag) == (1, 2, 1, 0, 0.25)


payloads = st.one_of(
    st.binary(max_size=40),
    st.integers(0, 6).map(batch),
    st.just(batch(1, Cleared())),
    st.just(batch(1, block(3, tokens=5))),
    st.integers(0, 2).map(lambda rank: batch(4, rank=rank)),
)
numbers = st.integers(0, 8) | st.integers(0, (1 << 64) - 1)
steps = st.one_of(
    st.tuples(st.just("live"), numbers, payloads),
    st.tuples(st.just("replayed"), numbers, payloads),
    st.tuples(st.just("end"), st.booleans()),
    st.tuples(st.just("connected"), st.booleans()),
    st.tuples(st.just("absent")),
    st.tuples(st.just("later"), st.floats(0, 100)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=40))
def test_nothing_an_engine_sends_breaks_the_stream(steps: Sequence[tuple[object, ...]]) -> None:
    stream, now, state = Stream("a"), 0.0, ABSENT
    for step in steps:
        said: list[Said] = []
        match step:
            case ("live", int(seq), bytes(payload)) if stream.wants is None and state is not ABSENT:
                said = stream.receive(seq, payload, now=now)
            case ("replayed", int(seq), bytes(payload)):
                said = stream.replayed(seq, payload, now=now)
            case ("end", bool(complete)):
                said = stream.replay_ended(complete=complete, now=now)
            case ("connected", bool(replay)):
                said = stream.connected(replay=replay, now=now)
            case ("later", float(seconds)):
                now += seconds
            case ("absent",):
                said = stream.absent("gone")
        for fact in said:
            assert fact.name == "a"
            if isinstance(fact, EventsChanged):
                state = fact.state
            assert isinstance(fact, EventsChanged | CacheCleared) or state in (WHOLE, PARTIAL)
        assert len(msgspec.msgpack.encode(stream._pending)) < 1000


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_lost_on_the_way_never_leaves_a_block_that_is_gone(data: st.DataObject) -> None:
    """Stores and removes at random, loses live batches and connections: a live state means the engine's own content."""
    follower = subscriber(published=data.draw(st.integers(0, 3)), kept=data.draw(st.integers(1, 8)))
    follower.connect()
    cache: set[int] = set(range(follower.engine.next))
    for number in range(data.draw(st.integers(0, 30))):
        action = data.draw(st.sampled_from(["store", "remove", "clear", "restart", "reconnect"]))
        lost = data.draw(st.booleans())
        if action == "restart":
            follower.engine.restart()
            cache = set()
        if action in ("restart", "reconnect"):
            follower.connect()
            continue
        gone = sorted(cache)[:1]
        event: Event = Cleared() if action == "clear" else Removed(tuple(gone)) if gone else block(100 + number)
        event = block(100 + number) if action == "store" else event
        cache = cache | {100 + number} if isinstance(event, Stored) else cache - set(gone)
        cache = set() if isinstance(event, Cleared) else cache
        made = follower.engine.publish(event)
        if not lost:
            follower.receive(*made)
    follower.publish(block(1000))
    known, state = replayed_by_index(follower.said)
    assert known <= cache | {1000}
    assert known == cache | {1000} or state is not WHOLE


def replayed_by_index(said: Sequence[Said]) -> tuple[set[int], EventState]:
    """What an index that applies these facts holds in the end."""
    known: set[int] = set()
    state = ABSENT
    for fact in said:
        match fact:
            case EventsChanged(_, state, _):
                known = set()
            case CacheCleared():
                known = set()
            case BlocksStored(hashes=hashes):
                known |= set(hashes)
            case BlocksRemoved(hashes=hashes):
                known -= set(hashes)
    return known, state


# --- where an engine publishes -----------------------------------------------------------------------------


def sources(**by_rank: str) -> bytes:
    """As vLLM answers GET /kv_event_sources: r0="5557 5558" is rank 0 with these ports."""
    answer = {}
    for key, ports in by_rank.items():
        events, _, replay = ports.partition(" ")
        answer[key[1:]] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{events}",
            "replay_endpoint": f"tcp://*:{replay}" if replay else None,
            "buffer_steps": 10000,
            "hwm": 100000,
            "max_queue_size": 100000,
            "topic": "kv@a",
        }
    return msgspec.json.encode(answer)


def at(address: str, rank: int | None = None, **labels: str) -> Endpoint:
    return Endpoint("a", address, rank=rank, labels={key.replace("_", "-"): value for key, value in labels.items()})


def test_a_wildcard_is_the_endpoints_own_host() -> None:
    assert locate(sources(r0="5557 5558"), at("10.0.0.1:8000")) == Where(
        "tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558", 0
    )
    assert locate(sources(r0="5557"), at("[fd00::1]:8000")) == Where("tcp://[fd00::1]:5557", None, 0)


def test_a_rank_has_its_own_ports() -> None:
    body = sources(r0="5557 5600", r1="5558 5601")
    assert locate(body, at("h:8000", rank=1)) == Where("tcp://h:5558", "tcp://h:5601", 1)


@pytest.mark.parametrize(
    ("body", "rank", "reason"),
    [
        (b"{}", None, "publishes no KV events"),
        (b'{"0":{"publisher":"null","endpoint":"tcp://*:1"}}', None, "publishes no KV events"),
        (sources(r0="1", r1="2"), None, "2 data-parallel ranks: list each"),
        (sources(r0="1", r1="2"), 3, "for ranks 0, 1, not for rank 3"),
        (b'{"0":{"endpoint":"ipc:///tmp/x"}}', None, "no tcp://host:port"),
        (b'{"0":{"endpoint":"tcp://*:0"}}', None, "no tcp://host:port"),
    ],
)
def test_why_there_are_no_events_is_said_plainly(body: bytes, rank: int | None, reason: str) -> None:
    said = locate(body, at("h:8000", rank=rank))
    assert isinstance(said, str)
    assert reason in said


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"a":{}}', b'{"0":5}', b"[" * 9999])
def test_another_answer_is_not_understood(body: bytes) -> None:
    assert locate(body, at("h:8000")) is None


def test_a_template_is_shifted_by_the_rank() -> None:
    found = configured(at("h:8000", rank=2), "tcp://{host}:5557", "tcp://{host}:5600")
    assert found == Where("tcp://h:5559", "tcp://h:5602", 2)
    assert configured(at("h:8000"), "tcp://{host}:5557", None) == Where("tcp://h:5557")


def test_a_label_says_where_as_it_stands() -> None:
    assert labelled(at("h:8000", rank=2, kv_events="tcp://n:9")) == Where("tcp://n:9", None, 2)
    assert labelled(at("h:8000")) is None


# --- sockets -----------------------------------------------------------------------------------------------


class Publisher:
    """An engine's sockets on loopback: PUB, and ROUTER for replays. mute: replays stay unanswered."""

    def __init__(self, context: zmq.asyncio.Context, *, mute: bool = False, topic: bool = True) -> None:
        self.pub = context.socket(zmq.XPUB)
        self.router = context.socket(zmq.ROUTER)
        self.ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self.pub, self.router)]
        self.mute = mute
        self.topic = [b"kv@a"] if topic else []
        self.kept: deque[tuple[bytes, bytes]] = deque(maxlen=10_000)
        self.asked: list[int] = []

    async def subscribed(self) -> None:
        await self.pub.recv()

    async def send(self, seq: int, payload: bytes, *, lose: bool = False) -> None:
        self.kept.append((seq.to_bytes(8, "big"), payload))
        if not lose:
            await self.pub.send_multipart([b"kv@a", *self.kept[-1]])

    async def serve(self) -> None:
        while not self.router.closed:
            try:
                client, empty, start = await self.router.recv_multipart()
            except zmq.ZMQError:  # closed meanwhile
                return
            self.asked.append(int.from_bytes(start, "big"))
            if self.mute:
                continue
            for seq, payload in self.kept:
                if seq >= start:
                    await self.router.send_multipart([client, empty, *self.topic, seq, payload])
            await self.router.send_multipart([client, empty, *[b""] * len(self.topic), b"\xff" * 8, b""])

    def close(self) -> None:
        self.pub.close(linger=0)
        self.router.close(linger=0)


class Scene:
    """A running source, its facts, and engines by address."""

    def __init__(self, **settings: float) -> None:
        self.facts: list[Fact] = []
        self.changed = asyncio.Event()
        self.answers: dict[str, FetchResult] = {}
        self.paused: list[float] = []
        self.going_on = asyncio.Event()  # pauses end at once, unless a test clears this
        self.going_on.set()
        self.context = zmq.asyncio.Context()
        self.group: asyncio.TaskGroup | None = None
        self.publishers: list[Publisher] = []
        self.serving: list[asyncio.Task[None]] = []
        self.source = KvEventSource(
            self.fetch,
            clock=time.monotonic,
            rng=random.Random(7),
            sleep=self.sleep,
            **{"connect_timeout": 5.0, "replay_timeout": 5.0, **settings},  # type: ignore[arg-type]
        )

    async def fetch(self, url: str) -> FetchResult:
        address = url.removeprefix("http://").partition("/")[0]
        return self.answers.get(address, FetchResult(failure=FetchFailure.REFUSED))

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.paused.append(seconds)
            self.changed.set()
            await self.going_on.wait()
        await asyncio.sleep(0)

    def emit(self, fact: Fact) -> None:
        self.facts.append(fact)
        self.changed.set()

    def publisher(self, address: str, **settings: bool) -> Publisher:
        made = Publisher(self.context, **settings)
        self.publishers.append(made)
        assert self.group is not None
        self.serving.append(self.group.create_task(made.serve()))
        self.answers[address] = FetchResult(200, sources(r0=f"{made.ports[0]} {made.ports[1]}"))
        return made

    async def pause(self) -> None:
        """Wait until the source has paused once more."""
        async with asyncio.timeout(60):
            before = len(self.paused)
            while len(self.paused) == before:
                self.changed.clear()
                await self.changed.wait()

    async def until(self, *short: object, name: str | None = None) -> None:
        """Wait for these facts, and no others."""
        async with asyncio.timeout(60):
            while len(self.told(name)) < len(short):
                self.changed.clear()
                await self.changed.wait()
        assert self.told(name) == list(short)

    async def counted(self, enough: Callable[[], bool]) -> None:
        """Let the loop go on until so much was counted that no fact tells of."""
        async with asyncio.timeout(60):
            while not enough():  # noqa: ASYNC110
                await asyncio.sleep(0)

    def told(self, name: str | None = None) -> list[object]:
        return told(fact for fact in self.facts if name in (None, getattr(fact, "name", None)))

    @property
    def reason(self) -> str:
        return [fact.reason for fact in self.facts if isinstance(fact, EventsChanged)][-1]


@contextlib.asynccontextmanager
async def scene(**settings: float) -> AsyncIterator[Scene]:
    made = Scene(**settings)
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(made.source.run(made.emit))
            await asyncio.sleep(0)
            made.group = group
            yield made
            for task in [running, *made.serving]:
                task.cancel()
    finally:
        for publisher in made.publishers:
            publisher.close()
        made.context.destroy(linger=0)


HERE = "127.0.0.1:8000"


@pytest.mark.parametrize("topic", [True, False])
async def test_what_was_sent_before_and_after_joining_arrives_in_order(topic: bool) -> None:
    async with scene() as running:
        engine = running.publisher(HERE, topic=topic)
        for seq in range(3):
            await engine.send(seq, batch(seq))
        running.source.observe(EndpointAdded(at(HERE)))
        await engine.subscribed()
        await running.until(WHOLE, 0, 1, 2)
        await engine.send(3, batch(3))
        await running.until(WHOLE, 0, 1, 2, 3)
        await engine.send(4, batch(4), lose=True)
        await engine.send(5, batch(5))
        await running.until(WHOLE, 0, 1, 2, 3, 4, 5)
        assert (engine.asked[0], engine.asked[-1]) == (0, 4)
        assert running.source.stats["a"].gaps == 1


async def test_a_silent_replay_ends_in_a_partial_stream() -> None:
    async with scene(replay_timeout=0.02) as running:
        engine = running.publisher(HERE, mute=True)
        running.source.add(at(HERE))
        await engine.subscribed()
        await running.until(PARTIAL)
        await engine.send(7, batch(7))
        await running.until(PARTIAL, 7)


async def test_rubbish_of_one_engine_does_not_touch_another() -> None:
    async with scene() as running:
        good, bad = running.publisher(HERE), running.publisher("127.0.0.1:8001")
        running.source.add(Endpoint("a", HERE))
        running.source.add(Endpoint("b", "127.0.0.1:8001"))
        await good.subscribed()
        await bad.subscribed()
        await running.until(WHOLE, name="a")
        await running.until(WHOLE, name="b")
        for frames in ([b""], [b"", b"1", b"2"], [b"", b"\x00" * 8, b"\xc1"], [b"x"] * 9):
            await bad.pub.send_multipart(frames)
        for seq in range(1, 5):
            await bad.send(seq, b"\x93 rubbish")
        await good.send(0, batch(0))
        await running.until(WHOLE, 0, name="a")
        await running.until(WHOLE, SUSPECT, PARTIAL, SUSPECT, name="b")
        await running.counted(lambda: running.source.stats["b"].bad >= 7)


async def test_a_flood_leaves_the_loop_to_others() -> None:
    async with scene() as running:
        engine = running.publisher(HERE)
        running.source.add(at(HERE))
        await engine.subscribed()
        await running.until(WHOLE)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        assert running.group is not None
        other = running.group.create_task(others())
        for seq in range(1000):
            await engine.send(seq, batch(seq))
        await running.until(WHOLE, *range(1000))
        other.cancel()
        assert turns > 1000 / TURN_MESSAGES


async def test_an_engine_that_cannot_be_asked_is_absent_and_looked_for_again() -> None:
    async with scene() as running:
        running.going_on.clear()
        running.source.add(at(HERE))
        await running.until(ABSENT)
        assert running.reason == "it does not say where its KV events are (connection refused)"
        engine = running.publisher(HERE)
        running.going_on.set()
        await engine.subscribed()
        await running.until(ABSENT, WHOLE)


async def test_a_port_where_nobody_listens_is_absent() -> None:
    with dead_port() as address:
        async with scene() as running:
            running.going_on.clear()
            running.source.add(at(HERE, kv_events=f"tcp://{address}"))
            await running.until(ABSENT)
            assert running.reason == f"no publisher answers at tcp://{address}"


async def test_pauses_grow_and_differ() -> None:
    async with scene() as running:
        running.source.add(at(HERE))
        for _ in range(9):
            await running.pause()
    assert running.paused[6] > 30
    assert all(pause <= 60 * 1.2 for pause in running.paused)
    assert len(set(running.paused[6:9])) == 3


async def test_a_broken_connection_is_made_again() -> None:
    async with scene() as running:
        engine = running.publisher(HERE)
        await engine.send(0, batch(0))
        running.source.add(at(HERE))
        await engine.subscribed()
        while not running.source.stats["a"].replays:  # noqa: ASYNC110 - its end marker makes no fact
            await asyncio.sleep(0)
        running.going_on.clear()
        engine.close()
        await running.until(WHOLE, 0, ABSENT)
        assert "broke" in running.reason
        again = running.publisher(HERE)
        await again.send(0, batch(8))
        running.going_on.set()
        await again.subscribed()
        await running.until(WHOLE, 0, ABSENT, WHOLE, 8)


async def test_an_endpoint_that_left_is_heard_of_no_more() -> None:
    async with scene() as running:
        engine = running.publisher(HERE)
        running.source.observe(EndpointAdded(at(HERE)))
        await engine.subscribed()
        await running.until(WHOLE)
        running.source.observe(EndpointRemoved("a"))
        assert await engine.pub.recv() == b"\x00"
        await engine.send(0, batch(0))
        assert running.told() == [WHOLE]
        assert running.source.stats == {}


async def test_an_endpoint_that_moved_begins_anew_at_its_new_address() -> None:
    async with scene() as running:
        first, second = running.publisher(HERE), running.publisher("127.0.0.1:8001")
        running.source.add(at(HERE))
        await first.subscribed()
        await running.until(WHOLE)
        running.source.add(at(HERE))  # the same again
        running.source.add(at("127.0.0.1:8001"))
        await second.subscribed()
        await running.until(WHOLE, ABSENT, WHOLE)
