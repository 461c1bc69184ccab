"""Makes prompts as long in the model's tokens as they are planned: exactly by its tokenizer, or calibrated without.

Owns reading a vocabulary and asking the server how long a text is. The text itself is `load.text`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picker.errors import ConfigError
from picker.load.client import Client, UnreachableError
from picker.load.text import PLAIN, Piece, PseudoWords, Vocabulary, key

# A word with the blank before it, as byte-level BPE and as SentencePiece write it.
_WORD = re.compile("[\u0120\u2581]([a-z]{3,9})")
_MOST_WORDS = 4096
_FEWEST_WORDS = 64
# Prompts by which the server is asked how many tokens it makes of our text; their difference leaves out the template.
_PROBES = (64, 576)
# Closer than this to four bytes a token is four bytes a token: the simulated pods.
_EXACT = 0.01
# Classes of failure that no other request would escape.
_HOPELESS = ("http-400", "http-401", "http-403", "http-404", "http-405", "http-422", "not-a-stream", "not-an-answer")


def vocabulary(folder: Path) -> Vocabulary:
    """Words that are one token each for the tokenizer in `folder` (its tokenizer.json). Raises ConfigError."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ConfigError("--tokenizer needs the tokenizers library: pip install tokenizers") from None
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    if not file.is_file():
        raise ConfigError(f"--tokenizer: there is no {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises a bare Exception for a file that it cannot read.
        raise ConfigError(f"--tokenizer: {file} is not a tokenizer: {error}") from None
    return Vocabulary(_single_tokens(tokenizer, file))


def _single_tokens(tokenizer: Any, file: Path) -> tuple[str, ...]:
    candidates = sorted(" " + found[1] for token in tokenizer.get_vocab() if (found := _WORD.fullmatch(token)))
    # Spread over the alphabet: a hundred words that all begin alike would make an odd text.
    candidates = candidates[:: max(1, len(candidates) // _MOST_WORDS)][:_MOST_WORDS]
    before = _count(tokenizer, "so")
    words = tuple(word for word in candidates if _count(tokenizer, "so" + word) == before + 1)
    if len(words) < _FEWEST_WORDS or _count(tokenizer, "so" + "".join(words)) != before + len(words):
        raise ConfigError(f"--tokenizer: {file} has no words that are one token each; leave it out to calibrate")
    return words


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


async def calibrated(client: Client) -> PseudoWords:
    """Pseudo-words of which the server's model makes as many tokens as planned.

    Asks two short requests. Raises UnreachableError when the server refuses them as it would any other; where it does
    not answer otherwise or counts no tokens, a token stays four bytes.
    """
    counts = [await _prompt_tokens(client, units) for units in _PROBES]
    return PseudoWords(_units_per_token(_PROBES, counts))


async def _prompt_tokens(client: Client, units: int) -> int:
    text = PLAIN.render([Piece(key("calibration", units), units)])
    record, _ = await client.ask(client.body([("user", text)], 1), intended_at=client.clock())
    if record.error in _HOPELESS:
        raise UnreachableError(f"{client.target.url} refuses a first request: {record.error}: {record.detail}")
    return 0 if record.error else record.prompt_tokens


def _units_per_token(units: Sequence[int], tokens: Sequence[int]) -> float:
    if not all(tokens) or tokens[1] <= tokens[0]:
        return 1.0
    ratio = (units[1] - units[0]) / (tokens[1] - tokens[0])
    return 1.0 if abs(ratio - 1.0) < _EXACT else ratio
