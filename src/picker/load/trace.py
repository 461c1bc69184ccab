"""Recorded traffic as a plan: Mooncake's JSON lines with prefix blocks, Azure's CSV of lengths, and access logs.

`load` reads a file; the rest is pure: lines come in, a `Plan` goes out. None of the formats carries text: equal prefix
blocks get equal text, everything else gets text of its own. A line that cannot be used is named by its number: it is a
`ConfigError`, or left out where somebody listens.
"""

from __future__ import annotations

import csv
import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np

from picker.errors import ConfigError
from picker.load.text import Piece, key
from picker.load.workload import FloatArray, Plan, Planned, Turn

# Tokens of one hashed block in Mooncake's published traces.
BLOCK_TOKENS = 512
# The conversation and tool-agent traces have time stamps on a grid of three seconds.
TICK = 3.0


class TraceFormat(enum.Enum):
    """The value is the flag's word."""

    MOONCAKE = "mooncake"
    AZURE_CSV = "azure-csv"
    ACCESS_LOG = "access-log"

    @classmethod
    def of_path(cls, path: Path) -> TraceFormat:
        return cls.AZURE_CSV if path.suffix.lower() == ".csv" else cls.MOONCAKE


OnBroken = Callable[[str], None]
"""Told what is wrong with a line, with its number; the line is left out."""


@dataclass(frozen=True, slots=True)
class Traced:
    """One request of a trace. at: seconds from the first. blocks: ids of its prompt blocks, or None if unknown."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None


def sniff(path: Path) -> TraceFormat:
    """The format of a file by its name and its first line. Raises ConfigError."""
    named = TraceFormat.of_path(path)
    if named is TraceFormat.AZURE_CSV:
        return named
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    is_log = line.lstrip().startswith(b"{") and b'"hash_ids"' not in line
    return TraceFormat.ACCESS_LOG if is_log else named


def load(path: Path, trace_format: TraceFormat | None = None, *, on_broken: OnBroken | None = None) -> list[Traced]:
    """The requests of a trace file; its format follows from its name unless it is given. Raises ConfigError.

    on_broken: told of lines that cannot be used, which are left out; without it the first is an error.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse(lines, trace_format or TraceFormat.of_path(path), path=str(path), on_broken=on_broken)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None


def parse(
    lines: Iterable[str], trace_format: TraceFormat, *, path: str, on_broken: OnBroken | None = None
) -> list[Traced]:
    """The requests of a trace in the order of the file. `path` names the file in errors."""
    broken = on_broken or _refuse
    match trace_format:
        case TraceFormat.MOONCAKE:
            requests = list(_mooncake(lines, path, broken))
        case TraceFormat.AZURE_CSV:
            requests = list(_azure(lines, path, broken))
        case TraceFormat.ACCESS_LOG:
            requests = _from_zero(list(_access_log(lines, path, broken)))
    if not requests:
        raise ConfigError(f"{path}: the trace has no requests")
    return requests


def _refuse(complaint: str) -> NoReturn:
    raise ConfigError(complaint)


def plan(
    requests: list[Traced],
    rng: np.random.Generator,
    *,
    name: str,
    seed: int,
    limit: int | None = None,
    rate_scale: float = 1.0,
    max_tokens: int | None = None,
) -> Plan:
    """A plan that sends the first `limit` requests at `rate_scale` times their recorded rate.

    Time stamps on Mooncake's 3 s grid are spread over their tick: replayed raw, ten requests would come at once
    every three seconds. Within a tick the order of the file is kept, so a prefix is still sent before what extends it.
    max_tokens: upper limit for the answers; None keeps the recorded lengths.
    """
    if not rate_scale > 0:
        raise ConfigError(f"the rate scale must be positive, not {rate_scale:g}")
    spread = _spread(requests, rng)
    order = np.argsort(spread, kind="stable")[:limit]
    start = float(spread[order[0]])
    conversations = tuple(
        _planned(requests[i], number=int(i), at=(float(spread[i]) - start) / rate_scale, seed=seed, longest=max_tokens)
        for i in order
    )
    return Plan(name=name, conversations=conversations, source_requests=len(requests))


def _spread(requests: list[Traced], rng: np.random.Generator) -> FloatArray:
    ticks = np.array([request.at for request in requests])
    if len(ticks) < 2 or np.any(np.abs(ticks / TICK - np.round(ticks / TICK)) > 1e-9):
        return ticks
    times = ticks + rng.uniform(0.0, TICK, len(ticks))
    spread = np.empty_like(times)
    spread[np.argsort(ticks, kind="stable")] = times[np.lexsort((times, ticks))]
    return spread


def _planned(request: Traced, *, number: int, at: float, seed: int, longest: int | None) -> Planned:
    output = request.output_tokens if longest is None else min(request.output_tokens, longest)
    return Planned(at=at, turns=(Turn(_prompt(request, number, seed), max_tokens=max(1, output)),))


