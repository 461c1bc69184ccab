"""One file a scorer. A scorer is found by its short name here or as `module:Class`; nothing else needs to know it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from picker.core.profile import Scorer
from picker.errors import ConfigError
from picker.scorers.active_request import ActiveRequest
from picker.scorers.context_length import ContextLength
from picker.scorers.header_label import HeaderLabel
from picker.scorers.inflight import Inflight
from picker.scorers.kv_usage import KvUsage
from picker.scorers.latency import Latency
from picker.scorers.load_aware import LoadAware
from picker.scorers.lora_affinity import LoraAffinity
from picker.scorers.no_hit_lru import NoHitLru
from picker.scorers.prefix_cache import PrefixCache
from picker.scorers.queue_depth import QueueDepth
from picker.scorers.recency import Recency
from picker.scorers.running import Running
from picker.scorers.session import Session
from picker.scorers.token_load import TokenLoad

# Short names are the endpoint picker's where it has the scorer.
SCORERS: Mapping[str, type[Any]] = {
    "prefix-cache-scorer": PrefixCache,
    "queue-scorer": QueueDepth,
    "kv-cache-utilization-scorer": KvUsage,
    "running-requests-size-scorer": Running,
    "lora-affinity-scorer": LoraAffinity,
    "session-affinity-scorer": Session,
    "token-load-scorer": TokenLoad,
    "active-request-scorer": ActiveRequest,
    "load-aware-scorer": LoadAware,
    "no-hit-lru-scorer": NoHitLru,
    "context-length-aware": ContextLength,
    "header-label-affinity-scorer": HeaderLabel,
    "latency-scorer": Latency,
    "inflight-scorer": Inflight,
    "recency-scorer": Recency,
}


def build_scorer(name: str, parameters: Mapping[str, Any]) -> Scorer:
    """The scorer of that short name, or of `module:Class`, with its parameters; raises ConfigError by name."""
    kind = SCORERS.get(name) or _imported(name)
    try:
        scorer: Scorer = kind(**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scorer {name!r}: {error}") from None
    return scorer


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(SCORERS)}, or module:Class"
        raise ConfigError(f"there is no scorer {name!r}{hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"scorer {name!r} cannot be imported: {error}") from None
