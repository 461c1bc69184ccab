"""Our end of HTTP/2 against the `h2` library at the other, and against peers that break the rules."""

import struct
from collections.abc import Callable, Iterable

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.wire import http2
from picker.wire.http2 import PREFACE, Connection, Drained, HalfClosed, Http2Error, Message, Opened, Reset

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


class Client:
    """The `h2` library as a gRPC client. `meet` lets both ends talk until neither has more to say."""

    def __init__(self, server: Connection, *, window: int | None = None) -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.heard: list[http2.Event] = []
        self.headers: dict[int, list[dict[str, str]]] = {}
        self.data: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.unacknowledged: dict[int, int] = {}
        self.pings = 0

    def meet(self) -> list[http2.Event]:
        """What the server has heard meanwhile."""
        new: list[http2.Event] = []
        while out := self.h2.data_to_send():
            new += self.server.receive(out)
            self._hear(self.server.take())
        self._hear(self.server.take())
        if out := self.h2.data_to_send():
            new += self.server.receive(out)
        self.heard += new
        return new

    def _hear(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    assert event.stream_id is not None
                    assert event.headers is not None
                    self.headers.setdefault(event.stream_id, []).append(dict(event.headers))  # type: ignore[arg-type]
                case h2.events.DataReceived():
                    self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                    self.unacknowledged[event.stream_id] = (
                        self.unacknowledged.get(event.stream_id, 0) + event.flow_controlled_length
                    )
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
                case h2.events.StreamReset():
                    self.resets[event.stream_id] = int(event.error_code)
                case h2.events.PingAckReceived():
                    self.pings += 1

    def open(self, path: str = PATH, *more: tuple[str, str]) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "ext-proc")]
        self.h2.send_headers(stream_id, [*pseudo, ("te", "trailers"), ("content-type", "application/grpc"), *more])
        return stream_id

    def say(self, stream_id: int, *messages: bytes, end: bool = False) -> None:
        self.h2.send_data(stream_id, b"".join(map(prefixed, messages)), end_stream=end)

    def acknowledge(self) -> None:
        """Give the server back the room of all data received."""
        for stream_id, size in self.unacknowledged.items():
            self.h2.acknowledge_received_data(size, stream_id)
        self.unacknowledged.clear()


@pytest.fixture
def client() -> Client:
    made = Client(Connection())
    made.meet()
    return made


# --- calls -------------------------------------------------------------------------------------------------


def test_a_call_goes_there_and_back(client: Client) -> None:
    call = client.open()
    client.say(call, b"one", b"", end=True)
    assert client.meet() == [Opened(call, PATH), Message(call, b"one"), Message(call, b""), HalfClosed(call)]
    assert client.server.send(call, b"reply")
    client.server.end(call)
    client.meet()
    head, trailers = client.headers[call]
    assert head == {":status": "200", "content-type": "application/grpc"}
    assert client.data[call] == prefixed(b"reply")
    assert trailers == {"grpc-status": "0"}
    assert call in client.ended
    assert client.server.open_streams == 0


def test_a_status_has_a_message_that_survives_any_text(client: Client) -> None:
    call = client.open()
    client.meet()
    client.server.end(call, 3, "50% of “x”\n")
    client.meet()
    assert client.headers[call][-1] == {"grpc-status": "3", "grpc-message": "50%25 of %E2%80%9Cx%E2%80%9D%0A"}


