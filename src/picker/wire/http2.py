"""gRPC over HTTP/2 as a server hears and speaks it: bytes in, events out, messages in, bytes out. No socket, no clock.

Made for one peer: a data plane that opens a stream for every request (RFC 9113, RFC 7541, and gRPC's PROTOCOL-HTTP2).
Everything the peer may legally send is understood; of what a server may send, only what gRPC replies need is used. The
peer is told to keep no header table, so that a header block means the same whatever came before it.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from picker.wire.header_blocks import MAX_HEADER_BLOCK, HeaderBlockError, HeaderBlocks

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR = 0x0, 0x1, 0x3, 0x6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 0x7, 0x8, 0x9, 0xB

_HEADER_TABLE_SIZE, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME, _MAX_HEADER_LIST = 0x1, 0x3, 0x4, 0x5, 0x6
_DEFAULT_WINDOW = 65_535
_MAX_WINDOW = 2**31 - 1
# What we accept in one frame; the smallest that is legal, and what senders of gRPC use anyway.
_OUR_MAX_FRAME = 16_384

_HEAD = struct.Struct(">BHBBI")  # length in 8 + 16 bits, type, flags, stream
_MESSAGE = struct.Struct(">BHBBIBI")  # the same, then gRPC's prefix: compressed, length
_RESET = struct.Struct(">BHBBII")
_PREFIX = struct.Struct(">BI")
_SETTING = struct.Struct(">HI")

# Header blocks in HPACK's literal form: 0x88 is ":status 200", 0x0f 0x10 the name "content-type".
_RESPONSE_HEADERS = b"\x88\x0f\x10\x10application/grpc"
_STATUS_NAME = b"\x00\x0bgrpc-status"
_MESSAGE_NAME = b"\x00\x0cgrpc-message"
_STATUS_OK = _STATUS_NAME + b"\x010"
_RESOURCE_EXHAUSTED, _UNIMPLEMENTED = 8, 12


class Http2Error(Exception):
    """The peer broke the connection's rules; it is told so (`Connection.take`) and must be cut off."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Opened(NamedTuple):
    """A call begins. path: "/package.Service/Method"."""

    stream_id: int
    path: str


class Message(NamedTuple):
    stream_id: int
    data: bytes


class HalfClosed(NamedTuple):
    """The peer will send no more on this call."""

    stream_id: int


class Reset(NamedTuple):
    """The peer gave the call up; nothing may be sent on it any more."""

    stream_id: int


class Drained(NamedTuple):
    """All that was sent on this call has left."""

    stream_id: int


Event = Opened | Message | HalfClosed | Reset | Drained


