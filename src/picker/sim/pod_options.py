"""How simulated pods are set up, and how they can be made to misbehave. Values only."""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from picker.errors import ConfigError
from picker.sim.engine import Policy
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PodOptions:
    """A group of equal pods on ports `port`, `port` + 1, ...; port 0 takes free ones.

    model: served name; aliases: further ones; loras: adapters, of which max_loras run at once. profile: cost and size.
    kv_tokens ... max_model_len: instead of the profile's. time_scale: virtual seconds per wall second; all latencies,
    those in /metrics too, are virtual. max_queued: unfinished requests before 503, None for no limit, as in vLLM.
    noise: vary step times as the profile says, from `seed`.
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

    def __post_init__(self) -> None:
        if self.count < 1 or self.time_scale <= 0:
            raise ConfigError("simulated pods: count must be at least 1 and the time scale above 0")

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


class FaultChange(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /_sim/fault. Fields left out stay as they are.

    restart: lose everything in flight and cached, at once. down_s: be dead that many virtual seconds, then restart.
    """

    reset: bool | msgspec.UnsetType = msgspec.UNSET
    hang: bool | msgspec.UnsetType = msgspec.UNSET
    error_status: int | msgspec.UnsetType | None = msgspec.UNSET
    metrics: MetricsFault | msgspec.UnsetType = msgspec.UNSET
    slowdown: float | msgspec.UnsetType = msgspec.UNSET
    restart: bool = False
    down_s: float = 0.0

    def applied_to(self, fault: Fault) -> Fault:
        changes = {
            f.name: value for f in dataclasses.fields(fault) if (value := getattr(self, f.name)) is not msgspec.UNSET
        }
        return dataclasses.replace(fault, **changes)
