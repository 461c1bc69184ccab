"""What one real server publishes about its cache, as raw frames; and how to ask it to say it all again.

Owns two sockets and nothing of what the frames mean: the codec under test decodes them.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from real_vllm.pod import Pod

PATIENCE = 20.0  # seconds; frames come within milliseconds
END = struct.pack(">q", -1)


@dataclass(frozen=True, slots=True)
class Frame:
    """One published batch: topic, number, msgpack payload."""

    topic: bytes
    seq: int
    payload: bytes


@dataclass(slots=True)
class Listener:
    """Hears a pod's events from now on. Use as a context."""

    pod: Pod
    frames: list[Frame] = field(default_factory=list)
    _context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context, repr=False)
    _socket: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Listener:
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.connect(f"tcp://127.0.0.1:{self.pod.events_port}")
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def hear(self, seconds: float = 0.0) -> list[Frame]:
        """What came, once nothing more has come for `seconds`."""
        assert self._socket is not None
        heard = []
        while self._socket.poll(int(seconds * 1000)):
            heard.append(_frame(self._socket.recv_multipart()))
        self.frames += heard
        return heard

    def until(self, condition: Callable[[list[Frame]], bool]) -> None:
        """Wait until the frames heard so far are what `condition` wants. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self.frames):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.frames)} frames, and not those that were waited for")
            self.hear(0.02)


def replay(pod: Pod, start: int = 0) -> tuple[list[Frame], list[bytes]]:
    """The batches that the pod still has from number `start` on, and the raw frames of the end marker."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{pod.replay_port}")
        socket.send_multipart([b"", struct.pack(">q", start)])
        frames: list[Frame] = []
        while socket.poll(int(PATIENCE * 1000)):
            parts = socket.recv_multipart()
            if parts[-2] == END:
                return frames, parts
            frames.append(_frame(parts[1:]))
    raise TimeoutError("no end of the replay")


def _frame(parts: list[bytes]) -> Frame:
    topic, number, payload = parts
    return Frame(topic, int.from_bytes(number, "big"), payload)
