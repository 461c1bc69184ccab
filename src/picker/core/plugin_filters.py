"""The filters a configuration can name, and how they are made. Who may be picked at all is `core.filters`' business."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from picker.core.label_filters import (
    ByLabel,
    ContextLengthRange,
    DecodeRole,
    EncodeRole,
    HeaderSelection,
    LabelSelector,
    PrefillRole,
    SessionEndpoint,
)
from picker.core.load_filters import PrefixCacheAffinity, SloHeadroomTier, UtilizationBounds
from picker.core.profile import Filter
from picker.core.saturation import Concurrency, Detector, Utilization
from picker.errors import ConfigError

# Names are the endpoint picker's.
FILTERS: Mapping[str, type[Any]] = {
    "prefix-cache-affinity-filter": PrefixCacheAffinity,
    "slo-headroom-tier-filter": SloHeadroomTier,
    "utilization-filter": UtilizationBounds,
    "utilization-detector": Utilization,
    "concurrency-detector": Concurrency,
    "decode-filter": DecodeRole,
    "prefill-filter": PrefillRole,
    "encode-filter": EncodeRole,
    "by-label": ByLabel,
    "label-selector-filter": LabelSelector,
    "context-length-aware": ContextLengthRange,
    "session-affinity-filter": SessionEndpoint,
    "header-based-testing-filter": HeaderSelection,
}
DETECTORS = ("utilization-detector", "concurrency-detector")


def build_filter(name: str, parameters: Mapping[str, Any]) -> Filter:
    """The filter of that name with its parameters; raises ConfigError by name."""
    kind = FILTERS.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, FILTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(FILTERS)}"
        raise ConfigError(f"there is no filter {name!r}{hint}")
    try:
        made: Filter = kind(**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"filter {name!r}: {error}") from None
    return made


def build_detector(name: str, parameters: Mapping[str, Any]) -> Detector:
    """The saturation detector of that name with its parameters; raises ConfigError by name."""
    if name not in DETECTORS:
        raise ConfigError(f"there is no saturation detector {name!r}; known: {', '.join(DETECTORS)}")
    try:
        made: Detector = FILTERS[name](**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"saturation detector {name!r}: {error}") from None
    return made
