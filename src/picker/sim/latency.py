"""How long one engine step takes, as a function of its batch, for the models and GPUs of `profiles.toml`.

Owns the cost formula, its constants and the noise on it. Knows no engine state and reads no clock.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np

from picker.errors import ConfigError
from picker.types import FloatArray

_MILLI, _MICRO, _NANO = 1e-3, 1e-6, 1e-9
# Key in the data file -> (field, seconds per unit of the file).
_SECONDS = {
    "c0_ms": ("c0", _MILLI),
    "experts_ms": ("experts", _MILLI),
    "c_pf_us": ("c_pf", _MICRO),
    "c_attn_ns": ("c_attn", _NANO),
    "c_kv_ns": ("c_kv", _NANO),
    "c_seq_us": ("c_seq", _MICRO),
    "front_end_ms": ("front_end_s", _MILLI),
    "front_end_per_token_us": ("front_end_per_token_s", _MICRO),
}


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one kind of pod: the coefficients of a step in seconds, and the engine's limits.

    c0: fixed part of a step. experts: what is added when every expert of a mixture is read, 0 for dense models;
    expert_share: part of the experts one sequence touches. c_pf: per prefilled token. c_attn: per prefilled token
    and token of context before it. c_kv: per token of context of a decoding sequence. c_seq: per decoding sequence.
    front_end_s, front_end_per_token_s: HTTP, templating and tokenising per request and prompt token; it overlaps steps.
    kv_tokens: tokens the KV cache holds. noise_sd: standard deviation of the logarithm of a step's noise factor.
    source: where the numbers come from (published, fitted, estimate).
    """

    name: str
    c0: float
    c_pf: float
    c_attn: float
    c_kv: float
    c_seq: float
    kv_tokens: int
    source: str
    experts: float = 0.0
    expert_share: float = 0.0
    front_end_s: float = 0.015
    front_end_per_token_s: float = 8e-6
    block_size: int = 16
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    max_model_len: int = 131_072
    noise_sd: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # vLLM refuses this too: a step could not give every running sequence its token.
            raise ConfigError(
                f"{self.name}: max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs})"
            )
        if self.num_blocks < 2:
            raise ConfigError(f"{self.name}: {self.kv_tokens} KV tokens are less than two blocks of {self.block_size}")

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, with the null block that no request can have."""
        return self.kv_tokens // self.block_size

    def step_time(self, *, prefill_tokens: int, prefill_work: float, decodes: int, context: int) -> float:
        """Seconds of one step of continuous batching with chunked prefill.

        prefill_tokens: sum of the chunks n. prefill_work: sum of n * (tokens in KV before the chunk + n/2), in
        token^2. decodes: sequences that decode one token. context: sum of their tokens in KV.

        Linear in work, after the usual roofline reading: c0 reads the weights, c_pf multiplies, c_attn attends,
        c_kv reads the cache. It meets published inter-token latencies and output rates within a few percent.
        """
        fixed = self.c0
        if self.experts:
            fixed += self.experts * (1.0 - (1.0 - self.expert_share) ** decodes)
        return (
            fixed + self.c_pf * prefill_tokens + self.c_attn * prefill_work + self.c_kv * context + self.c_seq * decodes
        )

    def front_end(self, prompt_tokens: int) -> float:
        """Seconds between the arrival of a request's bytes and its arrival in the engine's queue."""
        return self.front_end_s + self.front_end_per_token_s * prompt_tokens

    def scaled(self, speed: float) -> Profile:
        """The same pod on hardware that runs every step `speed` times as fast."""
        parts = {f: getattr(self, f) / speed for f in ("c0", "experts", "c_pf", "c_attn", "c_kv", "c_seq")}
        return dataclasses.replace(self, **parts)


class StepNoise:
    """Factors on successive step times: log-normal, mean 1, log-sd `sd`. Which step gets which is fixed by `rng` alone.

    Factors are drawn ahead in batches, so looking at more of them than are used in the end changes nothing.
    """

    _BATCH = 1024

    def __init__(self, rng: np.random.Generator, sd: float) -> None:
        self._rng = rng
        self._sd = sd
        self._drawn: FloatArray = np.empty(0)

    def peek(self, count: int) -> FloatArray:
        """The next `count` factors, (count,)."""
        while len(self._drawn) < count:
            # The mean of exp(N(m, sd)) is exp(m + sd^2/2).
            fresh = np.exp(self._rng.normal(-self._sd * self._sd / 2, self._sd, self._BATCH))
            self._drawn = np.concatenate([self._drawn, fresh])
        return self._drawn[:count]

    def skip(self, count: int) -> None:
        """The next `count` factors, seen by `peek`, are used."""
        self._drawn = self._drawn[count:]

    def take(self) -> float:
        factor = float(self.peek(1)[0])
        self.skip(1)
        return factor


@functools.cache
def profiles() -> Mapping[str, Profile]:
    """All profiles of the data file by name, in its order."""
    data = tomllib.loads(resources.files("picker.sim").joinpath("profiles.toml").read_text(encoding="utf-8"))
    defaults = data["defaults"]
    parsed = {name: _parse(name, {**defaults, **table}) for name, table in data["profiles"].items()}
    return MappingProxyType(parsed)


def profile(name: str) -> Profile:
    """The profile called `name`. Raises ConfigError naming the nearest ones that exist, else all."""
    known = profiles()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no model profile {name!r}; {hint}")


def _parse(name: str, table: Mapping[str, Any]) -> Profile:
    fields: dict[str, Any] = {}
    for key, value in table.items():
        field, unit = _SECONDS.get(key, (key, None))
        fields[field] = value if unit is None else value * unit
    try:
        return Profile(name=name, **fields)
    except TypeError as error:
        raise ConfigError(f"profiles.toml, {name}: {error}") from error
