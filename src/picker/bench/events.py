"""KV events into the index of exact prefixes, and prompts matched with it: one row for each number of endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from picker.bench.block_index import filled, matching, memory
from picker.bench.exact_match import Chats, exact_matching, nothing_matched
from picker.bench.ingestion import ingestion
from picker.errors import ConfigError

ENDPOINTS = (10, 100, 1000)
BLOCKS = 1_000_000
# What the tables show, one below the other: by heading, the columns after the first.
TABLES = {
    "events": ("events_per_s", "prefill_events_per_s", "generated_events_per_s"),
    "microseconds of one event": ("decode_us", "spell_us", "index_us", "dict_us", "judge_p50_us"),
    "memory": ("bytes_per_block", "shared_bytes_per_block", "dict_bytes_per_block"),
    "match": ("match_p50_us", "dict_match_p50_us", "match_400k_p50_us", "dict_match_400k_p50_us"),
    "exact, from the body on": (
        *("exact_32k_p50_us", "exact_32k_read_p50_us", "exact_32k_tokens_p50_us"),
        *("exact_400k_p50_us", "exact_400k_read_p50_us", "exact_400k_tokens_p50_us"),
    ),
}


def rows(
    *,
    endpoints: Sequence[int] = ENDPOINTS,
    blocks: int = BLOCKS,
    events: int = 200_000,
    repeats: int = 200,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """blocks: in all, of the memory figures and the matches. events: blocks of the timed ones.

    The dict of sets knows blocks by the engines' hashes, as indexes do that tokenise and hash each prompt before: that
    is not counted for `match`, which is the walk alone, and is for `exact`.
    """
    try:
        chats = Chats.made()
    except ConfigError as error:  # without the extra `exact`
        warn(str(error))
        chats = None
    for count in endpoints:
        rng = np.random.default_rng(seed)
        progress(f"{count} endpoints: events")
        figures = {"endpoints": count, **ingestion(count, events, rng)}
        progress(f"{count} endpoints: memory and matching")
        figures |= memory(count, blocks, rng) | matching(count, blocks, repeats, rng)
        progress(f"{count} endpoints: exact matching")
        if chats is None:
            figures |= nothing_matched()
        else:
            figures |= exact_matching(chats, count, repeats, filled(count, blocks, rng)[0], rng)
        yield figures | {"repeats": repeats}