@given(st.data())
@settings(max_examples=30)
def test_it_does_not_matter_how_the_bytes_are_cut(data: st.DataObject) -> None:
    client = Client(Connection())
    call = client.open()
    client.say(call, b"first", b"second" * 100, end=True)
    sent = client.h2.data_to_send()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=20)))
    events: list[http2.Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        events += client.server.receive(sent[start:end])
    assert events == [Opened(call, PATH), Message(call, b"first"), Message(call, b"second" * 100), HalfClosed(call)]


def test_paths_are_read_whatever_other_headers_come_with_them() -> None:
    client = Client(Connection())
    paths = [PATH, "/grpc.health.v1.Health/Check", "/", "/" + "long" * 100, "/index.html", PATH]
    for number, path in enumerate(paths * 3):
        call = client.open(path, ("x-request-id", f"number {number}"), ("a-long-header", "v" * 300))
        assert client.meet() == [Opened(call, path)]
    assert client.h2.remote_settings[h2.settings.SettingCodes.HEADER_TABLE_SIZE] == 0


def test_calls_opened_before_the_settings_are_known_are_read_with_their_table() -> None:
    client = Client(Connection())
    calls = [client.open() for _ in range(5)]
    assert [event for event in client.meet() if isinstance(event, Opened)] == [Opened(call, PATH) for call in calls]
    assert client.meet() == []
    later = client.open()
    assert client.meet() == [Opened(later, PATH)]


def test_calls_do_not_mix(client: Client) -> None:
    first, second = client.open(), client.open()
    client.say(second, b"b")
    client.say(first, b"a")
    client.meet()
    for call in (first, second):
        client.server.send(call, str(call).encode())
    client.server.end(first)
    client.meet()
    assert client.data == {first: prefixed(b"1"), second: prefixed(str(second).encode())}
    assert client.ended == {first}


def test_a_reset_ends_a_call_and_what_is_sent_on_it_is_dropped(client: Client) -> None:
    call = client.open()
    client.meet()
    client.h2.reset_stream(call)
    assert client.meet() == [Reset(call)]
    assert client.server.send(call, b"too late")
    client.server.end(call)
    assert client.server.take() == b""
    assert client.server.open_streams == 0


def test_a_call_given_up_is_reset(client: Client) -> None:
    call = client.open()
    client.meet()
    client.server.cancel(call)
    client.meet()
    assert client.resets == {call: http2.CANCEL}


def test_what_crosses_the_end_of_a_call_is_ignored(client: Client) -> None:
    call = client.open()
    client.meet()
    client.server.end(call)
    client.say(call, b"crossing", end=True)
    assert client.meet() == []


def test_after_going_away_open_calls_go_on_and_new_ones_are_refused() -> None:
    client = Client(Connection())
    first = client.open()
    client.meet()
    second = client.open()
    client.server.go_away()
    refused = client.server.receive(client.h2.data_to_send())
    assert refused == []
    assert client.server.send(first, b"x")
    assert frames(client.server.take())[-2:-1] == [(http2.HEADERS, http2.END_HEADERS, first)]
    assert second > first


def test_a_call_that_ends_before_its_client_has_finished_is_closed_on_both_sides(client: Client) -> None:
    call = client.open()
    client.meet()
    client.server.end(call)
    client.meet()
    assert call in client.ended
    assert client.resets == {call: http2.NO_ERROR}


def test_pings_are_answered(client: Client) -> None:
    client.h2.ping(b"12345678")
    client.meet()
    assert client.pings == 1


def test_a_peer_that_is_asked_to_part_may_still_begin_calls(client: Client) -> None:
    before = client.open()
    client.meet()
    client.server.part()
    # The word has not arrived yet.
    client.open()
    crossing = client.h2.data_to_send()
    assert Opened(before + 2, PATH) in client.server.receive(crossing)
    client.meet()
    assert client.server.open_streams == 2


def test_a_ping_is_answered_by_bytes(client: Client) -> None:
    client.server.ping()
    sent = client.server.take()
    events = client.h2.receive_data(sent)
    assert [type(event).__name__ for event in events] == ["PingReceived"]
    assert client.h2.data_to_send()


def test_a_failure_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    client = Client(Connection(), window=10)
    client.meet()
    call = client.open()
    client.meet()
    assert not client.server.send(call, b"x" * 1000)
    client.server.end(call, 4, "too late")
    client.meet()
    assert client.headers[call][-1] == {"grpc-status": "4", "grpc-message": "too late"}
    assert client.server.open_streams == 0


# --- windows -----------------------------------------------------------------------------------------------


def pump(client: Client, call: int, data: bytes, read: Callable[[Message], None]) -> list[bytes]:
    """Send bytes as the window allows; the messages the server got. Fails when both ends wait for ever."""
    got: list[bytes] = []
    while True:
        room = min(client.h2.local_flow_control_window(call), client.h2.max_outbound_frame_size, len(data))
        if room:
            client.h2.send_data(call, data[:room])
            data = data[room:]
        for event in client.meet():
            if isinstance(event, Message):
                got.append(event.data)
                read(event)
        if not room:
            return got


def test_a_message_larger_than_the_window_gets_through(client: Client) -> None:
    call = client.open()
    client.meet()
    message = bytes(range(256)) * 20_000
    got = pump(client, call, prefixed(message), lambda event: client.server.consumed(call, event.data))
    assert got == [message]


def test_many_messages_get_through_to_one_who_reads(client: Client) -> None:
    call = client.open()
    client.meet()
    messages = [bytes([number % 256]) * 50_000 for number in range(100)]
    data = b"".join(map(prefixed, messages))
    assert pump(client, call, data, lambda event: client.server.consumed(call, event.data)) == messages


def test_a_peer_waits_for_one_who_does_not_read(client: Client) -> None:
    call = client.open()
    client.meet()
    unread: list[Message] = []
    messages = [b"x" * 50_000] * 100
    got = pump(client, call, b"".join(map(prefixed, messages)), unread.append)
    assert len(got) < 25
    for event in unread:
        client.server.consumed(call, event.data)
    client.meet()
    assert client.h2.local_flow_control_window(call) > 500_000


def test_messages_wait_for_the_peers_window_and_the_status_for_them() -> None:
    client = Client(Connection(), window=1000)
    call = client.open()
    client.meet()
    assert not client.server.send(call, b"a" * 5000)
    assert not client.server.send(call, b"b" * 10)
    client.server.end(call)
    events: list[http2.Event] = client.meet()
    while call not in client.ended:
        assert client.unacknowledged, "the server sends nothing though there is room"
        client.acknowledge()
        events += client.meet()
    assert client.data[call] == prefixed(b"a" * 5000) + prefixed(b"b" * 10)
    assert events.count(Drained(call)) == 1
    assert client.headers[call][-1] == {"grpc-status": "0"}


def test_a_connections_window_is_shared_by_its_calls(client: Client) -> None:
    calls = [client.open() for _ in range(3)]
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 10_000_000})
    client.meet()
    sent = [client.server.send(call, b"x" * 60_000) for call in calls]
    assert sent == [True, False, False]  # a connection starts with 65,535 bytes
    events: list[http2.Event] = []
    for _ in range(10):
        events += client.meet()
        client.acknowledge()
    assert {event.stream_id for event in events if isinstance(event, Drained)} == set(calls[1:])
    assert {len(data) for data in client.data.values()} == {60_005}


