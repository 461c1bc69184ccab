"""Recorded traffic as a plan: Mooncake's JSON lines with prefix blocks, and Azure's CSV of lengths.

`load` reads a file; the rest is pure: lines come in, a `Plan` goes out. Neither format carries text: equal prefix
blocks get equal text, everything else gets text of its own. A line that cannot be used is a `ConfigError` with its
number.
"""

from __future__ import annotations

import csv
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

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

    @classmethod
    def of_path(cls, path: Path) -> TraceFormat:
        return cls.AZURE_CSV if path.suffix.lower() == ".csv" else cls.MOONCAKE


@dataclass(frozen=True, slots=True)
class Traced:
    """One request of a trace. at: seconds from the first. blocks: ids of its prompt blocks, or None if unknown."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] | None = None


def load(path: Path, trace_format: TraceFormat | None = None) -> list[Traced]:
    """The requests of a trace file; its format follows from its name unless it is given. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8") as lines:
            return parse(lines, trace_format or TraceFormat.of_path(path), path=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file") from None


def parse(lines: Iterable[str], trace_format: TraceFormat, *, path: str) -> list[Traced]:
    """The requests of a trace in the order of the file. `path` names the file in errors."""
    match trace_format:
        case TraceFormat.MOONCAKE:
            requests = list(_mooncake(lines, path))
        case TraceFormat.AZURE_CSV:
            requests = list(_azure(lines, path))
    if not requests:
        raise ConfigError(f"{path}: the trace has no requests")
    return requests


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


def _mooncake(lines: Iterable[str], path: str) -> Iterator[Traced]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        blocks = -(-entry.input_length // BLOCK_TOKENS)
        if entry.input_length < 1 or len(entry.hash_ids) != blocks:
            raise ConfigError(
                f"{path}, line {number}: input_length {entry.input_length} needs {max(blocks, 1)} hash_ids "
                f"(one for each {BLOCK_TOKENS} tokens), the line has {len(entry.hash_ids)}"
            )
        yield Traced(
            at=entry.timestamp / 1000.0,
            prompt_tokens=entry.input_length,
            output_tokens=entry.output_length,
            blocks=tuple(entry.hash_ids),
        )


# --- Azure ----------------------------------------------------------------------------------------------------

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _azure(lines: Iterable[str], path: str) -> Iterator[Traced]:
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
            raise ConfigError(f"{path}, line {rows.line_num}: {error}") from None
        # A prompt of no tokens is no prompt: the published traces have none, cut-down copies may.
        yield Traced(at=since, prompt_tokens=max(1, prompt), output_tokens=output)
