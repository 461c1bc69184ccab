"""How simulated pods are set up, and how they can be made to misbehave. Values only."""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec

from picker.errors import ConfigError
from picker.sim.engine import Policy
from picker.sim.engine_hashes import HashAlgorithm
from picker.sim.latency import Profile, profile

_ERRORS = frozenset(status.value for status in HTTPStatus if status >= 400)


class MetricsFault(enum.Enum):
    """What /metrics does: work, reset the connection, or answer 200 with a web page (a proxy's error page)."""

    NONE = "none"
    REFUSE = "refuse"
    HTML = "html"


@dataclass(frozen=True, slots=True)
class Fault:
    """How a pod misbehaves. reset: generate requests are answered by a TCP reset. hang: the engine stands still.

    error_status: answer to generate requests. slowdown: factor on step times. GET /health always works, as vLLM's does.
    """

    reset: bool = False
    hang: bool = False
    error_status: int | None = None
    metrics: MetricsFault = MetricsFault.NONE
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.slowdown < math.inf:
            raise ConfigError(f"fault: slowdown must be above 0, got {self.slowdown}")
        if self.error_status is not None and self.error_status not in _ERRORS:
            raise ConfigError(f"fault: error_status must be an HTTP error, got {self.error_status}")


@dataclass(frozen=True, slots=True)
class EventFault:
    """How a pod's KV events misbehave; its cache and the numbers of the batches do not.

    drop, garbage: that many of the next batches are not sent, or sent as nonsense; a replay has them whole.
    stall: nothing is sent or replayed until it ends, then everything. arrays: events in the form of before June 2026.
    block_size: what stores claim instead of the real one.
    """

    drop: int = 0
    garbage: int = 0
    stall: bool = False
    arrays: bool = False
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.drop < 0 or self.garbage < 0:
            raise ConfigError(f"fault: events: drop and garbage count batches, got {self.drop} and {self.garbage}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventOptions:
    """vLLM's `--kv-events-config`, and what differs between its releases.

    port: of the first pod's first rank; the other ranks' follow, then as many for replays, then the next pod's.
    0: free ones. replay: have a replay socket. buffer_steps: batches kept for it. hwm: batches on the way to a
    subscriber before it loses some. topic: may name {address} (host:port of the pod) and {model}, as llm-d's does.
    algorithm: of the block hashes; whole_hashes: tell all 32 bytes (VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0).
    arrays: events as arrays, as before 0.24. replay_topic: replays begin with the topic, as since 0.26.
    """

    port: int = 0
    replay: bool = True
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    algorithm: HashAlgorithm = HashAlgorithm.SHA256
    whole_hashes: bool = False
    arrays: bool = False
    replay_topic: bool = True
    fault: EventFault = EventFault()

    def __post_init__(self) -> None:
        if self.port < 0 or self.buffer_steps < 1 or self.hwm < 1:
            raise ConfigError("KV events: the port cannot be negative, and the buffer and its limit hold something")
        try:
            self.named(address="", model="")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ConfigError(f"KV events: the topic {self.topic!r} may name {{address}} and {{model}} only") from None

    def named(self, *, address: str, model: str) -> str:
        """The topic of a pod at this address."""
        return self.topic.format(address=address, model=model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodOptions:
    """A group of equal pods on ports `port`, `port` + 1, ...; port 0 takes free ones.

    model: served name; aliases: further ones; loras: adapters, of which max_loras run at once. profile: cost and size.
    kv_tokens ... max_model_len: instead of the profile's. time_scale: virtual seconds per wall second; all latencies,
    those in /metrics too, are virtual. max_queued: unfinished requests before 503, None for no limit, as in vLLM.
    noise: vary step times as the profile says, from `seed`. ranks: data-parallel engines behind each port. events:
    publish KV events. scale_out: serve the render and token-in-token-out routes. tokenizer: folder with a model's
    tokenizer.json and tokenizer_config.json, to tokenize and to speak as that model's engine would. stream_interval:
    tokens in an event of a stream, but for the first.
    """

    count: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    model: str = "simulated"
    aliases: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    max_loras: int = 4
    lora_load_s: float = 0.2
    profile: str = "llama-3.1-8b-h100"
    kv_tokens: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    time_scale: float = 1.0
    policy: Policy = Policy.FCFS
    max_queued: int | None = None
    prompt_tokens_details: bool = True
    track_server_load: bool = False
    noise: bool = True
    seed: int = 0
    fault: Fault = Fault()
    ranks: int = 1
    events: EventOptions | None = None
    scale_out: bool = False
    tokenizer: Path | None = None
    stream_interval: int = 1

    def __post_init__(self) -> None:
        if self.stream_interval < 1:
            raise ConfigError(f"simulated pods: an event has at least one token, got {self.stream_interval}")
        if self.count < 1 or not 0 < self.time_scale < math.inf:
            raise ConfigError("simulated pods: count must be at least 1 and the time scale above 0")
        if self.seed < 0 or (self.max_queued is not None and self.max_queued < 0):
            raise ConfigError("simulated pods: the seed and max_queued cannot be negative")
        if self.ranks < 1:
            raise ConfigError(f"simulated pods: a pod has at least one data-parallel rank, got {self.ranks}")
        if self.events is not None and self.events.port + 2 * self.count * self.ranks > 65_536:
            raise ConfigError(f"simulated pods: too few ports for KV events from {self.events.port} on")

    def resolve(self) -> Profile:
        """The profile with these options' limits. Raises ConfigError."""
        names = ("kv_tokens", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        changes = {name: value for name in names if (value := getattr(self, name)) is not None}
        base = profile(self.profile)
        if "max_num_batched_tokens" in changes and "max_num_seqs" not in changes:
            changes["max_num_seqs"] = min(base.max_num_seqs, changes["max_num_batched_tokens"])
        chosen = dataclasses.replace(base, **changes)
        # vLLM refuses to start when one request of full length does not fit; a small pod is meant to be small.
        fits = (chosen.num_blocks - 1) * chosen.block_size
        return dataclasses.replace(chosen, max_model_len=min(chosen.max_model_len, fits))


class EventFaultChange(msgspec.Struct, forbid_unknown_fields=True):
    """The `events` of a FaultChange. Fields left out stay as they are."""

    drop: int | msgspec.UnsetType = msgspec.UNSET
    garbage: int | msgspec.UnsetType = msgspec.UNSET
    stall: bool | msgspec.UnsetType = msgspec.UNSET
    arrays: bool | msgspec.UnsetType = msgspec.UNSET
    block_size: int | msgspec.UnsetType | None = msgspec.UNSET

    def applied_to(self, fault: EventFault) -> EventFault:
        return dataclasses.replace(fault, **_given(self, fault))


class FaultChange(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /_sim/fault. Fields left out stay as they are. events: of all ranks of a pod that publishes them.

    restart: lose everything in flight and cached, at once. down_s: be dead that many virtual seconds, then restart.
    """

    reset: bool | msgspec.UnsetType = msgspec.UNSET
    hang: bool | msgspec.UnsetType = msgspec.UNSET
    error_status: int | msgspec.UnsetType | None = msgspec.UNSET
    metrics: MetricsFault | msgspec.UnsetType = msgspec.UNSET
    slowdown: float | msgspec.UnsetType = msgspec.UNSET
    events: EventFaultChange | None = None
    restart: bool = False
    down_s: float = 0.0

    def applied_to(self, fault: Fault) -> Fault:
        return dataclasses.replace(fault, **_given(self, fault))


def _given(change: FaultChange | EventFaultChange, fault: Fault | EventFault) -> dict[str, Any]:
    values = ((field.name, getattr(change, field.name)) for field in dataclasses.fields(fault))
    return {name: value for name, value in values if value is not msgspec.UNSET}
