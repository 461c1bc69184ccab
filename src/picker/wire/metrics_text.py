"""What an engine says about itself over HTTP: its Prometheus text page and its model list.

A scanner, not a parser: of the ~700 lines of a vLLM page it touches the dozen that a decision needs and never looks
into a histogram. Engines differ only in names, so each is one `EngineNames` row. Anything not shown, or shown as NaN
or infinite, is None. No IO, no clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from picker.errors import WireError
from picker.types import LoadObserved, ModelsObserved, Sleep


@dataclass(frozen=True, slots=True)
class EngineNames:
    """How one kind of engine names what we read. Where there are several names, the first one shown wins.

    prefix is common to all names. rank_label: the label with the data-parallel rank; a series without it is rank 0.
    queries, hits: counters in tokens. block_queries: older names whose unit depends on the release (see `_in_tokens`).
    block_size, blocks, capacity: gauges. info: a series whose labels carry the same three as text.
    spare_blocks: blocks in the count that never hold a token. sleep: a series for each state, 1 where it holds; with
    none that holds the engine stands still and keeps its cache.
    """

    prefix: str
    rank_label: str
    waiting: tuple[str, ...]
    running: tuple[str, ...]
    kv_usage: tuple[str, ...]
    queries: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    block_size: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    capacity: tuple[str, ...] = ()
    info: str = ""
    info_block_size: str = ""
    info_blocks: str = ""
    info_capacity: str = ""
    spare_blocks: int = 0
    adapters: str = ""
    sleep: str = ""
    created: tuple[str, ...] = ()

    def series(self) -> Iterator[str]:
        for names in (self.waiting, self.running, self.kv_usage, self.queries, self.hits, self.block_size):
            yield from names
        for names in (self.blocks, self.capacity, self.created):
            yield from names
        yield from (name for name in (self.info, self.adapters, self.sleep) if name)


VLLM = EngineNames(
    prefix="vllm:",
    rank_label="engine",
    waiting=("num_requests_waiting",),
    running=("num_requests_running",),
    kv_usage=("kv_cache_usage_perc", "gpu_cache_usage_perc"),  # renamed in 0.9.2, both shown until 0.10
    # Counters carry _total, except behind exporters that strip it. The gpu_ names lived from 0.8 to 0.11.
    queries=(
        "prefix_cache_queries_total",
        "prefix_cache_queries",
        "gpu_prefix_cache_queries_total",
        "gpu_prefix_cache_queries",
    ),
    hits=("prefix_cache_hits_total", "prefix_cache_hits", "gpu_prefix_cache_hits_total", "gpu_prefix_cache_hits"),
    info="cache_config_info",
    info_block_size="block_size",
    info_blocks="num_gpu_blocks",
    info_capacity="kv_cache_size_tokens",  # hybrid models hold far less than blocks x block size
    spare_blocks=1,  # the null block
    adapters="lora_requests_info",
    sleep="engine_sleep_state",
    created=("prefix_cache_queries_created", "gpu_prefix_cache_queries_created", "prompt_tokens_created"),
)

SGLANG = EngineNames(
    prefix="sglang:",
    rank_label="dp_rank",
    waiting=("num_queue_reqs",),
    running=("num_running_reqs",),
    kv_usage=("token_usage",),
    block_size=("page_size",),  # gauges from 0.5.11 on, labels of cache_config_info before
    blocks=("num_pages",),
    capacity=("max_total_num_tokens",),
    info="cache_config_info",
    info_block_size="page_size",
    info_blocks="num_pages",
)

TRTLLM = EngineNames(
    prefix="trtllm_",
    rank_label="dp_rank",
    waiting=("num_requests_waiting",),
    running=("num_requests_running",),
    kv_usage=("kv_cache_utilization",),
    block_size=("kv_cache_tokens_per_block",),
    blocks=("kv_cache_max_blocks",),
)


def _pattern(engine: EngineNames) -> re.Pattern[bytes]:
    """One expression for all wanted lines of an engine: (name, labels, value); a timestamp or exemplar may follow.

    It begins with a literal newline and prefix, which `re` looks for with a fast search; `^` would be tried at every
    byte and costs seven times as much.
    """
    names = "|".join(sorted(set(engine.series()), key=len, reverse=True))
    # Unrolled, without alternation: a quoted value may hold any of `}`, `,` and escaped quotes.
    labels = r'(?:\{((?:[^"\n}]*"[^"\\\n]*(?:\\.[^"\\\n]*)*")*[^"\n}]*)\})?'
    return re.compile(rf"\n{re.escape(engine.prefix)}({names}){labels}[ \t]+(\S+)".encode())


def _rank_pattern(engine: EngineNames) -> re.Pattern[bytes]:
    # Cannot match inside another label's value: there the quotes would be escaped.
    return re.compile(rf'(?:^|,)\s*{engine.rank_label}\s*=\s*"(\d+)"'.encode())


_SCANNERS = tuple((engine, _pattern(engine), _rank_pattern(engine)) for engine in (VLLM, SGLANG, TRTLLM))
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"([^"\\]*(?:\\.[^"\\]*)*)"')
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_PROCESS_START = re.compile(rb"\nprocess_start_time_seconds(?:\{[^\n}]*\})?[ \t]+(\S+)")
_SAMPLE = re.compile(rb"\n[A-Za-z_:][A-Za-z0-9_:]*(?:\{[^\n]*\})?[ \t]+[-+0-9.NI]\S*")

_ByRank = Mapping[int, float | None]


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """The wanted series of one page, for all the ranks on it: `values[series name][rank]`, None where not finite."""

    engine: EngineNames
    values: Mapping[str, _ByRank]
    info: Mapping[int, Mapping[str, str]]
    adapters: frozenset[str] | None
    max_adapters: int | None
    process_started_at: float | None
    sleep: Mapping[int, Mapping[str, float | None]]

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(rank for by_rank in self.values.values() for rank in by_rank)

    def load(self, *, name: str, observed_at: float, rank: int | None = None) -> LoadObserved:
        """The load of one rank, or of all ranks together: requests, counters and capacity summed, KV usage averaged.

        Raises WireError if the page shows other ranks but not this one.
        """
        if rank is not None and rank not in self.ranks:
            shown = ", ".join(str(known) for known in sorted(self.ranks)) or "none"
            raise WireError(f"no series for data-parallel rank {rank} (ranks shown: {shown})", status=502)
        usage = self._of(self.engine.kv_usage, rank)
        return LoadObserved(
            name=name,
            observed_at=observed_at,
            waiting=_total(self._of(self.engine.waiting, rank)),
            running=_total(self._of(self.engine.running, rank)),
            kv_usage=None if (total := _total(usage)) is None else total / len(usage),
            block_size=self._block_size(rank),
            kv_capacity_tokens=self._capacity(rank),
            queries=_total(self._of(self.engine.queries, rank)),
            hits=_total(self._of(self.engine.hits, rank)),
            started_at=self._started_at(rank),
            adapters=self.adapters,
            max_adapters=self.max_adapters,
            sleep=self._sleep(rank),
        )

    def _sleep(self, rank: int | None) -> Sleep | None:
        """Of all ranks together it is the deepest."""
        shown = self.sleep.values() if rank is None else [self.sleep.get(rank, {})]
        found = {_sleep_of(states) for states in shown}
        return next((each for each in (Sleep.DEEP, Sleep.LIGHT, Sleep.AWAKE) if each in found), None)

    def _of(self, names: tuple[str, ...], rank: int | None) -> list[float | None]:
        """The values of the first of these series that the page shows, of one rank or of all."""
        by_rank = next((self.values[name] for name in names if name in self.values), {})
        return list(by_rank.values()) if rank is None else [by_rank.get(rank)]

    def _infos(self, rank: int | None) -> list[Mapping[str, str]]:
        return list(self.info.values()) if rank is None else [self.info.get(rank, {})]

    def _block_size(self, rank: int | None) -> int | None:
        gauges = {_whole(value) for value in self._of(self.engine.block_size, rank)}
        labels = {_whole(_number(labels.get(self.engine.info_block_size))) for labels in self._infos(rank)}
        known = (gauges | labels) - {None}
        return known.pop() if len(known) == 1 else None

    def _capacity(self, rank: int | None) -> int | None:
        gauge = _total(self._of(self.engine.capacity, rank))
        if gauge is None:
            gauge = _total([_number(labels.get(self.engine.info_capacity)) for labels in self._infos(rank)])
        return _whole(gauge) or self._capacity_of_blocks(rank)

    def _capacity_of_blocks(self, rank: int | None) -> int | None:
        counts = self._of(self.engine.blocks, rank)
        if _total(counts) is None:
            counts = [_number(labels.get(self.engine.info_blocks)) for labels in self._infos(rank)]
        blocks, block_size = _whole(_total(counts)), self._block_size(rank)
        if blocks is None or block_size is None:
            return None
        return (blocks - self.engine.spare_blocks * len(counts)) * block_size or None

    def _started_at(self, rank: int | None) -> float | None:
        if self.process_started_at is not None:
            return self.process_started_at
        shown = [self._of((name,), rank) for name in self.engine.created]
        return min((value for values in shown for value in values if value), default=None)


def scan_metrics(text: bytes) -> MetricsPage:
    """Find what we know in a Prometheus text page (`text/plain; version=0.0.4` or 1.0.0, or OpenMetrics).

    Raises WireError when it is not such a page, or one without a single series of an engine we know. Where a rank
    has several series of one name, the largest counts: SGLang repeats a rank's value per tensor-parallel rank, and
    shows parts of it by priority beside the total.
    """
    return MetricsReader().read(text)


def decode_metrics(text: bytes, *, name: str, observed_at: float, rank: int | None = None) -> LoadObserved:
    """`scan_metrics` and `MetricsPage.load` in one; raises WireError as they do."""
    return scan_metrics(text).load(name=name, observed_at=observed_at, rank=rank)


class _Line(NamedTuple):
    """A line that was found. beginning: all before its value, and the newline before it. at: where it begins."""

    name: bytes
    labels: bytes
    beginning: bytes
    at: int


_PROCESS = b"process_start_time_seconds"
_DRIFT = 1024  # bytes that a line moves when numbers before it get longer
_LINE = 24  # bytes that any line has, and more than numbers grow by from one page to the next
_TRUST = 60  # pages


class MetricsReader:
    """Reads the pages of one server, as `scan_metrics` does, each by what was found on the one before.

    From one page to the next a few numbers change and hardly ever a line, so that what was found is looked for where it
    was: a tenth of the time. A page with another number of lines, or one on which a line is not at its place, is
    searched as if it were the first, and so is one in sixty in any case. Lines are not counted where the page is as
    long as before, give or take less than a line.
    """

    __slots__ = ("_engine", "_lines", "_newlines", "_page", "_rank", "_size", "_trust", "_values")

    def __init__(self) -> None:
        self._lines: list[_Line] = []
        self._values: list[bytes] = []
        self._newlines = -1
        self._size = -_LINE
        self._trust = 0
        self._engine, _, self._rank = _SCANNERS[0]
        self._page: MetricsPage | None = None

    def read(self, text: bytes) -> MetricsPage:
        """What the page shows: the same object as before where nothing has changed. Raises WireError."""
        values = self._look(text) if self._trust and self._is_alike(text) else None
        if values is None:
            values = self._search(text)
        self._size = len(text)
        self._trust -= 1
        if self._page is None or values != self._values:
            self._values = values
            found = [(line.name, line.labels, value) for line, value in zip(self._lines, values, strict=True)]
            self._page = _collect(text, self._engine, self._rank, found)
        return self._page

    def _is_alike(self, text: bytes) -> bool:
        """As many lines as before."""
        return abs(len(text) - self._size) < _LINE or text.count(b"\n") == self._newlines

    def _look(self, text: bytes) -> list[bytes] | None:
        """The values of the lines, where all of them are at about their places."""
        values = []
        for line in self._lines:
            start = max(line.at - _DRIFT, 0)
            at = text.find(line.beginning, start, start + 2 * _DRIFT + len(line.beginning))
            value = at + len(line.beginning)
            end = text.find(b"\n", value)
            if at < 0 or end < 0:
                return None
            words = text[value:end].split(None, 1)
            if not words:
                return None
            values.append(words[0])
        return values

    def _search(self, text: bytes) -> list[bytes]:
        """The values of all lines that matter, which are noted."""
        self._page, self._trust = None, 0
        page = b"\n" + text  # so that the first line begins like all others
        for self._engine, pattern, self._rank in _SCANNERS:
            if found := list(pattern.finditer(page)):
                break
        else:
            raise _refusal(text, page)
        # Places in the text: the page has a byte more in front, and so has what a line begins with.
        self._lines = [
            _Line(match[1], match[2] or b"", page[match.start() : match.start(3)], match.start() - 1) for match in found
        ]
        values = [match[3] for match in found]
        if (match := _PROCESS_START.search(page)) is not None:
            self._lines.append(_Line(_PROCESS, b"", page[match.start() : match.start(1)], match.start() - 1))
            values.append(match[1])
        self._newlines, self._trust = text.count(b"\n"), _TRUST
        return values


def _collect(
    page: bytes, engine: EngineNames, rank_pattern: re.Pattern[bytes], found: list[tuple[bytes, bytes, bytes]]
) -> MetricsPage:
    values: dict[str, dict[int, float | None]] = {}
    info: dict[int, Mapping[str, str]] = {}
    adapters: list[tuple[float, Mapping[str, str]]] = []
    started = None
    sleep: dict[int, dict[str, float | None]] = {}
    for raw_name, raw_labels, raw_value in found:
        name, value = raw_name.decode(), _number(raw_value)
        shown_rank = rank_pattern.search(raw_labels)
        rank = int(shown_rank[1]) if shown_rank else 0
        if raw_name is _PROCESS:
            started = value
        elif name == engine.adapters:
            adapters.append((value or 0.0, _labels(raw_labels)))
        elif name == engine.sleep:
            sleep.setdefault(rank, {})[_labels(raw_labels).get("sleep_state", "")] = value
        elif name == engine.info:
            info[rank] = _labels(raw_labels)
        elif _in_tokens(name, page):
            by_rank = values.setdefault(name, {})
            by_rank[rank] = _larger(by_rank.get(rank), value)
    # A series per combination of adapters ever seen, its value the time it was last true: the newest one holds.
    newest = max(adapters, key=lambda pair: pair[0])[1] if adapters else None
    return MetricsPage(
        engine=engine,
        values=values,
        info=info,
        adapters=None if newest is None else _adapters(newest),
        max_adapters=None if newest is None else _whole(_number(newest.get("max_lora"))),
        process_started_at=started,
        sleep=sleep,
    )


def _sleep_of(states: Mapping[str, float | None]) -> Sleep | None:
    """vLLM's levels: 0 pauses the engine, 1 offloads its weights, 2 discards them; from 1 on the cache is gone."""
    if states.get("awake") is None:
        return None
    if states["awake"]:
        return Sleep.AWAKE
    return Sleep.DEEP if states.get("weights_offloaded") or states.get("discard_all") else Sleep.LIGHT


