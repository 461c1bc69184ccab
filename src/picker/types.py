"""The nouns that all of picker speaks in: what is routed, what is decided, and the facts a scheduler is told.

Plain values only: nothing here acts, reads a clock or knows a wire format. Times are float seconds on one
monotonic clock and end in `_at`; durations are float seconds. `None` means unknown or absent, never zero.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float64]
ScoreArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
NO_BLOCKS: UInt64Array = np.empty(0, dtype=np.uint64)


# What every request makes anew is a struct: a frozen dataclass with as many fields takes eight times as long to make.


def _repr_without(*hidden: str) -> Callable[[msgspec.Struct], str]:
    """A `__repr__` that leaves out what nobody may read in a log, or nobody wants to."""

    def told(of: msgspec.Struct) -> str:
        fields = [f"{name}={getattr(of, name)!r}" for name in of.__struct_fields__ if name not in hidden]
        return f"{type(of).__name__}({', '.join(fields)})"

    return told


def _same(one: msgspec.Struct, other: msgspec.Struct, *, but: str) -> bool:
    """Whether two of a kind are equal in every field but one."""
    return all(getattr(one, name) == getattr(other, name) for name in one.__struct_fields__ if name != but)


# --- endpoints ---------------------------------------------------------------------------------------------


class Role(enum.Enum):
    """What an endpoint may be asked to do (llm-d's `llm-d.ai/role` label)."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine that serves requests: an address and, behind it, a data-parallel rank.

    name: identity, unique in the pool; by default the address. address: "host:port" (IPv6 in brackets).
    models: the names it serves, base models and LoRA adapters; empty means not known, and then any model may go.
    rank: data-parallel rank to pin with `X-data-parallel-rank`, or None where the engine has only one.
    """

    name: str
    address: str
    models: frozenset[str] = frozenset()
    role: Role = Role.BOTH
    scheme: str = "http"
    rank: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


# --- what a client asks ------------------------------------------------------------------------------------


class CallKind(enum.Enum):
    CHAT = "chat"
    COMPLETION = "completion"
    OTHER = "other"  # forwarded, not understood: routed by load alone


@dataclass(frozen=True, slots=True)
class Rewritten:
    """That somebody has said which model a request gets; mostly another one than its client asked for.

    asked: the client's name for it, None where it gave none. by: the name of the rewrite, or of the header, that says.
    """

    asked: str | None
    by: str


class Call(msgspec.Struct, frozen=True, gc=False, eq=False):
    """A client's request as its bytes said it, before anyone decides anything.

    prompt: canonical bytes of the leading prompt, the text prefix matching works on (see `wire.openai`).
    extra_bytes: bytes of the further prompts of a batch; they count as load and are never matched.
    prompt_tokens: exact number when the client sent token ids, else None (estimated from bytes).
    salt: the engine's `cache_salt`; two salts never share a prefix. session: id for session affinity.
    body: the whole request body, for reading it as the engine does (`picker.tokenizers`); never logged or changed.
    rewritten: where `model`, and the body, name what a rewrite says and not what the client did.
    """

    kind: CallKind
    model: str | None
    prompt: bytes = b""
    extra_bytes: int = 0
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    salt: str | None = None
    session: str | None = None
    priority: int = 0
    body: bytes = b""
    rewritten: Rewritten | None = None

    __repr__ = _repr_without("prompt", "body")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and _same(self, other, but="body")


class Splits(Protocol):
    """Tells where the tokens of a prompt end."""

    def __call__(self, position: int) -> bool:
        """Whether a token ends at this position of the prompt, 0..n."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt as its engine will read it, in the form that exact prefix matching works on; no text.

    Much larger than the prompt: needed while deciding and never kept.

    adapter, salt: what the engine's hashes cover beside tokens; only chains of the same two are matched.
    hashes: (n + 1,) keyed hashes of the prompt's first 0..n units (bytes, tokens or blocks, as the index is built).
    tokens: the prompt's length in tokens, where it was counted. splits: where a token ends; None: at every unit.
    whole: False when only the beginning could be read (up to the first image, say).
    """

    hashes: UInt64Array
    adapter: str | None = None
    salt: str | None = None
    tokens: int | None = None
    splits: Splits | None = None
    whole: bool = True


class Unread(enum.Enum):
    """A prompt that was not read, because reading it takes too long for where it was asked for."""

    UNREAD = "unread"


class Request(msgspec.Struct, frozen=True, gc=False, eq=False):
    """All that a decision may depend on; no headers, no body, no text.

    id: ours, unique in the process; a client's `x-request-id` is for logs only.
    block_hashes: (b,) chained hashes of the full blocks of the leading prompt, oldest first (`prefix.blocks`).
    prompt_bytes: length of the leading prompt; extra_bytes: of further prompts in the same body.
    subset: only these addresses ("ip:port" or "ip") may be picked. exclude: endpoint names already tried.
    deadline: leave the queue unserved after this instant. streaming: a first token will be seen before the end.
    headers: of the request, in lower case; only those that the policy has asked for.
    rewritten: where `model` is what a rewrite says and not what the client did; for those who tell of it.
    """

    id: int
    model: str | None
    arrived_at: float
    block_hashes: UInt64Array = NO_BLOCKS
    prompt_bytes: int = 0
    extra_bytes: int = 0
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    priority: int = 0
    session: str | None = None
    streaming: bool = True
    role: Role = Role.BOTH
    subset: frozenset[str] | None = None
    exclude: frozenset[str] = frozenset()
    deadline: float | None = None
    headers: Mapping[str, str] = NO_HEADERS
    rewritten: Rewritten | None = None

    __repr__ = _repr_without("headers")


# --- what is decided ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """One line of an explained decision: an endpoint, its total (higher wins) and the parts of it."""

    endpoint: str
    total: float
    parts: Mapping[str, float]


class Ranking(msgspec.Struct, frozen=True, gc=False, eq=False):
    """What a profile thought of every candidate.

    names: the pool's names by row, shared and never written. rows: (n,) pool rows of the candidates.
    total: (n,) higher wins. parts: name -> (n,), each scorer's weighted share or each term of a cost in seconds.
    """

    names: NDArray[np.object_]
    rows: Int64Array
    total: FloatArray
    parts: Mapping[str, NDArray[np.floating]]

    def candidates(self) -> list[Candidate]:
        """The ranking in words, best first."""
        return [
            Candidate(
                endpoint=str(self.names[self.rows[i]]),
                total=float(self.total[i]),
                parts={part: float(values[i]) for part, values in self.parts.items()},
            )
            for i in np.argsort(-self.total, kind="stable")
        ]


class Decision(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Where a request goes. `endpoint` first, then `fallbacks` in order of preference.

    matched_blocks of total_blocks are believed to be cached there; matched_tokens and prompt_tokens are
    estimates of the same in tokens. waited: seconds in our queue. charged: False when routed by fail-open.
    """

    request_id: int
    endpoint: Endpoint
    fallbacks: tuple[Endpoint, ...] = ()
    matched_blocks: int = 0
    total_blocks: int = 0
    matched_tokens: float = 0.0
    prompt_tokens: float = 0.0
    waited: float = 0.0
    charged: bool = True
    ranking: Ranking | None = None

    __repr__ = _repr_without("ranking")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and _same(self, other, but="ranking")


class RejectReason(enum.Enum):
    """Why nothing was picked; the value is the metric label."""

    NO_ENDPOINTS = "no-endpoints"  # none known, or none healthy
    UNKNOWN_MODEL = "unknown-model"
    NO_MATCH = "no-match"  # subset, role or exclusion left nobody
    SATURATED = "saturated"  # queue full
    EXPIRED = "expired"  # waited longer than allowed
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Rejection:
    """An expected no: HTTP `status`, a message fit for the client, and when to try again (seconds)."""

    request_id: int
    reason: RejectReason
    status: int
    message: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """The pool is saturated; the answer will come from `Scheduler.poll`."""

    request_id: int


Outcome = Decision | Rejection


# --- facts: everything a scheduler is ever told ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndpointAdded:
    """Discovery found an endpoint, or its description changed (same name: state is kept)."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class EndpointRemoved:
    name: str


@dataclass(frozen=True, slots=True)
class EndpointDraining:
    """Give it nothing new (draining) or take it back into service."""

    name: str
    draining: bool = True


class Sleep(enum.Enum):
    """Whether an engine has been told to sleep, and whether its cache is gone with it."""

    AWAKE = "awake"
    LIGHT = "light"  # it stands still, its cache stays
    DEEP = "deep"  # the memory of its cache is given back


@dataclass(frozen=True, slots=True)
class LoadObserved:
    """One scrape of one endpoint. A field the engine did not show is None: unknown is not zero.

    observed_at: when the answer arrived. waiting, running: requests. kv_usage: fraction 0..1 of KV blocks in use.
    block_size: tokens per engine block. kv_capacity_tokens: tokens the KV cache holds.
    queries, hits: the engine's prefix-cache counters, in tokens since its start.
    started_at: engine process start, unix seconds; a change means a restart with an empty cache.
    adapters: LoRA adapters active now (running or waiting). max_adapters: how many fit at once.
    sleep: AWAKE again after another also means that it may be given requests.
    """

    name: str
    observed_at: float
    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    block_size: int | None = None
    kv_capacity_tokens: int | None = None
    queries: float | None = None
    hits: float | None = None
    started_at: float | None = None
    adapters: frozenset[str] | None = None
    max_adapters: int | None = None
    sleep: Sleep | None = None


@dataclass(frozen=True, slots=True)
class ScrapeFailed:
    """A scrape brought nothing usable. Old values stay and age; they never become zero."""

    name: str
    observed_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class ModelsObserved:
    """The model names an endpoint says it serves (`/v1/models`); `adapters` of them are LoRA adapters."""

    name: str
    models: frozenset[str]
    max_model_len: int | None = None
    adapters: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class HealthObserved:
    """An active probe succeeded or failed (connection refused, 503, time-out)."""

    name: str
    healthy: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """The engine's prefix cache is empty now (restart, reset, sleep)."""

    name: str


class Tier(enum.Enum):
    """Where an engine keeps a block. What is not in GPU memory is fetched before it is used."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """KV events: these blocks entered the engine's prefix cache, each the continuation of the one before it.

    hashes: the engine's own, as 64-bit numbers that mean nothing but identity, oldest first. parent: the hash that the
    first continues; None: it begins a prompt. An engine that computes a block twice keeps both and says so twice.
    tokens: ids of all the blocks in order, block_size to a block; empty where the hashes are those that prompts are
    matched with (virtual time). adapter, salt: what the chain's root covers beside tokens. media: by block, what else
    its hash covers (identities of images), or empty. group, attention: the cache group of a hybrid model and its kind.
    """

    name: str
    hashes: tuple[int, ...]
    parent: int | None = None
    tokens: tuple[int, ...] = field(default=(), repr=False)
    block_size: int = 0
    adapter: str | None = None
    salt: str | None = field(default=None, repr=False)
    media: tuple[str | None, ...] = field(default=(), repr=False)
    tier: Tier = Tier.GPU
    group: int = 0
    attention: str = "full_attention"


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """KV events: one copy of each of these blocks left a tier of the engine's prefix cache."""

    name: str
    hashes: tuple[int, ...]
    tier: Tier = Tier.GPU
    group: int = 0


class EventState(enum.Enum):
    """How far an endpoint's KV events can be relied on; the value is the metric label."""

    ABSENT = "absent"  # it publishes none, or we cannot reach them
    WHOLE = "whole"  # everything since the cache was last empty has been seen
    PARTIAL = "partial"  # an unbroken stream that began after the cache had: older blocks are not known
    SUSPECT = "suspect"  # something is missing or wrong: what was learned before is void


@dataclass(frozen=True, slots=True)
class EventsChanged:
    """An endpoint's KV event stream was found, lost, broken or repaired. reason: in plain words, for people.

    SUSPECT and ABSENT void what was learned of its blocks; WHOLE and PARTIAL begin a new stream from nothing, and the
    blocks that were replayed follow as facts of their own.
    """

    name: str
    state: EventState
    reason: str = ""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Token counts as the engine reported them; cached_tokens is None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


class ResponseStarted(msgspec.Struct, frozen=True, gc=False):
    """Response headers arrived. served_by: the address that answered, if the data plane says so."""

    request_id: int
    status: int
    served_by: str | None = None


class FirstToken(msgspec.Struct, frozen=True, gc=False):
    """The first output token left the engine: its prefill is done."""

    request_id: int


class Finished(msgspec.Struct, frozen=True, gc=False):
    """The response ended as the engine meant it to, whatever its status."""

    request_id: int
    status: int
    usage: Usage | None = None


class FailureReason(enum.Enum):
    """Why a request ended without a complete answer; the value is the metric label."""

    CLIENT_GONE = "client-gone"  # not the endpoint's fault
    CONNECT = "connect"
    RESET = "reset"
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"  # the stream ended before its end marker
    SHUTDOWN = "shutdown"
    UNHEARD = "unheard"  # nothing told how it ended: taken as over when it should be

    @property
    def blames_endpoint(self) -> bool:
        return self not in (FailureReason.CLIENT_GONE, FailureReason.SHUTDOWN, FailureReason.UNHEARD)


class Failed(msgspec.Struct, frozen=True, gc=False):
    request_id: int
    reason: FailureReason


@dataclass(frozen=True, slots=True, eq=False)
class Booked:
    """Another replica has sent a request to an endpoint. What becomes of it follows as facts of its id.

    request: under an id that none of ours has. uncached of tokens: prompt tokens to be computed there, as expected.
    matched: its leading blocks that were expected to be cached there. others: endpoints to be tried behind it.
    """

    name: str
    request: Request
    uncached: float
    tokens: float
    matched: int = 0
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PrefixHeld:
    """Another replica believes that an endpoint holds these blocks. block_hashes: (b,) chained, oldest first."""

    name: str
    block_hashes: UInt64Array


class LateFirstToken(msgspec.Struct, frozen=True, gc=False):
    """As `FirstToken`, of another replica's request, heard too late to tell how long it took."""

    request_id: int


@dataclass(frozen=True, slots=True)
class EndpointLessons:
    """What was learned of one endpoint. prefill, decode: what its samples should have taken, and what they took.

    trust: share of predicted blocks that were there. announced, effective: blocks it says that it holds, and blocks it
    is found to; infinite where not known. recent: requests of about the last half minute.
    """

    name: str
    prefill: tuple[float, float] = (0.0, 0.0)
    decode: tuple[float, float] = (0.0, 0.0)
    trust: float = 1.0
    announced: float = math.inf
    effective: float = math.inf
    recent: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """What another replica has learned. Of each quantity, what rests on more counts: its, or ours.

    prefill, decode: (n, f + 1) the latest samples of each size, features and then seconds. ratios: numerator and
    denominator of what was seen, by name. rates: (events, faded, seconds they were watched), by name.
    """

    prefill: Mapping[int, FloatArray]
    decode: Mapping[int, FloatArray]
    ratios: Mapping[str, tuple[float, float]]
    rates: Mapping[str, tuple[float, float]]
    endpoints: tuple[EndpointLessons, ...] = ()


Fact = (
    EndpointAdded
    | EndpointRemoved
    | EndpointDraining
    | LoadObserved
    | ScrapeFailed
    | ModelsObserved
    | HealthObserved
    | CacheCleared
    | BlocksStored
    | BlocksRemoved
    | EventsChanged
    | ResponseStarted
    | FirstToken
    | Finished
    | Failed
    | Booked
    | PrefixHeld
    | LateFirstToken
    | Lessons
)
