"""A small language model's files, made on the spot, and long conversations with it: what exact matching is timed on.

The tokenizer is trained here on made-up text: byte-level BPE cut by Qwen's pattern, with ChatML's special tokens. The
template is written after Qwen's. Nothing is downloaded and no real text is used.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from picker.tokenizers.libraries import library
from picker.tokenizers.model import LocalModel, load_model
from picker.types import Call, CallKind

NAME = "bench"

_VOCABULARY = 1_200
_TRAINED_ON = 3_000  # lines
_WORDS = 6_000
_TURN = 1_500  # bytes of a message, on average
_TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SYLLABLES = ("ba", "con", "de", "er", "ful", "gra", "hi", "ing", "ka", "lo", "men", "ne", "or", "pre", "qui", "re")
_ENDINGS = ("", "", "s", "ed", "ly", "tion", "ing", "er", "ness")
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Get the {name} of a thing by its number.",
            "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
        },
    }
    for name in ("price", "weight", "place", "owner")
]


class Prose:
    """Lines of made-up words, of which few are frequent, with numbers, marks and code among them."""

    def __init__(self, seed: int) -> None:
        fixed = random.Random(0)
        self._words = list({self._word(fixed) for _ in range(_WORDS)})
        self._words.sort()
        fixed.shuffle(self._words)
        self._weights = [1 / (rank + 2.7) for rank in range(len(self._words))]  # Zipf's law, as Mandelbrot has it
        self._chance = random.Random(seed)

    def line(self) -> str:
        chance = self._chance
        words = chance.choices(self._words, self._weights, k=chance.randint(4, 18))
        kind = chance.random()
        if kind < 0.12:
            return f"    {words[0]}_{words[1]} = self.{words[2]}({words[3]!r}, {chance.randint(0, 99_999)})\n"
        if kind < 0.25:
            words[chance.randrange(len(words))] = str(chance.randint(0, 9_999))
        text = " ".join(words)
        return f"{text[:1].upper()}{text[1:]}{chance.choice(('.', '.', '.', '?', '!', ':', ', and so on.'))}\n"

    def text(self, size: int) -> str:
        """Lines of so many bytes, or a few more."""
        lines = [self.line()]
        left = size - len(lines[0])
        while left > 0:
            lines.append(self.line())
            left -= len(lines[-1])
        return "".join(lines)

    @staticmethod
    def _word(chance: random.Random) -> str:
        return "".join(chance.choices(_SYLLABLES, k=chance.randint(1, 3))) + chance.choice(_ENDINGS)


def made_model() -> LocalModel:
    """Train a tokenizer and load it as a model's folder is loaded. Raises ConfigError without the extra `exact`."""
    library("jinja2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(_trained(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": _SPECIAL[2], "chat_template": _TEMPLATE}), encoding="utf-8"
        )
        return load_model(folder, seconds=time.monotonic, today=datetime.now)


def _trained() -> str:
    made: Any = library("tokenizers")
    tokenizer = made.Tokenizer(made.models.BPE())
    tokenizer.normalizer = made.normalizers.NFC()
    bare = made.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = made.pre_tokenizers.Split(made.Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = made.pre_tokenizers.Sequence([cut, bare])
    tokenizer.decoder = made.decoders.ByteLevel()
    trainer = made.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=made.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose = Prose(seed=1)
    tokenizer.train_from_iterator([prose.line() for _ in range(_TRAINED_ON)], trainer)
    found: str = tokenizer.to_str()
    return found


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: a system message first, then a user and an assistant in turn; the last is a new one of the user."""

    messages: list[dict[str, str]]

    @classmethod
    def of(cls, size: int, prose: Prose) -> Conversation:
        """So many bytes of text: an eighth in the system message, the rest in turns."""
        messages = [{"role": "system", "content": prose.text(size // 8)}]
        left = size - len(messages[0]["content"])
        while left > _TURN // 2:
            role = "assistant" if messages[-1]["role"] == "user" else "user"
            messages.append({"role": role, "content": prose.text(min(_TURN, left))})
            left -= len(messages[-1]["content"])
        if messages[-1]["role"] == "assistant":
            messages.append({"role": "user", "content": prose.text(100)})
        return cls(messages)

    def call(self) -> Call:
        """The request for the next answer."""
        return _call(self.messages)

    def before(self) -> Call:
        """The request before, whose blocks engines still hold."""
        return _call(self.messages[:-2])


def _call(messages: list[dict[str, str]]) -> Call:
    body = {"model": NAME, "messages": messages, "tools": _TOOLS, "stream": True, "max_tokens": 256}
    return Call(CallKind.CHAT, NAME, body=json.dumps(body).encode())
