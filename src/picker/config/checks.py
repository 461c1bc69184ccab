"""What types alone do not say: names that are known, numbers within bounds, keys that need one another."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator

from picker.config.faults import near, nearest
from picker.config.sections import (
    CONTENT_FORMATS,
    DATA_PLANES,
    EPP_MODES,
    EXACT_BY,
    LOG_LEVELS,
    MIB,
    MOST_WORKERS,
    POLICIES,
    TLS_VERSIONS,
    Config,
    EndpointSpec,
    ExactConfig,
    TokenizerSpec,
)
from picker.errors import ConfigError

# Each is hashed with as many random words as it has.
MOST_BLOCK_BYTES = MIB
_PUBLISHED = re.compile(r"tcp://(?:\{host\}|\[[^\[\]{}\s]*\]|[^\[\]{}/:\s]+):(?P<port>[0-9]{1,5})")

_CHOICES = (
    ("policy", POLICIES),
    ("exact.by", EXACT_BY),
    ("epp.mode", EPP_MODES),
    ("proxy.data_plane", DATA_PLANES),
    ("epp.tls_min_version", TLS_VERSIONS),
    ("connections.tls_min_version", TLS_VERSIONS),
    ("log_level", LOG_LEVELS),
)


def check(config: Config) -> None:
    """Raises ConfigError for the first thing that cannot be meant."""
    for key, known in _CHOICES:
        _check_choice(key, operator.attrgetter(key)(config), known)
    _check_profiles(config)
    _check_exact(config.exact)
    _check_pairs(config)
    _check_doors(config)
    _check_hosts(config)
    _check_values(config)
    _check_numbers(config)


def _check_choice(key: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(known)}{nearest(value, known)}")


def _check_doors(config: Config) -> None:
    """Who is let in by what."""
    if config.api.client_ca_path is not None and not config.api.secure:
        raise ConfigError("api.client_ca_path: clients show certificates by TLS only: set api.secure_serving: true")
    for key, what in (("api.key", "key"), ("admin.token", "token")):
        if operator.attrgetter(key)(config) == "":
            raise ConfigError(f"{key}: an empty {what} keeps nobody out; leave it out or null for none")


def _check_hosts(config: Config) -> None:
    """An empty address means all of a machine's to a socket, and hardly to whoever left it empty."""
    for key in _HOSTS:
        if not operator.attrgetter(key)(config).strip():
            raise ConfigError(f"{key}: it is empty; give an address of this machine, or 0.0.0.0 for all of them")


def _check_values(config: Config) -> None:
    size = config.index.block_bytes
    if size % 4:
        raise ConfigError(f"index.block_bytes: must be a multiple of 4, got {size}")
    if size > MOST_BLOCK_BYTES:
        few = "prompts of fewer bytes are never recognised"
        raise ConfigError(f"index.block_bytes: must be {MOST_BLOCK_BYTES} (1 MiB) at most, got {size}: {few}")
    if not 1 <= config.epp.workers <= MOST_WORKERS:
        raise ConfigError(f"epp.workers: must be from 1 to {MOST_WORKERS}, got {config.epp.workers}")
    if config.health.path is not None and not config.health.path.startswith("/"):
        raise ConfigError(f"health.path: must begin with a slash, got {config.health.path!r}")
    if wrong := [status for status in config.retry.statuses if not 500 <= status <= 599]:
        raise ConfigError(f"retry.statuses: {wrong[0]} is no fault of an endpoint; those are from 500 to 599")
    for index, rewrite in enumerate(config.models.rewrites):
        if rewrite.faults:
            raise ConfigError(f"models.rewrites[{index}]: {rewrite.faults[0]}")


def _check_pairs(config: Config) -> None:
    """Settings of which one is no use without the other."""
    connections, upstream, admin = config.connections, config.upstream, config.admin
    for key, certificate, own in (
        ("connections.tls", connections.tls_cert, connections.tls_key),
        ("admin.tls", admin.tls_cert, admin.tls_key),
    ):
        if (certificate is None) != (own is None):
            raise ConfigError(f"{key}_cert and {key}_key go together: a certificate and its key")
    if connections.tls_client_ca is not None and connections.tls_cert is None:
        raise ConfigError("connections.tls_client_ca: clients show certificates by TLS only: set tls_cert and tls_key")
    if upstream.key is not None and upstream.cert is None:
        raise ConfigError("upstream.key: it belongs to a certificate: set upstream.cert")
    if upstream.api_key is not None and upstream.api_key_file is not None:
        raise ConfigError("upstream.api_key_file: the key is given twice, here and in upstream.api_key")
    if any(isinstance(each, EndpointSpec) and each.api_key and each.api_key_file for each in config.endpoints):
        raise ConfigError("endpoints: api_key_file: the key is given twice, here and in api_key")
    if upstream.insecure and upstream.ca is not None:
        raise ConfigError("upstream.insecure: nothing is verified with it; leave out upstream.ca, or this")
    if admin.token is not None and admin.token_file is not None:
        raise ConfigError("admin.token_file: the token is given twice, here and in admin.token")


