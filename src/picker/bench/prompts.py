"""The requests of a benchmark: chat bodies of one size that share their beginnings in groups and differ at the end."""

from __future__ import annotations

import json

import numpy as np

from picker.bench.upstream import MODEL, Ask, mark

GROUPS = 16
_LINE = 80
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", dtype=np.uint8)
_MARK_BYTES = 12


class Prompts:
    """OpenAI chat bodies whose two messages together are `prompt_bytes` long; no two are alike.

    Half of each is the system message that its group shares; the user message begins with its own mark.
    Lines end in line feeds, which JSON escapes: a body without any escape would flatter every parser.
    The mark is there twice: at the very beginning, where no chunk boundary can split it, and in the prompt, which
    every gateway hands on, whatever it makes of the fields around it.
    """

    def __init__(self, prompt_bytes: int, *, seed: int = 0) -> None:
        self.prompt_bytes = prompt_bytes
        rng = np.random.default_rng(seed)
        shared = prompt_bytes // 2
        self._tail_lines, self._padding = divmod(prompt_bytes - shared - _MARK_BYTES, _LINE)
        self._heads = [_escaped(_lines(rng, shared // _LINE), "x" * (shared % _LINE)) for _ in range(GROUPS)]
        self._text = _lines(rng, 2 * self._tail_lines + 1)
        self._count = 0

    def body(self, ask: Ask, *, stream: bool) -> bytes:
        """The next request's JSON."""
        self._count = number = self._count + 1
        start = number % (self._tail_lines + 1)
        tail = _escaped(self._text[start : start + self._tail_lines], "x" * self._padding)
        return (
            b'{"user":"%b","model":"%b","messages":[{"role":"system","content":"%b"},'
            b'{"role":"user","content":"%b%b"}],"max_tokens":%d,"stream":%b}'
        ) % (
            mark(ask).encode(),
            MODEL.encode(),
            self._heads[number % GROUPS],
            mark(ask).rjust(_MARK_BYTES, "-").encode(),
            tail,
            ask.chunks,
            b'true,"stream_options":{"include_usage":true}' if stream else b"false",
        )


def _lines(rng: np.random.Generator, count: int) -> list[bytes]:
    """Random words, each line `_LINE` bytes with its line feed, as JSON writes it."""
    letters = _LETTERS[rng.integers(len(_LETTERS), size=(count, _LINE - 1))]
    return [json.dumps(bytes(row).decode() + "\n")[1:-1].encode() for row in letters]


def _escaped(lines: list[bytes], padding: str) -> bytes:
    return b"".join(lines) + padding.encode()
