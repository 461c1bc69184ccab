"""One connection between two replicas: sealed frames, and a bound on what waits to be sent.

The listener speaks first: a magic word, its id and a nonce; the caller answers with the same. Both derive keys from
these and the secret; the first sealed frame of each shows that it knows it. All that one turn of the loop has to say is
one frame. A line that is read too slowly is given up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Sequence

from picker.replicas import words
from picker.replicas.seal import Seal, derive
from picker.replicas.words import Word

MAGIC = b"picker-replica-1"
ID = 8  # bytes
_NONCE = 16
_HELLO = len(MAGIC) + ID + _NONCE
_SIZE = 4
LARGEST = 32 * 1024 * 1024  # bytes of a frame
_PIECE = 256 * 1024  # of words that are sealed together, about
LIMIT = 64 * 1024 * 1024  # bytes that may wait to be sent


class Line:
    """replica: id of the other end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replica: str, out: Seal, into: Seal
    ) -> None:
        self.replica = replica
        self._reader = reader
        self._writer = writer
        self._out = out
        self._in = into
        self._waiting: list[bytes] = []
        self._bytes = 0

    async def hear(self, *, largest: int = LARGEST) -> list[words.FromReplica]:
        """The next words. largest: bytes of them. Raises ValueError, OSError and EOFError for what ends a line."""
        size = int.from_bytes(await self._reader.readexactly(_SIZE), "big")
        if size > largest:
            raise ValueError(f"a frame of {size} bytes")
        return words.unbatch(self._in.open(await self._reader.readexactly(size)))

    def say(self, word: Word) -> None:
        self.pass_on(words.encode(word))

    def pass_on(self, encoded: bytes) -> None:
        """Say an encoded word at the end of this turn of the loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(encoded)
        self._bytes += len(encoded)
        if self._bytes + self._writer.transport.get_write_buffer_size() > LIMIT:
            self.abort()
        elif self._bytes > _PIECE:
            self._send()

    async def tell(self, many: Iterable[Word], *, at_once: int = 200) -> None:
        """Say a great deal, with all else in between and no more than the other end takes."""
        for count, word in enumerate(many, 1):
            self.say(word)
            if count % at_once == 0:
                self._send()
                await self._writer.drain()
                await asyncio.sleep(0)

    def abort(self) -> None:
        self._waiting.clear()
        self._writer.transport.abort()

    def _flush(self) -> None:
        if self._waiting and not self._writer.transport.is_closing():
            self._send()

    def _send(self) -> None:
        if self._waiting:
            self._writer.write(_framed(self._out, self._waiting))
        self._waiting.clear()
        self._bytes = 0


def _framed(seal: Seal, encoded: Sequence[bytes]) -> bytes:
    data = seal.close(words.batch(encoded))
    return len(data).to_bytes(_SIZE, "big") + data


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, own: bytes, secret: bytes) -> Line:
    """The listener's half of meeting; raises ValueError, OSError or EOFError."""
    mine = _hello(own)
    writer.write(mine)
    return _line(reader, writer, await _heard(reader), mine, secret, calling=False)


async def call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, own: bytes, secret: bytes) -> Line:
    """The caller's half."""
    theirs, mine = await _heard(reader), _hello(own)
    writer.write(mine)
    return _line(reader, writer, theirs, mine, secret, calling=True)


def _hello(own: bytes) -> bytes:
    return MAGIC + own + secrets.token_bytes(_NONCE)


async def _heard(reader: asyncio.StreamReader) -> bytes:
    hello = await reader.readexactly(_HELLO)
    if not hello.startswith(MAGIC):
        raise ValueError("who is there is no replica of picker")
    return hello


def _line(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    theirs: bytes,
    mine: bytes,
    secret: bytes,
    *,
    calling: bool,
) -> Line:
    called, caller = (theirs, mine) if calling else (mine, theirs)
    down, up = Seal(derive(secret, "to caller", called, caller)), Seal(derive(secret, "to called", called, caller))
    out, into = (up, down) if calling else (down, up)
    return Line(reader, writer, theirs[len(MAGIC) : len(MAGIC) + ID].hex(), out, into)
