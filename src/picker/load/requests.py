"""Requests of the user's own, with their text: JSON lines of OpenAI bodies, and conversations as ShareGPT has them.

`load` reads a file; the rest is pure. Bodies are sent as they are but for model and streaming; a line may have the time
at which it came. Conversations are sent turn by turn, on the answers that really come. A line that cannot be used is
named by its number and left out.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from picker.errors import ConfigError
from picker.load.text import Words
from picker.load.trace import OnBroken, seconds
from picker.load.workload import Planned, Turn

_TIMES = ("timestamp", "time", "at")
_HUMAN = ("human", "user")
_MODEL = ("gpt", "assistant", "chatgpt", "bard", "bing")


class RequestFormat(enum.Enum):
    """The value is the flag's word."""

    OPENAI = "openai"
    SHAREGPT = "sharegpt"


@dataclass(frozen=True, slots=True)
class Asked:
    """Conversations in the order of the file; at: seconds from the first where the file has times, else None."""

    conversations: tuple[Planned, ...]
    timed: bool


def sniff(path: Path) -> RequestFormat | None:
    """The format of a file that holds requests with text; None when it holds none. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16).lstrip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    line = head.split(b"\n", 1)[0]
    if head.startswith(b"[") or b'"conversations"' in line:
        return RequestFormat.SHAREGPT
    has_text = any(word in line for word in (b'"messages"', b'"prompt":', b'"prompt" :', b'"body"'))
    return RequestFormat.OPENAI if has_text and b'"hash_ids"' not in line else None


def load(path: Path, kind: RequestFormat, *, max_tokens: int | None, on_broken: OnBroken) -> Asked:
    """The conversations of a file. max_tokens: of an answer at most. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    parse = _openai if kind is RequestFormat.OPENAI else _sharegpt
    planned = list(_usable(_entries(data, str(path), on_broken), parse, max_tokens, str(path), on_broken))
    if not planned:
        raise ConfigError(f"{path}: holds no request that can be sent")
    timed = all(at is not None for at, _ in planned)
    start = min((at or 0.0) for at, _ in planned) if timed else 0.0
    conversations = [Planned(at=(at or 0.0) - start if timed else 0.0, turns=turns) for at, turns in planned]
    return Asked(tuple(sorted(conversations, key=lambda each: each.at)), timed)


_Usable = tuple[float | None, tuple[Turn, ...]]


def _entries(data: bytes, path: str, on_broken: OnBroken) -> Iterator[tuple[str, Any]]:
    """(where, JSON value) of each entry of an array, or of each line."""
    if data.lstrip().startswith(b"["):
        try:
            values = msgspec.json.decode(data, type=list[Any])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: {error}") from None
        yield from ((f"entry {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", msgspec.json.decode(line)
            except msgspec.MsgspecError as error:
                on_broken(f"{path}, line {number}: {error}")


def _usable(
    entries: Iterator[tuple[str, Any]], parse: Any, max_tokens: int | None, path: str, on_broken: OnBroken
) -> Iterator[_Usable]:
    for where, value in entries:
        try:
            if not isinstance(value, dict):
                raise ValueError("is not an object")
            yield parse(value, max_tokens)
        except (ValueError, TypeError) as error:
            on_broken(f"{path}, {where}: {error}")


def _openai(entry: dict[str, Any], max_tokens: int | None) -> _Usable:
    """A body, bare or as the `body` of an entry of OpenAI's batch files."""
    body = entry.get("body", entry)
    if not isinstance(body, dict) or not (isinstance(body.get("messages"), list) or body.get("prompt")):
        raise ValueError("has neither messages nor a prompt")
    at = next((seconds(entry[name]) for name in _TIMES if entry.get(name) is not None), None)
    request = {name: value for name, value in body.items() if name not in _TIMES}
    if max_tokens is not None:
        request["max_tokens"] = min(max_tokens, request.get("max_tokens") or max_tokens)
        request.pop("max_completion_tokens", None)
    answer = request.get("max_tokens") or request.get("max_completion_tokens") or 1
    return at, (Turn((Words(_text(body)),), int(answer), raw=msgspec.json.encode(request)),)


def _text(body: dict[str, Any]) -> str:
    """What the prompt says, for estimating its length."""
    messages = body.get("messages") or [{"content": body.get("prompt")}]
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return "\n".join(content if isinstance(content, str) else str(content or "") for content in contents)


def _sharegpt(entry: dict[str, Any], max_tokens: int | None) -> _Usable:
    """Question and answer in turn; the recorded answers give the lengths of those that are asked for."""
    turns: list[Turn] = []
    question: str | None = None
    for said in entry.get("conversations") or entry.get("messages") or []:
        who, text = said.get("from") or said.get("role"), said.get("value") or said.get("content") or ""
        if who in _HUMAN:
            question = text
        elif who in _MODEL and question:
            tokens = max(1, Words(text).tokens)
            turns.append(Turn((Words(question),), tokens if max_tokens is None else min(tokens, max_tokens)))
            question = None
    if not turns:
        raise ValueError("has no question with an answer")
    return None, tuple(turns)