def test_a_window_that_the_peer_widens_by_settings_lets_waiting_messages_go() -> None:
    client = Client(Connection(), window=100)
    call = client.open()
    client.meet()
    assert not client.server.send(call, b"x" * 5000)
    client.meet()
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100_000})
    assert Drained(call) in client.meet()
    client.meet()
    assert client.data[call] == prefixed(b"x" * 5000)


def test_large_messages_are_cut_into_frames_the_peer_takes(client: Client) -> None:
    call = client.open()
    client.meet()
    client.server.send(call, b"x" * 50_000)
    data = [length for kind, length in sizes(client.server.take()) if kind == http2.DATA]
    assert sum(data) == 50_005
    assert max(data) == 16_384


# --- frames by hand ----------------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def parsed(data: bytes) -> Iterable[tuple[int, int, int, bytes]]:
    while data:
        length = int.from_bytes(data[:3], "big")
        kind, flags, stream_id = struct.unpack(">BBI", data[3:9])
        yield kind, flags, stream_id, data[9 : 9 + length]
        data = data[9 + length :]


def frames(data: bytes) -> list[tuple[int, int, int]]:
    return [(kind, flags, stream_id) for kind, flags, stream_id, _ in parsed(data)]


def sizes(data: bytes) -> list[tuple[int, int]]:
    return [(kind, len(payload)) for kind, _, _, payload in parsed(data)]


# ":path: /x" as a literal, then ":method: POST" from the static table.
BLOCK = b"\x04\x02/x\x83"


@pytest.fixture(params=[False, True], ids=["before-our-settings", "after-our-settings"])
def server(request: pytest.FixtureRequest) -> Connection:
    made = Connection()
    made.receive(PREFACE + frame(http2.SETTINGS, 0, 0))
    if request.param:
        made.receive(frame(http2.SETTINGS, http2.ACK, 0))
    made.take()
    return made


def test_padding_and_priority_are_taken_off(server: Connection) -> None:
    flags = http2.END_HEADERS | http2.PADDED | http2.WITH_PRIORITY
    head = frame(http2.HEADERS, flags, 1, b"\x03" + b"\0\0\0\0\x10" + BLOCK + b"\0\0\0")
    body = frame(http2.DATA, http2.PADDED | http2.END_STREAM, 1, b"\x02" + prefixed(b"hi") + b"\0\0")
    assert server.receive(head + body) == [Opened(1, "/x"), Message(1, b"hi"), HalfClosed(1)]


