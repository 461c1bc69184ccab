"""What a request may be and which model it gets, from a configuration."""

from __future__ import annotations

import random
from collections.abc import Mapping

from picker.config import Config
from picker.exchange import Limits
from picker.rewrites import Rewriting

CONFIGURATION, KUBERNETES = "configuration", "kubernetes"  # who says which models requests get


def build_limits(
    config: Config, objectives: Mapping[str, int] | None = None, rewriting: Rewriting | None = None
) -> Limits:
    """What a request may be. objectives: priorities by name where others than the configuration's are known, live.

    rewriting: which models requests get, likewise; left out where nobody will ever say.
    """
    silent = not (config.models.rewrites or config.models.rewrite_header or config.asks_kubernetes)
    return Limits(
        max_body_bytes=config.limits.max_body_bytes,
        max_attempts=config.limits.max_attempts,
        name_endpoint=config.limits.name_endpoint,
        objectives=config.objectives if objectives is None else objectives,
        retry_statuses=frozenset(config.retry.statuses),
        rewriting=None if silent else build_rewriting(config) if rewriting is None else rewriting,
    )


def build_rewriting(config: Config) -> Rewriting:
    """Which models requests get, as far as the configuration says."""
    rewriting = Rewriting(random.Random(config.seed).random, (KUBERNETES, CONFIGURATION))
    tell_rewriting(rewriting, config)
    return rewriting


def tell_rewriting(rewriting: Rewriting, config: Config) -> None:
    """Have the rules of a configuration in force."""
    models = config.models
    rewriting.put(CONFIGURATION, [spec.rule for spec in models.rewrites])
    rewriting.heeds_header = config.asks_kubernetes if models.rewrite_header is None else models.rewrite_header