def _check_exact(exact: ExactConfig) -> None:
    named = {f"exact.tokenizers.{name}": spec for name, spec in exact.tokenizers.items()}
    for key, spec in (named | {"exact.tokenizer": exact.tokenizer}).items():
        if isinstance(spec, TokenizerSpec):
            _check_choice(f"{key}.content_format", spec.content_format, CONTENT_FORMATS)
    if exact.snapshot is not None and exact.mode == "off":
        raise ConfigError("exact.snapshot: there is nothing to save: give exact.tokenizer, or exact.by: bytes")
    for key, template in (("exact.events", exact.events), ("exact.replay", exact.replay)):
        if template is None:
            continue
        if not _publishes(template):
            raise ConfigError(
                f"{key}: {template!r} is no tcp://host:port; write tcp://{{host}}:5557, host as it stands"
            )
        if exact.mode == "off" and exact.by == "auto":  # by: off switches off what stays written down
            raise ConfigError(f"{key}: nothing is followed there: give exact.tokenizer, or exact.by: bytes")


def _publishes(template: str) -> bool:
    """Whether it says where engines publish. In the place of the host there may be any, a wildcard, or {host}."""
    found = _PUBLISHED.fullmatch(template)
    return found is not None and 0 < int(found["port"]) < 1 << 16


def _check_profiles(config: Config) -> None:
    weighted = config.policy == "weighted"
    if weighted and not (config.scorers or config.filters or config.profiles):
        raise ConfigError("policy: 'weighted' needs a list of scorers, or of profiles")
    for key in ("scorers", "filters", "profiles"):
        if getattr(config, key) and not weighted:
            raise ConfigError(f"{key}: they are used by policy 'weighted' only, and policy is {config.policy!r}")
    if config.profiles and (config.scorers or config.filters):
        raise ConfigError("profiles: with them, filters and scorers stand in the profiles")
    names = [profile.name for profile in config.profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"profiles: two of them are called {twice!r}")
    for key in ("profile", "prefill_profile"):
        name = getattr(config, key)
        if name is not None and name not in names:
            raise ConfigError(f"{key}: there is no profile {name!r}{near(name, names)}")
    if config.profile_header is not None and not config.profiles:
        raise ConfigError("profile_header: there are no profiles to name")


# By their places in the file. Where null stands for no limit, it is one.
_POSITIVE = (
    *("index.block_bytes", "index.budget_bytes"),
    *("exact.budget_ms", "exact.budget_bytes", "exact.snapshot_interval_s"),
    *("kubernetes.resync_s", "kubernetes.silence_s", "scrape.interval_s", "scrape.timeout_s"),
    *("limits.max_body_bytes", "limits.max_attempts", "queue.timeout_s"),
    *("health.eject_after", "health.stall_s"),
    *("connections.max_head_bytes", "connections.max_target_bytes", "connections.max_headers"),
    *("connections.head_timeout_s", "connections.body_timeout_s", "connections.idle_timeout_s"),
    *("connections.max_connections", "keys.max_concurrent", "keys.max_body_bytes"),
    *("proxy.connect_timeout_s", "proxy.first_byte_timeout_s", "proxy.idle_timeout_s"),
    *("epp.max_message_bytes", "epp.request_timeout_s", "epp.idle_timeout_s", "api.max_message_bytes"),
)
_NOT_NEGATIVE = (
    *("drain_timeout_s", "queue.size", "queue.hold_s", "retry.ratio", "retry.floor"),
    *("health.eject_s", "health.eject_max_s", "health.hang_factor", "health.hang_floor_s", "health.slow_start_s"),
    *("proxy.drain_delay_s", "epp.drain_delay_s", "seed"),
)
_AT_LEAST_ONE = ("queue.max_inflight", "proxy.envoy_threads")
_HOSTS = ("proxy.host", "epp.host", "admin.host", "api.host", "replicas.host")
_PORTS = ("proxy.port", "epp.grpc_port", "epp.grpc_health_port", "admin.port", "api.port", "replicas.port")


def _check_numbers(config: Config) -> None:
    for key, value in _numbers(config, _POSITIVE):
        if not value > 0:
            raise ConfigError(f"{key}: must be greater than 0, got {value}")
    for key, value in _numbers(config, _NOT_NEGATIVE):
        if not value >= 0:
            raise ConfigError(f"{key}: must not be negative, got {value}")
    for key, value in _numbers(config, _AT_LEAST_ONE):
        if value < 1:
            raise ConfigError(f"{key}: must be at least 1 or null, got {value}")
    for key, value in _numbers(config, _PORTS):
        if not 0 <= value <= 65535:
            raise ConfigError(f"{key}: must be a port from 0 to 65535, got {value}")


def _numbers(config: Config, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Those that are there, by their keys."""
    values = ((key, operator.attrgetter(key)(config)) for key in keys)
    return ((key, value) for key, value in values if value is not None)