def test_a_header_block_may_come_in_pieces(server: Connection) -> None:
    pieces = (
        frame(http2.HEADERS, http2.END_STREAM, 1, BLOCK[:2])
        + frame(http2.CONTINUATION, 0, 1, BLOCK[2:3])
        + frame(http2.CONTINUATION, http2.END_HEADERS, 1, BLOCK[3:])
    )
    assert server.receive(pieces) == [Opened(1, "/x"), HalfClosed(1)]


def test_trailers_of_a_client_end_its_side(server: Connection) -> None:
    opened = frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK)
    trailers = frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, b"\x00\x01a\x01b")
    assert server.receive(opened + trailers) == [Opened(1, "/x"), HalfClosed(1)]


@pytest.mark.parametrize("kind", [http2.PRIORITY, http2.GOAWAY, 0x20])
def test_frames_that_need_no_answer_are_passed_over(server: Connection, kind: int) -> None:
    assert server.receive(frame(kind, 0, 0 if kind == http2.GOAWAY else 1, b"\0" * 8)) == []
    assert server.take() == b""


@pytest.mark.parametrize(
    ("prefix", "status"), [(b"\x01\0\0\0\x01x", b"12"), (b"\0\xff\xff\xff\xffx", b"8")], ids=["compressed", "too-long"]
)
def test_messages_that_cannot_be_read_end_their_call_alone(server: Connection, prefix: bytes, status: bytes) -> None:
    opened = frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK) + frame(http2.HEADERS, http2.END_HEADERS, 3, BLOCK)
    server.receive(opened)
    assert server.receive(frame(http2.DATA, 0, 1, prefix)) == [Reset(1)]
    assert b"grpc-status" + bytes((len(status),)) + status in server.take()
    assert server.receive(frame(http2.DATA, 0, 3, prefixed(b"ok"))) == [Message(3, b"ok")]


OPEN = frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK)

VIOLATIONS = {
    "a frame longer than allowed": (b"\xff\xff\xff\0\0\0\0\0\x01", http2.FRAME_SIZE_ERROR),
    "data on a call that never was": (frame(http2.DATA, 0, 1, b""), http2.PROTOCOL_ERROR),
    "data on an even stream": (frame(http2.DATA, 0, 2, b""), http2.PROTOCOL_ERROR),
    "data after the end": (
        OPEN + frame(http2.DATA, http2.END_STREAM, 1) + frame(http2.DATA, 0, 1, b"x"),
        http2.PROTOCOL_ERROR,
    ),
    "an end within a message": (OPEN + frame(http2.DATA, http2.END_STREAM, 1, b"\0\0\0\0\x05x"), http2.PROTOCOL_ERROR),
    "more than the window": (
        OPEN + b"".join(frame(http2.DATA, 0, 1, prefixed(b"x" * 16_379)) for _ in range(65)),
        http2.FLOW_CONTROL_ERROR,
    ),
    "headers without a path": (frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x83"), http2.PROTOCOL_ERROR),
    "headers cut off": (frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x04\x7fabc"), http2.COMPRESSION_ERROR),
    "a number without end": (frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff" * 20), http2.COMPRESSION_ERROR),
    "headers within a call": (OPEN + OPEN, http2.PROTOCOL_ERROR),
    "a continuation of nothing": (frame(http2.CONTINUATION, 0, 1, b"x"), http2.PROTOCOL_ERROR),
    "an interrupted header block": (
        frame(http2.HEADERS, 0, 1, BLOCK) + frame(http2.PING, 0, 0, b"12345678"),
        http2.PROTOCOL_ERROR,
    ),
    "a header block without end": (
        frame(http2.HEADERS, 0, 1, BLOCK) + frame(http2.CONTINUATION, 0, 1, b"\x83" * 16_000) * 5,
        http2.ENHANCE_YOUR_CALM,
    ),
    "empty continuations": (
        frame(http2.HEADERS, 0, 1, BLOCK) + frame(http2.CONTINUATION, 0, 1),
        http2.ENHANCE_YOUR_CALM,
    ),
    "too much padding": (OPEN + frame(http2.DATA, http2.PADDED, 1, b"\x05abc"), http2.PROTOCOL_ERROR),
    "an empty window update": (frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), http2.PROTOCOL_ERROR),
    "a window beyond its limit": (
        frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2,
        http2.FLOW_CONTROL_ERROR,
    ),
    "settings of a stream": (frame(http2.SETTINGS, 0, 1), http2.PROTOCOL_ERROR),
    "settings of a wrong length": (frame(http2.SETTINGS, 0, 0, b"\0" * 5), http2.FRAME_SIZE_ERROR),
    "an illegal frame size": (frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 5, 1)), http2.PROTOCOL_ERROR),
    "an illegal window": (frame(http2.SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31)), http2.FLOW_CONTROL_ERROR),
    "a short ping": (frame(http2.PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "a short reset": (OPEN + frame(http2.RST_STREAM, 0, 1, b"1"), http2.FRAME_SIZE_ERROR),
    "a reset of nothing": (frame(http2.RST_STREAM, 0, 1, b"\0\0\0\0"), http2.PROTOCOL_ERROR),
    "a push": (frame(http2.PUSH_PROMISE, 0, 1, b"\0\0\0\2"), http2.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_who_breaks_the_rules_is_told_and_cut_off(server: Connection, name: str) -> None:
    data, code = VIOLATIONS[name]
    with pytest.raises(Http2Error) as caught:
        server.receive(data)
    assert caught.value.code == code
    kind, _, _, payload = list(parsed(server.take()))[-1]
    assert (kind, int.from_bytes(payload[4:], "big")) == (http2.GOAWAY, code)


def test_a_peer_that_speaks_something_else_is_cut_off_at_once() -> None:
    with pytest.raises(Http2Error, match="HTTP/2"):
        Connection().receive(b"GET / HT")


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=40)),
        ),
        max_size=12,
    ),
    st.booleans(),
)
@settings(max_examples=150)
def test_nothing_a_peer_sends_breaks_more_than_its_connection(pieces: list[bytes], acknowledged: bool) -> None:
    server = Connection()
    server.receive(PREFACE + (frame(http2.SETTINGS, http2.ACK, 0) if acknowledged else b"") + OPEN)
    try:
        for piece in pieces:
            for event in server.receive(piece):
                if isinstance(event, Message):
                    server.consumed(event.stream_id, event.data)
                server.send(event.stream_id, b"reply")
    except Http2Error:
        pass
    server.end(1)
    server.take()


