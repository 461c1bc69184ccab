"""What decides, from a configuration: profiles, pickers, detectors and the scheduler that goes by them."""

from __future__ import annotations

import os

from picker.config import Config, ProfileSpec
from picker.core.pick import PICKERS, Picker, max_score
from picker.core.plan import Plan, Route
from picker.core.plugin_filters import build_detector, build_filter
from picker.core.profile import Cost, Profile, Weighted
from picker.core.saturation import Detector
from picker.core.scheduler import Scheduler, Settings
from picker.errors import ConfigError
from picker.live_policy import LivePolicy
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact
from picker.scorers import build_scorer
from picker.scorers.inflight import Inflight
from picker.scorers.recency import Recency

_FALLBACKS = 2  # endpoints that a decision names behind the first, unless a profile names more


def build_scheduler(config: Config, exact: Exact | None = None, policy: LivePolicy | None = None) -> Scheduler:
    """The scheduler that a configuration describes; raises ConfigError for an unknown scorer or picker.

    policy: to decide by instead of the configuration's.
    """
    profile, picker = build_policy(config) if policy is None else (policy, policy.pick)
    index = ApproximateIndex(config.index.budget_bytes)
    return Scheduler(build_settings(config), index, profile, picker, exact, build_saturation(config))


def build_settings(config: Config) -> Settings:
    """The numbers that decisions go by; without a seed in the configuration it is a new one each time."""
    return Settings(
        block_bytes=config.index.block_bytes,
        max_inflight=config.queue.max_inflight,
        queue_size=config.queue.size,
        hold_s=config.queue.hold_s,
        eject_after=config.health.eject_after,
        eject_s=config.health.eject_s,
        eject_max_s=config.health.eject_max_s,
        retry_ratio=config.retry.ratio,
        retry_floor=config.retry.floor,
        hang_factor=config.health.hang_factor,
        hang_floor_s=config.health.hang_floor_s,
        slow_start_s=config.health.slow_start_s,
        seed=int.from_bytes(os.urandom(4)) if config.seed is None else config.seed,
        fallbacks=max([_FALLBACKS, *((profile.max_endpoints or 1) - 1 for profile in config.profiles)]),
    )


def build_policy(config: Config) -> tuple[Profile, Picker]:
    """What ranks the candidates and what chooses from the ranking."""
    picker = PICKERS.get(config.picker)
    if picker is None:
        raise ConfigError(f"picker: {config.picker!r} is not one of {', '.join(PICKERS)}")
    match config.policy:
        case "picker":
            return Cost(), picker
        case "weighted":
            plan = build_plan(config)
            return plan, plan.pick
        case "least-request":
            return Weighted([(Inflight(), 1.0)]), max_score
        case "round-robin":
            return Weighted([(Recency(), 1.0)]), max_score
        case "random":
            return Weighted([]), max_score
        case _:
            raise ConfigError(f"policy: {config.policy!r} is unknown")


def build_plan(config: Config) -> Plan:
    """The profiles of the `weighted` policy; the filters and scorers at the top are one of their own."""
    own = ProfileSpec(name="default", filters=config.filters, scorers=config.scorers, picker=config.picker)
    specs = config.profiles or [own]
    routes = {spec.name: build_route(spec) for spec in specs}
    return Plan(routes, config.profile or specs[0].name, config.profile_header, config.prefill_profile)


def build_route(spec: ProfileSpec) -> Route:
    """A profile with what it names; raises ConfigError for what there is not."""
    picker = PICKERS.get(spec.picker)
    if picker is None:
        raise ConfigError(f"profile {spec.name!r}: picker {spec.picker!r} is not one of {', '.join(PICKERS)}")
    return Route(
        scorers=[(build_scorer(each.name, each.parameters), each.weight) for each in spec.scorers],
        filters=[build_filter(each.name, each.parameters) for each in spec.filters],
        picker=picker,
        most=spec.max_endpoints,
    )


def build_saturation(config: Config) -> Detector | None:
    """What tells how full the pool is, where the configuration names it."""
    if config.saturation.detector == "off":
        return None
    return build_detector(config.saturation.detector, config.saturation.parameters)