def _prompt(request: Traced, number: int, seed: int) -> tuple[Piece, ...]:
    if request.blocks is None:
        return (Piece(key(seed, "request", number), request.prompt_tokens),)
    last = request.prompt_tokens - BLOCK_TOKENS * (len(request.blocks) - 1)
    sizes = [BLOCK_TOKENS] * (len(request.blocks) - 1) + [last]
    return tuple(Piece(key(seed, "block", block), size) for block, size in zip(request.blocks, sizes, strict=True))


# --- Mooncake -------------------------------------------------------------------------------------------------


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # milliseconds
    input_length: int  # tokens
    output_length: int  # tokens
    hash_ids: list[int]


def _mooncake(lines: Iterable[str], path: str, broken: OnBroken) -> Iterator[Traced]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _traced(decoder.decode(line))
        except (msgspec.MsgspecError, ValueError) as error:
            broken(f"{path}, line {number}: {error}")


def _traced(entry: _MooncakeLine) -> Traced:
    """Raises ValueError where lengths and blocks do not agree."""
    blocks = -(-entry.input_length // BLOCK_TOKENS)
    if entry.input_length < 1 or len(entry.hash_ids) != blocks:
        raise ValueError(
            f"input_length {entry.input_length} needs {max(blocks, 1)} hash_ids "
            f"(one for each {BLOCK_TOKENS} tokens), the line has {len(entry.hash_ids)}"
        )
    return Traced(
        at=entry.timestamp / 1000.0,
        prompt_tokens=entry.input_length,
        output_tokens=entry.output_length,
        blocks=tuple(entry.hash_ids),
    )


# --- Azure ----------------------------------------------------------------------------------------------------

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _azure(lines: Iterable[str], path: str, broken: OnBroken) -> Iterator[Traced]:
    rows = csv.DictReader(lines)
    missing = [column for column in _AZURE_COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path}, line 1: the header lacks the column {missing[0]}")
    start: datetime | None = None
    for row in rows:
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"])
            start = start or at
            since = (at - start).total_seconds()
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (TypeError, ValueError) as error:
            broken(f"{path}, line {rows.line_num}: {error}")
            continue
        # A prompt of no tokens is no prompt: the published traces have none, cut-down copies may.
        yield Traced(at=since, prompt_tokens=max(1, prompt), output_tokens=output)


# --- access logs ----------------------------------------------------------------------------------------------

# Names by which logs call the same thing; the first that a line has counts.
_TIME = ("time", "timestamp", "ts", "at", "started_at", "arrived_at", "@timestamp")
_PROMPT = ("prompt_tokens", "input_tokens", "input_length", "context_tokens", "ContextTokens")
_OUTPUT = ("output_tokens", "completion_tokens", "output_length", "generated_tokens", "GeneratedTokens")
# Numbers above these are an epoch in milliseconds, and in nanoseconds: none is in seconds before the year 5000.
_MILLISECONDS, _NANOSECONDS = 1e11, 1e15


def _access_log(lines: Iterable[str], path: str, broken: OnBroken) -> Iterator[Traced]:
    """JSON lines with a time and the tokens of prompt and answer, these also inside a `usage`; the rest is ignored."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
            if entry.get("method", "POST") == "POST":  # others ask for no tokens
                yield _logged(entry)
        except (msgspec.MsgspecError, ValueError) as error:
            broken(f"{path}, line {number}: {error}")


def _logged(entry: dict[str, Any]) -> Traced:
    usage = entry.get("usage")
    counts = {**entry, **usage} if isinstance(usage, dict) else entry
    if counts.get("prompt_bytes") is not None:
        # Of an answer that failed the engine has told no tokens.
        counts = {"prompt_tokens": int(counts["prompt_bytes"]) // 4, "output_tokens": 1, **_known(counts)}
    return Traced(
        at=seconds(_first(entry, _TIME)),
        prompt_tokens=max(1, int(_first(counts, _PROMPT))),
        output_tokens=int(_first(counts, _OUTPUT)),
    )


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    value = next((entry[name] for name in names if entry.get(name) is not None), None)
    if value is None or isinstance(value, (dict, list)):
        raise ValueError(f"there is no {names[0]} (nor {', '.join(names[1:3])}, ...)")
    return value


def seconds(value: Any) -> float:
    """A time as a number of seconds, milliseconds or nanoseconds, or as ISO 8601 says it; zones default to UTC."""
    if isinstance(value, str):
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    number = float(value)
    return number / 1e9 if number > _NANOSECONDS else number / 1e3 if number > _MILLISECONDS else number


def _from_zero(requests: list[Traced]) -> list[Traced]:
    """Logs are written when answers end: in order of time, from the first on."""
    start = min((request.at for request in requests), default=0.0)
    return sorted((replace(request, at=request.at - start) for request in requests), key=lambda each: each.at)
