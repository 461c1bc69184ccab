"""What can be changed of a running `picker proxy`: its endpoints by hand, its configuration when a file has changed.

Of each key it says what putting it in force is, or why that takes a new process. Serves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from picker.access_log import check_target
from picker.app import CONFIGURATION, App
from picker.commands.proxy_doors import (
    Doors,
    allowance,
    connection_limits,
    endpoint_key,
    keys_of_endpoints,
    oldest_tls,
    passes_on,
    trust_files,
)
from picker.config import Config, EndpointSpec, to_values
from picker.config.faults import explain
from picker.deciders import build_policy, build_saturation, build_settings
from picker.discovery import build_endpoint
from picker.errors import ConfigError
from picker.frontends.admin import Admin
from picker.frontends.admin_control import MisunderstoodError
from picker.frontends.certificates import Pair, check_pair
from picker.frontends.keys import named_key
from picker.frontends.proxy import Proxy
from picker.frontends.trust import build_context
from picker.reload import Commit, NeedsRestartError, Reload
from picker.sources.file import load_endpoints
from picker.sources.roster import Standing, UnknownEndpointError, check_weight
from picker.sources.static import leads_to
from picker.types import Endpoint

T = TypeVar("T")

__all__ = ["Doors", "ProxyControl"]

_POLICY = (
    *("policy", "scorers", "filters", "picker", "profiles", "profile", "profile_header", "prefill_profile"),
    *("saturation",),
)
_OPEN = "it is open"
_AT_THE_START = "it is built once, at the start"
# Why a key, or a section, takes a new process. Whatever is neither here nor in `ProxyControl._live` has no such reason.
FIXED = {
    "proxy.host": _OPEN,
    "proxy.port": _OPEN,
    "proxy.data_plane": "the other one would have to take over the port",
    "proxy.envoy_binary": "Envoy runs",
    "proxy.envoy_threads": "Envoy runs",
    "proxy.survey": "endpoints have been asked, or not, as they came",
    "connections.tls_client_ca": "an open port can be told to trust more, and not less",
    "admin.host": _OPEN,
    "admin.port": _OPEN,
    "admin.read_only": "its routes are made at the start",
    "admin.guard_metrics": "its routes are made at the start",
    "api": "its port, its key and its limits are those it was opened with",
    "index": _AT_THE_START,
    "exact": "what engines cache is followed from the start",
    "kubernetes": "the API server is followed from the start",
    "replicas": "the others know this one by it",
    "record": "a trace is whole, from the beginning",
    "seed": "choices have been made with the other one",
}
# What Envoy has been told in the configuration that it was started with.
_ENVOY = dict.fromkeys(
    (
        *("connections", "retry.statuses", "keys.pass_on", "queue.timeout_s"),
        *("upstream.ca", "upstream.cert", "upstream.key", "upstream.server_name", "upstream.insecure"),
        *("limits.max_body_bytes", "limits.max_attempts", "limits.name_endpoint", "epp.max_message_bytes"),
        *("proxy.connect_timeout_s", "proxy.first_byte_timeout_s", "proxy.idle_timeout_s"),
    ),
    "Envoy is told at its start",
)


class ProxyControl:
    """`Control` of a running proxy. load: the configuration as the command line has it now; watched: its file."""

    def __init__(
        self,
        app: App,
        proxy: Proxy,
        doors: Doors,
        load: Callable[[], Config] | None = None,
        watched: Path | None = None,
    ) -> None:
        self.app = app
        self.proxy = proxy
        self.doors = doors
        load = load or (lambda: app.config)
        fixed = FIXED | (_ENVOY if app.config.proxy.data_plane == "envoy" else {})
        self.reloading = Reload(app.config, load, self._live(), doors.refreshers, watched, self._in_force, fixed)
        set_log_level(app.config)
        require_elsewhere(app.config)

    def admin(self) -> Admin:
        """The admin API, with what can be changed."""
        config = self.app.config.admin
        return Admin(
            self.app.runtime,
            keys=self.doors.admin_keys,
            control=self,
            read_only=config.read_only,
            guard_metrics=config.guard_metrics,
            door=self.doors.admin,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the files, and SIGHUP, until told to stop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reloading.again)
        try:
            async with asyncio.TaskGroup() as group:
                following = group.create_task(self.reloading.follow())
                await stop.wait()
                following.cancel()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    # endpoints

    def endpoints(self) -> list[dict[str, Any]]:
        roster, listed = self.app.roster, {}
        for name, standing in roster.all().items():
            listed[name] = _listing(standing)
        now = self.app.runtime.clock()
        for state in self.app.runtime.scheduler.snapshot(now):
            own = {"name": state.name, "address": state.address, "owners": ["discovery"], "removed": False}
            own["weight"] = roster.weights.get(state.name, 1.0)
            shown = listed.setdefault(state.name, own)
            shown |= {"draining": state.draining, "healthy": state.healthy, "running": state.inflight_requests}
        return list(listed.values())

    def endpoint(self, name: str) -> dict[str, Any]:
        for each in self.endpoints():
            if each["name"] == name:
                return each
        raise KeyError(name)

    def add(self, values: Mapping[str, Any]) -> dict[str, Any]:
        endpoint, spec, key = _understood(lambda: _described(values))
        _require_elsewhere(endpoint, self.app.config)
        self.app.roster.add(endpoint)
        if spec.weight != 1.0:
            self.app.roster.weigh(endpoint.name, spec.weight)
        self.doors.endpoint_keys.add(endpoint.name, key)
        return self.endpoint(endpoint.name)

    def remove(self, name: str) -> dict[str, Any]:
        standing = self._known(lambda: self.app.roster.remove(name), name)
        owners = [owner for owner in standing.owners if owner != "operator"]
        if owners:
            back = f"listed by {owners[0]}: it stays away until it is added here, or that list drops and names it again"
            return {"name": name, "removed": True, "note": back}
        self.doors.endpoint_keys.drop(name)
        return {"name": name, "removed": True, "note": None}

    def drain(self, name: str, *, draining: bool) -> dict[str, Any]:
        self._known(lambda: self.app.roster.drain(name, draining=draining), name)
        return self.endpoint(name)

    def weigh(self, name: str, weight: float) -> dict[str, Any]:
        _understood(lambda: check_weight(weight))
        self._known(lambda: self.app.roster.weigh(name, weight), name)
        return self.endpoint(name)

    def _known(self, ask: Callable[[], Any], name: str) -> Any:
        try:
            return ask()
        except UnknownEndpointError:
            raise KeyError(name) from None

    # configuration

    def config(self) -> dict[str, Any]:
        latest = self.reloading.latest
        return {"config": to_values(self.reloading.config), "latest_reload": latest and latest.values()}

    def reload(self) -> dict[str, Any]:
        return self.reloading.again().values()

    def _in_force(self, config: Config) -> None:
        self.app.config = config
        self.doors.adopt(config)
        set_log_level(config)

    def _live(self) -> Mapping[tuple[str, ...], Callable[[Config], Commit]]:
        return {
            ("endpoints", "endpoints_file"): self._endpoints,
            (*_POLICY, "queue", "retry", "health"): self._scheduling,
            ("limits", "objectives", "retry.statuses", "models"): self._limits,
            ("scrape", "health.path"): self._scraping,
            (
                *("proxy.connect_timeout_s", "proxy.first_byte_timeout_s", "proxy.idle_timeout_s"),
                *("proxy.drain_delay_s", "drain_timeout_s", "health.stall_s"),
            ): self._times,
            ("proxy.access_log",): self._access_log,
            (
                *("connections.max_connections", "connections.max_head_bytes", "connections.max_target_bytes"),
                *("connections.max_headers", "connections.head_timeout_s", "connections.body_timeout_s"),
                "connections.idle_timeout_s",
            ): self._connections,
            ("connections.tls_cert", "connections.tls_key", "connections.tls_min_version"): self._certificate,
            ("admin.tls_cert", "admin.tls_key"): self._admin_certificate,
            ("keys",): self._keys,
            ("admin.token", "admin.token_file", "admin.keys_file"): self.doors.admin_ring,
            ("upstream",): self._upstream,
            ("log_level", "epp"): lambda config: lambda: None,  # see `set_log_level`; what `picker epp` goes by
        }

    def _endpoints(self, config: Config) -> Commit:
        if self.app.discovery is not None:
            raise NeedsRestartError("they come from Kubernetes")
        if not (config.endpoints or config.endpoints_file):
            raise ConfigError("endpoints: there must be one, or a file of them")
        require_elsewhere(config)
        keys = keys_of_endpoints(config)
        if len(keys) < len(config.endpoints):
            raise ConfigError("endpoints: two of them have the same name")
        file = None if config.endpoints_file is None else Path(config.endpoints_file)
        moved = config.endpoints_file != self.reloading.config.endpoints_file
        if moved and file is not None:
            load_endpoints(file)

        def commit() -> None:
            self.doors.endpoint_keys.say(CONFIGURATION, keys)
            self.app.list_endpoints(config)
            if moved:
                self.app.endpoints_file.move(file)

        return commit

    def _scheduling(self, config: Config) -> Commit:
        runtime, policy = self.app.runtime, self.app.policy
        profile, picker = build_policy(config)
        settings, detector = build_settings(config), build_saturation(config)
        before = self.reloading.config
        asked_for = frozenset(getattr(profile, "headers", ()))
        if before.proxy.data_plane == "envoy" and not asked_for <= runtime.headers:
            raise NeedsRestartError("Envoy passes the headers on that were asked for at its start")
        decides_anew = any(getattr(config, key) != getattr(before, key) for key in _POLICY)

        def commit() -> None:
            if decides_anew:
                policy.replace(profile, picker)
                runtime.scheduler.watch_saturation(detector)
            runtime.scheduler.tune(settings, runtime.clock())
            runtime.headers = runtime.scheduler.headers
            runtime.queue_timeout = config.queue.timeout_s
            runtime.patience = config.health.hang_floor_s or math.inf
            runtime.learn(())  # there may be room for who waits

        return commit

    def _limits(self, config: Config) -> Commit:
        def commit() -> None:
            self.app.runtime.limits = self.app.limits_of(config)

        return commit

    def _scraping(self, config: Config) -> Commit:
        def commit() -> None:
            scraper, fetch = self.app.scraper, self.app.fetch
            if scraper is None or fetch is None:
                return  # it begins with these
            fetch.set_timeout(config.scrape.timeout_s)
            scraper.health_path = config.health.path
            if scraper.interval != config.scrape.interval_s:
                scraper.set_interval(config.scrape.interval_s)

        return commit

    def _times(self, config: Config) -> Commit:
        def commit() -> None:
            self.proxy.first_byte_timeout = config.proxy.first_byte_timeout_s
            self.proxy.idle_timeout = config.proxy.idle_timeout_s
            self.proxy.set_connect_timeout(config.proxy.connect_timeout_s)
            self.proxy.stall_timeout = config.health.stall_s
            self.proxy.grace = config.drain_timeout_s

        return commit

    def _access_log(self, config: Config) -> Commit:
        journal, target = self.proxy.journal, config.proxy.access_log
        if journal is None or target is None:
            raise NeedsRestartError("requests under way are in it, or are not")
        check_target(target)
        return lambda: journal.move(target)

    def _connections(self, config: Config) -> Commit:
        def commit() -> None:
            self.doors.data.limits = connection_limits(config)
            self.proxy.body_timeout = config.connections.body_timeout_s

        return commit

    def _certificate(self, config: Config) -> Commit:
        told = config.connections
        return self._pair("certificate", told.tls_cert, told.tls_key, oldest_tls(config))

    def _admin_certificate(self, config: Config) -> Commit:
        return self._pair("admin certificate", config.admin.tls_cert, config.admin.tls_key, ssl.TLSVersion.TLSv1_2)

    def _pair(self, name: str, cert: str | None, key: str | None, oldest: ssl.TLSVersion) -> Commit:
        certificates = self.doors.certificates.get(name)
        if certificates is None and cert is None:
            return lambda: None
        if certificates is None or cert is None or key is None:
            raise NeedsRestartError("an open port speaks TLS from the start or never")
        pair = Pair(Path(cert), Path(key))
        check_pair(pair)
        return lambda: certificates.change(pair, oldest)

    def _keys(self, config: Config) -> Commit:
        before, file = self.reloading.config, self.doors.key_file(config)
        if before.proxy.data_plane == "envoy" and passes_on(config) != passes_on(before):
            raise NeedsRestartError("whether clients' keys go to endpoints is told to Envoy at its start")

        def commit() -> None:
            if config.keys.file != before.keys.file:
                file()
            self.doors.keys.allowance = allowance(config)
            self.doors.trust.pass_on = passes_on(config)

        return commit

    def _upstream(self, config: Config) -> Commit:
        files, key = trust_files(config), endpoint_key(config)
        build_context(files)

        def commit() -> None:
            self.doors.trust.change(files)
            self.doors.trust.key = key

        return commit


def require_elsewhere(config: Config) -> None:
    """Raises ConfigError for an endpoint of the configuration that is this gateway: it would call itself for ever."""
    for spec in config.endpoints:
        _require_elsewhere(build_endpoint(spec), config)


def _require_elsewhere(endpoint: Endpoint, config: Config) -> None:
    doors = [("this gateway itself", config.proxy.host, config.proxy.port)]
    if config.admin.port is not None:
        doors.append(("this gateway's admin API", config.admin.host, config.admin.port))
    for what, host, port in doors:
        if leads_to(endpoint, host, port):
            raise ConfigError(f"endpoint {endpoint.name!r} is {what}; an endpoint is where an engine listens")


def _understood(read: Callable[[], T]) -> T:
    """What is made of a request's own words. Raises MisunderstoodError where it is a ConfigError to make anything."""
    try:
        return read()
    except ConfigError as error:
        raise MisunderstoodError(str(error)) from None


def _described(values: Mapping[str, Any]) -> tuple[Endpoint, EndpointSpec, str | None]:
    """An endpoint to be added by hand, how it was described, and its key. Raises ConfigError."""
    try:
        spec = msgspec.convert(dict(values), EndpointSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(str(error), EndpointSpec, "endpoint")) from None
    return build_endpoint(spec), spec, _key_of(spec)


def _key_of(spec: EndpointSpec) -> str | None:
    """The key of an endpoint that is added by hand; raises ConfigError."""
    if spec.api_key_file is not None:
        raise ConfigError("api_key_file: by this way the key itself is given, as api_key")
    if spec.api_key is not None:
        named_key("api_key", spec.api_key)
    return spec.api_key


def set_log_level(config: Config) -> None:
    """As the configuration says; loading one has set it back to what the command line says."""
    if config.log_level is not None:
        logging.getLogger().setLevel(config.log_level.upper())


def _listing(standing: Standing) -> dict[str, Any]:
    return {
        "name": standing.endpoint.name,
        "address": standing.endpoint.address,
        "owners": list(standing.owners),
        "removed": standing.removed,
        "draining": standing.draining,
        "weight": standing.weight,
    }