# --- a call that is one message each way -------------------------------------------------------------------


@pytest.mark.parametrize("half_closed", [True, False])
def test_an_answer_is_the_message_and_the_good_end(client: Client, half_closed: bool) -> None:
    call = client.open()
    client.say(call, b"question", end=half_closed)
    client.meet()
    client.server.answer(call, b"answer")
    client.meet()
    assert client.data[call] == prefixed(b"answer")
    assert client.headers[call] == [{":status": "200", "content-type": "application/grpc"}, {"grpc-status": "0"}]
    assert call in client.ended
    assert client.resets.get(call) == (None if half_closed else 0)
    assert client.server.open_streams == 0


def test_an_answer_that_does_not_fit_the_window_waits_for_room() -> None:
    client = Client(Connection(), window=10)
    client.meet()
    call = client.open()
    client.meet()
    client.server.answer(call, b"a" * 30)
    for _ in range(5):
        client.meet()
        client.acknowledge()
    client.meet()
    assert client.data[call] == prefixed(b"a" * 30)
    assert client.headers[call][-1] == {"grpc-status": "0"}


def test_an_answer_to_a_call_that_is_over_is_dropped(client: Client) -> None:
    call = client.open()
    client.meet()
    client.h2.reset_stream(call)
    client.meet()
    client.server.answer(call, b"late")
    assert client.server.take() == b""


def test_empty_frames_amid_a_message_cost_nothing() -> None:
    server = Connection()
    client = Client(server)
    call = client.open()
    client.h2.send_data(call, prefixed(b"x" * 100)[:50])
    client.meet()
    for _ in range(100):
        client.h2.send_data(call, b"")
    client.meet()
    assert len(server._streams[call].parts) == 1
    client.h2.send_data(call, prefixed(b"x" * 100)[50:])
    assert client.meet() == [Message(call, b"x" * 100)]


def test_frames_amid_a_message_count_against_the_window_and_give_room_back() -> None:
    server = Connection(stream_window=65_536)
    client = Client(server)
    client.meet()
    call = client.open()
    whole = prefixed(b"y" * 400_000)
    for at in range(0, len(whole), 16_384):
        client.h2.send_data(call, whole[at : at + 16_384])
        client.meet()
    assert client.heard[-1] == Message(call, b"y" * 400_000)
