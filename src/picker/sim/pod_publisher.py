"""The event sockets of one simulated engine: PUB and replay ROUTER, framed and numbered as vLLM's ZmqEventPublisher.

Owns sequence numbers, the replay buffer and both sockets. Knows no cache. Everything happens inside the caller's call
or when the loop says that a socket is readable: no task, no thread but ZeroMQ's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from picker.errors import ConfigError
from picker.sim.pod_options import EventFault, EventOptions
from picker.wire.kv_events import Event, Stored, encode_batch

_END = b"\xff" * 8  # -1, the sequence number of the end marker
_GARBAGE = b"\xc1 this is no msgpack"
_REBIND_S = 0.02  # until ZeroMQ's reaper has given up the port of a closed socket

Frames = tuple[bytes, bytes, bytes]


class EventPublisher:
    """Publishes one rank's batches and answers requests for those it still has. `open` before use, `close` after.

    host: address to bind. ports: for batches and for replays; 0 for free ones, which stay the same across `restart`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        options: EventOptions,
        rank: int,
        *,
        host: str,
        ports: tuple[int, int],
    ) -> None:
        port, replay_port = ports
        self.fault = options.fault
        self.subscriptions = 0
        self._options = options
        self._rank = rank
        self._topic = b""
        self._pub = _Port(context, zmq.XPUB, host, port, options.hwm, self._subscribed)
        # vLLM leaves the ROUTER's limit at ZeroMQ's 1,000 messages for each client; what is beyond is dropped.
        self._router = _Port(context, zmq.ROUTER, host, replay_port, 1000, self._asked) if options.replay else None
        self._seq = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=options.buffer_steps)
        self._stalled: list[Frames] = []
        self._unanswered: list[list[bytes]] = []

    @property
    def source(self) -> dict[str, Any]:
        """This rank's entry in GET /kv_event_sources."""
        options = self._options
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._pub.endpoint,
            "replay_endpoint": self._router.endpoint if self._router else None,
            "buffer_steps": options.buffer_steps,
            "hwm": options.hwm,
            "max_queue_size": options.max_queue_size,
            "topic": self._topic.decode(),
        }

    @property
    def next_seq(self) -> int:
        """Number of the next batch: how many there have been since the start."""
        return self._seq

    @property
    def buffered(self) -> tuple[tuple[int, bytes], ...]:
        """(number, payload) of the batches that a replay could have."""
        return tuple(self._buffer)

    def open(self, *, address: str, model: str) -> None:
        """Bind the sockets. Raises ConfigError when a port cannot be had. address, model: what the topic may name."""
        self._topic = self._options.named(address=address, model=model).encode()
        for port in self._ports():
            port.open()

    def close(self) -> None:
        for port in self._ports():
            port.close()

    def restart(self) -> None:
        """A new process: batches count from 0 again, the buffer is empty, whoever was connected is not any more.

        The ports open again with `reopen`.
        """
        self.close()
        self._seq = self.subscriptions = 0
        self._buffer.clear()
        self._stalled.clear()
        self._unanswered.clear()

    def reopen(self) -> None:
        """Bind the same ports again, as soon as the system lets them go."""
        for port in self._ports():
            port.reopen()

    def publish(self, events: Sequence[Event]) -> None:
        """Send one batch: the events of one engine step, in order. Slow subscribers lose it, nobody waits."""
        fault = self.fault
        if fault.block_size is not None:
            events = [_resized(event, fault.block_size) for event in events]
        payload = encode_batch(time.time(), events, self._rank, arrays=fault.arrays or self._options.arrays)
        seq, self._seq = self._seq, self._seq + 1
        self._buffer.append((seq, payload))
        if fault.drop:
            self.fault = dataclasses.replace(fault, drop=fault.drop - 1)
            return
        if fault.garbage:
            self.fault = dataclasses.replace(fault, garbage=fault.garbage - 1)
            payload = _GARBAGE
        frames = (self._topic, seq.to_bytes(8, "big"), payload)
        if fault.stall:
            self._stalled.append(frames)
        else:
            self._pub.send(frames)

    def misbehave(self, fault: EventFault) -> None:
        """From the next batch on. Where a stall ends, what it held back is sent first."""
        self.fault = fault
        if fault.stall:
            return
        stalled, self._stalled = self._stalled, []
        for frames in stalled:
            self._pub.send(frames)
        unanswered, self._unanswered = self._unanswered, []
        for request in unanswered:
            self._asked(request)

    def _ports(self) -> Iterator[_Port]:
        yield self._pub
        if self._router:
            yield self._router

    def _subscribed(self, frames: list[bytes]) -> None:
        self.subscriptions += 1 if frames[0][:1] == b"\x01" else -1

    def _asked(self, frames: list[bytes]) -> None:
        """A request for all batches from a number on. One of another form is dropped, as by vLLM."""
        if self._router is None or len(frames) != 3:
            return
        if self.fault.stall:
            self._unanswered.append(frames)
            return
        client, empty, start = frames
        first = int.from_bytes(start, "big")
        topic = [self._topic] if self._options.replay_topic else []
        for seq, payload in self._buffer:
            if seq >= first:
                self._router.send((client, empty, *topic, seq.to_bytes(8, "big"), payload))
        self._router.send((client, empty, *(b"" for _ in topic), _END, b""))


class _Port:
    """One bound socket of the event loop; `on_message` gets what comes in."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        host: str,
        port: int,
        hwm: int,
        on_message: Callable[[list[bytes]], None],
    ) -> None:
        self._context = context
        self._kind = kind
        self._host = host
        self._port = port
        self._hwm = hwm
        self._on_message = on_message
        self._socket: zmq.Socket[bytes] | None = None
        self._again: asyncio.TimerHandle | None = None

    @property
    def endpoint(self) -> str:
        """As vLLM tells it: a port on all interfaces has a star for its host."""
        host = "*" if self._host in ("", "0.0.0.0", "::") else self._host
        return f"tcp://[{host}]:{self._port}" if ":" in host else f"tcp://{host}:{self._port}"

    def open(self) -> None:
        """Raises ConfigError when the port cannot be had."""
        try:
            self._bind()
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot publish KV events on {self.endpoint}: {error.strerror}") from error

    def reopen(self) -> None:
        try:
            self._bind()
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
            self._again = asyncio.get_running_loop().call_later(_REBIND_S, self.reopen)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(int(self._socket.fd))
            self._socket.close(linger=0)
            self._socket = None

    def send(self, frames: Sequence[bytes]) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return
        # Sending may use up the one signal that something came in.
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self.read)

    def read(self) -> None:
        """Take in all there is: ZeroMQ signals only the first of what has not been read."""
        while (socket := self._socket) is not None and int(socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._on_message(socket.recv_multipart(zmq.NOBLOCK))

    def _bind(self) -> None:
        socket = self._context.socket(self._kind)
        socket.set_hwm(self._hwm)
        if self._kind == zmq.XPUB:
            socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        socket.setsockopt(zmq.IPV6, ":" in self._host)
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError:
            socket.close(linger=0)
            raise
        self._port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._socket = socket
        asyncio.get_running_loop().add_reader(int(socket.fd), self.read)


def _resized(event: Event, block_size: int) -> Event:
    return msgspec.structs.replace(event, block_size=block_size) if isinstance(event, Stored) else event