def _larger(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def _in_tokens(name: str, page: bytes) -> bool:
    """False for the prefix counters of vLLM 0.8: named as later ones in tokens, but in blocks; only HELP says so."""
    return not (name.startswith("gpu_prefix_cache") and b"queried blocks" in page)


def _labels(raw: bytes) -> dict[str, str]:
    labels = dict(_LABEL.findall(raw.decode("utf-8", "replace")))
    if b"\\" in raw:
        labels = {key: _ESCAPE.sub(_unescaped, value) for key, value in labels.items()}
    return labels


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def _adapters(labels: Mapping[str, str]) -> frozenset[str]:
    """vLLM puts every adapter with a running or waiting request into both lists."""
    lists = (labels.get("running_lora_adapters", ""), labels.get("waiting_lora_adapters", ""))
    return frozenset(name.strip() for names in lists for name in names.split(",") if name.strip())


def _number(raw: bytes | str | None) -> float | None:
    """A finite number of at least 0, which is all that these series ever mean; "None", NaN and +Inf are None."""
    try:
        value = float(raw) if raw is not None else math.nan
    except ValueError:
        return None
    return value if 0.0 <= value < math.inf else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _total(values: list[float | None]) -> float | None:
    """The sum, or None where there is nothing or any part is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _refusal(text: bytes, page: bytes) -> WireError:
    start = text[:256].lstrip()[:1]
    if not start:
        what = "the page is empty"
    elif start == b"<":
        what = "HTML, not Prometheus text"
    elif start in (b"{", b"["):
        what = "JSON, not Prometheus text"
    elif _SAMPLE.search(page) is None:
        what = "not Prometheus text"
    else:
        known = " or ".join(f"{engine.prefix}*" for engine, _, _ in _SCANNERS)
        what = f"none of the series we know ({known}); are the engine's metrics switched off?"
    return WireError(what, status=502)


# --- /v1/models --------------------------------------------------------------------------------------------


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None  # null for LoRA adapters
    parent: str | None = None  # what an adapter is an adapter of


class _ModelList(msgspec.Struct):
    data: list[_Model]


_MODEL_LIST = msgspec.json.Decoder(_ModelList)


def decode_models(body: bytes, *, name: str) -> ModelsObserved:
    """Read the answer of `GET /v1/models`: every served name and adapter (a model with a parent), and the
    smallest context length shown.

    Raises WireError when it is not an OpenAI model list.
    """
    try:
        models = _MODEL_LIST.decode(body).data
    except msgspec.DecodeError as error:
        raise WireError(f"not a model list: {error}", status=502) from error
    lengths = [model.max_model_len for model in models if model.max_model_len is not None]
    return ModelsObserved(
        name,
        frozenset(model.id for model in models),
        min(lengths, default=None),
        frozenset(model.id for model in models if model.parent is not None),
    )
