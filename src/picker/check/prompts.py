"""Requests of a checker: prompts that nobody has cached yet, and the bodies around them. Knows no picker."""

from __future__ import annotations

import json
import random

_WORDS = ("amber", "birch", "cloud", "dune", "ember", "fjord", "grove", "iris", "kelp", "lagoon", "onyx", "pine")

# What a prompt carries to be recognised where it must not turn up.
MARKER = "zq-private-marker-7f3a"


class Prompts:
    """model: what requests ask for. seed: the same seed gives the same prompts in the same order."""

    def __init__(self, model: str, seed: int) -> None:
        self.model = model
        self.seed = seed
        self._rng = random.Random(seed)

    def fresh(self, size: int = 200) -> str:
        """Text of `size` characters that shares no prefix worth caching with any other."""
        words: list[str] = [f"{self._rng.getrandbits(64):016x}"]
        length = len(words[0])
        while length < size:
            words.append(self._rng.choice(_WORDS))
            length += len(words[-1]) + 1
        return " ".join(words)[:size]

    def body(self, prompt: str | None = None, **more: object) -> bytes:
        """A completion request; `more` are further keys of it."""
        asked = {"model": self.model, "prompt": self.fresh() if prompt is None else prompt, "max_tokens": 4, **more}
        return json.dumps(asked).encode()

    def body_of(self, size: int) -> bytes:
        """A completion request of exactly `size` bytes, with spaces where a re-marshalled one would have none."""
        empty = b'{ "max_tokens" : 4,  "model":' + json.dumps(self.model).encode() + b',"prompt" :"" }'
        return empty[:-3] + self.fresh(max(0, size - len(empty))).encode() + b'" }'
