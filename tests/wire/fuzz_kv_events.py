"""Coverage-guided fuzzing of the KV event codec and of the stream behind it, by atheris (`pip install atheris`).

    python tests/wire/fuzz_kv_events.py [-max_total_time=60] [CORPUS_DIR]

Anything but a WireError from `decode_batch`, or a fact about another endpoint, is a finding.
"""

from __future__ import annotations

import sys

from picker.errors import WireError
from picker.sources.kv_stream import Stream
from picker.wire.kv_events import decode_batch, tell

try:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    print("skipped: atheris is not installed (pip install atheris)", file=sys.stderr)
    sys.exit(0)


def check(holds: bool) -> None:
    if not holds:
        raise RuntimeError("a finding")


def codec(data: bytes) -> None:
    try:
        batch = decode_batch(data)
    except WireError as error:
        check("\n" not in error.message)
        return
    check(all(fact.name == "a" for fact in tell(batch.events, "a").facts))


def stream(data: bytes) -> None:
    """The input cut at its zero bytes: messages, each behind a byte for its number and the way it comes."""
    followed, now = Stream("a"), 0.0
    said = followed.connected(replay=bool(data[:1] > b"\x7f"), now=now)
    for message in data.split(b"\x00"):
        number, now = message[0] % 16 if message else 0, now + 1.0
        if followed.wants is None:
            said += followed.receive(number, message[1:], now=now)
        elif message:
            said += followed.replayed(number, message[1:], now=now)
        else:
            said += followed.replay_ended(complete=True, now=now)
    check(all(fact.name == "a" for fact in said))


def one_input(data: bytes) -> None:
    codec(data)
    stream(data)


if __name__ == "__main__":
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