class _Stream:
    """One call. Windows count bytes: send_window what the peer still takes, uncredited what we have not given back.

    parts: of a message that is not complete; missing: bytes that it wants yet, 0 while its length is not known. unread:
    bytes of complete messages that nobody has taken.
    pending: DATA that waits for a window. trailers: the header block to end with once that is gone.
    """

    __slots__ = (
        *("half_closed", "id", "missing", "opened", "parts", "pending", "send_window", "trailers", "uncredited"),
        "unread",
    )

    def __init__(self, stream_id: int, send_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.opened = False
        self.half_closed = False
        self.parts: list[bytes] = []
        self.missing = 0
        self.unread = 0
        self.uncredited = 0
        self.pending: deque[bytes] = deque()
        self.trailers: bytes | None = None


class Connection:
    """The server's end of one connection. Feed `receive`, send what `take` gives.

    max_message_bytes: of one gRPC message; a call with a larger one is ended. max_streams: calls at a time.
    stream_window: bytes that a call may have under way to us, unread. Memory is bounded by the product, and by a
    message each; unread messages are not credited, so a peer waits for a reader that is slow.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int = 64 * 1024 * 1024,
        max_streams: int = 100_000,
        stream_window: int = 1024 * 1024,
        headers: HeaderBlocks | None = None,
    ) -> None:
        self._max_message = max_message_bytes
        self._max_streams = max_streams
        self._window = stream_window
        self._streams: dict[int, _Stream] = {}
        self._blocked: dict[int, _Stream] = {}
        self._rest = b""
        self._preface = False
        self._last_id = 0
        self._out: list[bytes] = []
        self._send_window = _DEFAULT_WINDOW
        self._initial_window = _DEFAULT_WINDOW
        self._max_frame = 16_384
        self._uncredited = 0
        self._headers = headers or HeaderBlocks()
        self._block: tuple[int, int, bytes] | None = None  # a header block that CONTINUATION goes on with
        self._going_away = False
        settings = [(_HEADER_TABLE_SIZE, 0), (_MAX_STREAMS, max_streams), (_INITIAL_WINDOW, stream_window)]
        settings.append((_MAX_HEADER_LIST, MAX_HEADER_BLOCK))
        self._frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self._frame(WINDOW_UPDATE, 0, 0, (_MAX_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big"))

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def begun(self) -> bool:
        """The peer has shown that it speaks HTTP/2."""
        return self._preface

    def take(self) -> bytes:
        """What is to be sent since the last call."""
        out = b"".join(self._out)
        self._out.clear()
        return out

    # receiving

    def receive(self, data: bytes) -> list[Event]:
        """Hear bytes from the peer. Raises Http2Error when it breaks the rules: send what `take` gives, then close."""
        buffer = self._rest + data if self._rest else data
        events: list[Event] = []
        try:
            at = 0 if self._preface else self._expect_preface(buffer)
            size = len(buffer)
            while self._preface and size - at >= 9:
                high, low, kind, flags, stream_id = _HEAD.unpack_from(buffer, at)
                length = high << 16 | low
                if length > _OUR_MAX_FRAME:
                    raise Http2Error(FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                end = at + 9 + length
                if end > size:
                    break
                self._on_frame(kind, flags, stream_id & _MAX_WINDOW, buffer[at + 9 : end], events)
                at = end
        except Http2Error as error:
            self._frame(GOAWAY, 0, 0, self._last_id.to_bytes(4, "big") + error.code.to_bytes(4, "big"))
            raise
        self._rest = buffer[at:]
        return events

    def _expect_preface(self, buffer: bytes) -> int:
        if not PREFACE.startswith(buffer[: len(PREFACE)]):
            raise Http2Error(PROTOCOL_ERROR, "the peer does not speak HTTP/2")
        self._preface = len(buffer) >= len(PREFACE)
        return len(PREFACE) if self._preface else 0

    def _on_frame(self, kind: int, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise Http2Error(PROTOCOL_ERROR, "a header block is not complete")
        if kind == DATA:
            if flags or not self._amid_message(stream_id, payload):
                self._on_data(flags, stream_id, payload, events)
        elif kind == HEADERS:
            self._on_headers(flags, stream_id, payload, events)
        elif kind == WINDOW_UPDATE:
            self._on_window_update(stream_id, payload, events)
        elif kind == RST_STREAM:
            self._on_reset(stream_id, payload, events)
        elif kind == CONTINUATION:
            self._on_continuation(flags, stream_id, payload, events)
        elif kind == SETTINGS:
            self._on_settings(flags, stream_id, payload, events)
        elif kind == PING:
            self._on_ping(flags, stream_id, payload)
        elif kind == PUSH_PROMISE:
            raise Http2Error(PROTOCOL_ERROR, "a client promised a push")
        # PRIORITY is advice; GOAWAY says that no new calls come, which needs no answer; others are extensions.

    def _amid_message(self, stream_id: int, payload: bytes) -> bool:
        """Keep a frame that is known to hold nothing but the next bytes of a message, and not its last; else False.

        That is what bodies of hundreds of kilobytes are made of, 16 of them a frame.
        """
        stream = self._streams.get(stream_id)
        size = len(payload)
        if stream is None or size >= stream.missing or stream.uncredited + size > self._window:
            return False
        if size:
            stream.parts.append(payload)
        stream.missing -= size
        stream.uncredited += size
        if (self._uncredited + size) * 2 > _MAX_WINDOW or stream.uncredited * 2 > self._window:
            self._credit_connection(size)
            self._credit(stream)
        else:
            self._uncredited += size
        return True

    def _on_data(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        self._credit_connection(len(payload))
        stream = self._streams.get(stream_id)
        if stream is None:
            self._require_known(stream_id)
            return
        if stream.half_closed:
            raise Http2Error(PROTOCOL_ERROR, "data after the end of a stream")
        stream.uncredited += len(payload)
        if stream.uncredited > self._window:
            raise Http2Error(FLOW_CONTROL_ERROR, "a stream sent more than its window")
        if flags & PADDED:
            payload = _unpadded(payload)
        self._messages(stream, payload, events)
        if flags & END_STREAM and stream_id in self._streams:
            self._on_half_close(stream, events)
        else:
            self._credit(stream)

    def _messages(self, stream: _Stream, payload: bytes, events: list[Event]) -> None:
        """Cut whole gRPC messages out of a stream's bytes; keep the rest."""
        buffer = payload
        if stream.parts:
            buffer = b"".join((*stream.parts, payload))
            stream.parts.clear()
        stream.missing = 0
        at, size = 0, len(buffer)
        while size - at >= 5:
            compressed, length = _PREFIX.unpack_from(buffer, at)
            if compressed or length > self._max_message:
                self._refuse(stream, _UNIMPLEMENTED if compressed else _RESOURCE_EXHAUSTED, events)
                return
            if size - at - 5 < length:
                stream.missing = length - (size - at - 5)
                break
            events.append(Message(stream.id, buffer[at + 5 : at + 5 + length]))
            stream.unread += length + 5
            at += 5 + length
        if at < size:
            stream.parts.append(buffer[at:])

    def _refuse(self, stream: _Stream, code: int, events: list[Event]) -> None:
        self.end(stream.id, code, "the message is compressed or too long")
        self.cancel(stream.id)
        events.append(Reset(stream.id))

    def _on_half_close(self, stream: _Stream, events: list[Event]) -> None:
        if stream.parts:
            raise Http2Error(PROTOCOL_ERROR, "a stream ended within a message")
        stream.half_closed = True
        events.append(HalfClosed(stream.id))

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & WITH_PRIORITY:
            payload = payload[5:]
        if flags & END_HEADERS:
            self._on_header_block(flags, stream_id, payload, events)
        else:
            self._block = (flags, stream_id, payload)

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if self._block is None or self._block[1] != stream_id:
            raise Http2Error(PROTOCOL_ERROR, "a continuation of nothing")
        first_flags, _, block = self._block
        block += payload
        # An endless header block is an old way to fill a server's memory; so is one of empty frames.
        if len(block) > MAX_HEADER_BLOCK or not payload:
            raise Http2Error(ENHANCE_YOUR_CALM, "a header block without end")
        self._block = (first_flags, stream_id, block)
        if flags & END_HEADERS:
            self._block = None
            self._on_header_block(first_flags, stream_id, block, events)

    def _on_header_block(self, flags: int, stream_id: int, block: bytes, events: list[Event]) -> None:
        try:
            path = self._headers.path(block)
        except HeaderBlockError as error:
            raise Http2Error(COMPRESSION_ERROR, str(error)) from None
        stream = self._streams.get(stream_id)
        if stream is not None:  # trailers
            if not flags & END_STREAM or stream.half_closed:
                raise Http2Error(PROTOCOL_ERROR, "headers within a stream")
            self._on_half_close(stream, events)
            return
        if stream_id <= self._last_id or not stream_id & 1:
            self._require_known(stream_id)
            return
        self._last_id = stream_id
        if path is None:
            raise Http2Error(PROTOCOL_ERROR, "a request without a path")
        if self._going_away or len(self._streams) >= self._max_streams:
            self._frame(RST_STREAM, 0, stream_id, REFUSED_STREAM.to_bytes(4, "big"))
            return
        stream = self._streams[stream_id] = _Stream(stream_id, self._initial_window)
        events.append(Opened(stream_id, path))
        if flags & END_STREAM:
            self._on_half_close(stream, events)

    def _on_window_update(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "a window update of a wrong length")
        increment = int.from_bytes(payload, "big") & _MAX_WINDOW
        if not increment:
            raise Http2Error(PROTOCOL_ERROR, "an empty window update")
        if stream_id == 0:
            self._send_window += increment
            if self._send_window > _MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "a window beyond its limit")
            for stream in list(self._blocked.values()):
                self._unblock(stream, events)
        elif stream_id in self._streams:
            stream = self._streams[stream_id]
            stream.send_window += increment
            if stream.send_window > _MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "a window beyond its limit")
            self._unblock(stream, events)
        else:
            self._require_known(stream_id)

    def _on_reset(self, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "a reset of a wrong length")
        self._require_known(stream_id)
        if self._streams.pop(stream_id, None) is not None:
            self._blocked.pop(stream_id, None)
            events.append(Reset(stream_id))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, events: list[Event]) -> None:
        if stream_id:
            raise Http2Error(PROTOCOL_ERROR, "settings of a stream")
        if flags & ACK:
            self._headers.table_is_gone()
            return
        if len(payload) % 6:
            raise Http2Error(FRAME_SIZE_ERROR, "settings of a wrong length")
        # First: a peer may hold its new windows valid only from here on.
        self._frame(SETTINGS, ACK, 0, b"")
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW:
                self._on_initial_window(value, events)
            elif name == _MAX_FRAME:
                if not 16_384 <= value <= 2**24 - 1:
                    raise Http2Error(PROTOCOL_ERROR, "an illegal frame size")
                self._max_frame = value

    def _on_initial_window(self, value: int, events: list[Event]) -> None:
        if value > _MAX_WINDOW:
            raise Http2Error(FLOW_CONTROL_ERROR, "a window beyond its limit")
        change, self._initial_window = value - self._initial_window, value
        for stream in list(self._streams.values()):
            stream.send_window += change
            self._unblock(stream, events)

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 8 or stream_id:
            raise Http2Error(FRAME_SIZE_ERROR, "a ping of a wrong form")
        if not flags & ACK:
            self._frame(PING, ACK, 0, payload)

    def _require_known(self, stream_id: int) -> None:
        """Frames on a call that is over cross ours on the way; on one that never was they are an error."""
        if stream_id > self._last_id or not stream_id & 1:
            raise Http2Error(PROTOCOL_ERROR, f"a frame for stream {stream_id}, which does not exist")

    # the peer's windows

    def consumed(self, stream_id: int, message: bytes) -> None:
        """Somebody took a message: its room may be used again."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.unread -= len(message) + 5
            self._credit(stream)

    def _credit(self, stream: _Stream) -> None:
        # Bytes of an incomplete message count as read: nobody can take it before the rest has come.
        read = stream.uncredited - stream.unread
        if read * 2 > self._window and not stream.half_closed:
            stream.uncredited -= read
            self._frame(WINDOW_UPDATE, 0, stream.id, read.to_bytes(4, "big"))

    def _credit_connection(self, size: int) -> None:
        self._uncredited += size
        if self._uncredited > _MAX_WINDOW // 2:
            self._frame(WINDOW_UPDATE, 0, 0, self._uncredited.to_bytes(4, "big"))
            self._uncredited = 0

    # sending

    def send(self, stream_id: int, message: bytes) -> bool:
        """Send a message on a call; False while it has to wait for the peer's window (`Drained` tells when it left).

        Silently dropped when the call is over.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return True
        self._open(stream)
        size = len(message)
        if size + 5 <= min(stream.send_window, self._send_window, self._max_frame) and not stream.pending:
            stream.send_window -= size + 5
            self._send_window -= size + 5
            head = _MESSAGE.pack((size + 5) >> 16, (size + 5) & 0xFFFF, DATA, 0, stream_id, 0, size)
            self._out.append(head + message)
            return True
        stream.pending.append(_PREFIX.pack(0, size) + message)
        self._flow(stream)
        return not stream.pending

    def answer(self, stream_id: int, message: bytes) -> None:
        """The only message of a call, and its good end. The same as `send` and `end`, for one that fits its windows."""
        stream = self._streams.get(stream_id)
        size = len(message) + 5
        if stream is None or stream.opened or size > min(stream.send_window, self._send_window, self._max_frame):
            self.send(stream_id, message)
            self.end(stream_id)
            return
        self._send_window -= size
        del self._streams[stream_id]
        length = len(_RESPONSE_HEADERS)
        self._out += (
            _HEAD.pack(0, length, HEADERS, END_HEADERS, stream_id) + _RESPONSE_HEADERS,
            _MESSAGE.pack(size >> 16, size & 0xFFFF, DATA, 0, stream_id, 0, size - 5) + message,
            _HEAD.pack(0, len(_STATUS_OK), HEADERS, END_HEADERS | END_STREAM, stream_id) + _STATUS_OK,
        )
        if not stream.half_closed:  # as in `_flow`
            self._out.append(_RESET.pack(0, 4, RST_STREAM, 0, stream_id, NO_ERROR))

    def end(self, stream_id: int, code: int = 0, message: str = "") -> None:
        """End a call with a gRPC status, after all that was sent on it; does nothing when it is over.

        A failure does not wait for a peer that takes nothing: what has not left by then is dropped.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.trailers is not None:
            return
        if code:
            stream.pending.clear()
        self._open(stream)
        status = str(code).encode()
        stream.trailers = _STATUS_NAME + bytes((len(status),)) + status
        if message:
            text = _percent_encoded(message)
            stream.trailers += _MESSAGE_NAME + bytes((len(text),)) + text
        self._flow(stream)

    def cancel(self, stream_id: int) -> None:
        """Give a call up without a status."""
        if self._streams.pop(stream_id, None) is not None:
            self._blocked.pop(stream_id, None)
            self._frame(RST_STREAM, 0, stream_id, CANCEL.to_bytes(4, "big"))

    def ping(self) -> None:
        """Ask the peer for a sign of life; any bytes that come are one."""
        self._frame(PING, 0, 0, b"picker??")

    def part(self) -> None:
        """Ask the peer to make its next calls on another connection; those it makes here before it knows are taken."""
        self._frame(GOAWAY, 0, 0, _MAX_WINDOW.to_bytes(4, "big") + NO_ERROR.to_bytes(4, "big"))

    def go_away(self) -> None:
        """Take no new calls; those open go on."""
        self._going_away = True
        self._frame(GOAWAY, 0, 0, self._last_id.to_bytes(4, "big") + NO_ERROR.to_bytes(4, "big"))

    def _open(self, stream: _Stream) -> None:
        if not stream.opened:
            stream.opened = True
            self._frame(HEADERS, END_HEADERS, stream.id, _RESPONSE_HEADERS)

    def _unblock(self, stream: _Stream, events: list[Event]) -> None:
        if stream.pending:
            self._flow(stream)
            if not stream.pending:
                events.append(Drained(stream.id))

    def _flow(self, stream: _Stream) -> None:
        """Send as much of what waits as the windows take, then the trailers if it was the last."""
        while stream.pending:
            data = stream.pending.popleft()
            room = min(len(data), stream.send_window, self._send_window, self._max_frame)
            if room <= 0:
                stream.pending.appendleft(data)
                self._blocked[stream.id] = stream
                return
            stream.send_window -= room
            self._send_window -= room
            self._frame(DATA, 0, stream.id, data[:room])
            if room < len(data):
                stream.pending.appendleft(data[room:])
        self._blocked.pop(stream.id, None)
        if stream.trailers is not None:
            self._frame(HEADERS, END_HEADERS | END_STREAM, stream.id, stream.trailers)
            del self._streams[stream.id]
            if not stream.half_closed:  # what is still to come of it is not wanted (RFC 9113, 8.1)
                self._frame(RST_STREAM, 0, stream.id, NO_ERROR.to_bytes(4, "big"))

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        length = len(payload)
        self._out.append(_HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload)


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Http2Error(PROTOCOL_ERROR, "padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]


def _percent_encoded(text: str) -> bytes:
    """A `grpc-message`: printable ASCII, the rest percent-encoded; cut to what one length byte can say."""
    encoded = "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode()[:40]
    )
    return encoded.encode()
