"""What can be changed of a running `picker proxy`, and the doors it has: keys, certificates, limits, admin API.

Puts together what the configuration says of them, and puts a new one in force. Serves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from picker.app import App, build_endpoint, build_limits, build_policy
from picker.config import Config, EndpointSpec, to_values
from picker.errors import ConfigError
from picker.frontends.admin import Admin
from picker.frontends.admin_control import closed_by_default
from picker.frontends.certificates import Certificates, Pair
from picker.frontends.keys import Allowance, Key, KeyFile, KeyMetrics, Keyring, named_key, parse_keys
from picker.frontends.limits import ConnectionLimits, Door, DoorMetrics, allow_many_files
from picker.frontends.proxy import Proxy
from picker.frontends.trust import Trust, TrustFiles, build_context
from picker.reload import Commit, NeedsRestartError, Reload
from picker.sources.roster import Standing, UnknownEndpointError

KEYS_VARIABLE = "PICKER_API_KEYS"  # entries as in a file of keys, between commas or on lines of their own
ADMIN_VARIABLE = "PICKER_ADMIN_KEY"
_POLICY = (
    *("policy", "scorers", "filters", "picker", "profiles", "profile", "profile_header", "prefill_profile"),
    *("saturation",),
)


class Doors:
    """Who comes in where, and what endpoints are shown: of one proxy, as its configuration says.

    api_key: of the command line or its environment.
    """

    def __init__(self, config: Config, api_key: str | None = None) -> None:
        """Raises ConfigError for what does not do."""
        allow_many_files()
        self.refreshers: dict[str, Callable[[], bool]] = {}
        self.keys = self._data_keys(config, api_key)
        self.admin_keys = self._admin_keys(config)
        self.trust = Trust(trust_files(config), key=endpoint_key(config), pass_on=passes_on(config))
        self.trust.learn(endpoint_keys(config))
        # Endpoints that ask for clients' keys ask picker, too, when it wants to know their models.
        self.asking_key = self.trust.key or (api_key if self.trust.pass_on else None)
        self.refreshers["upstream certificates"] = self.trust.refresh
        tls = config.connections
        self.data = Door(connection_limits(config), self._tls("certificate", tls.tls_cert, tls.tls_key, config))
        admin = config.admin
        self.admin = Door(tls=self._tls("admin certificate", admin.tls_cert, admin.tls_key))
        if admin.port is not None:
            closed_by_default(admin.host, self.admin_keys, read_only=admin.read_only)

    def _data_keys(self, config: Config, api_key: str | None) -> Keyring:
        fixed = fixed_keys(api_key, os.environ.get(KEYS_VARIABLE))
        ring = Keyring(fixed, allowance=allowance(config))
        if config.keys.file is not None:
            self.refreshers["keys"] = KeyFile(ring, Path(config.keys.file), fixed).refresh
        return ring

    def _admin_keys(self, config: Config) -> Keyring:
        given = config.admin.token or os.environ.get(ADMIN_VARIABLE)
        fixed = [] if given is None else [named_key("admin", given)]
        ring = Keyring(fixed)
        if config.admin.keys_file is not None:
            self.refreshers["admin keys"] = KeyFile(ring, Path(config.admin.keys_file), fixed).refresh
        return ring

    def _tls(self, name: str, cert: str | None, key: str | None, config: Config | None = None) -> ssl.SSLContext | None:
        if cert is None or key is None:
            return None
        ca = None if config is None else _path(config.connections.tls_client_ca)
        oldest = ssl.TLSVersion.TLSv1_2
        if config is not None and config.connections.tls_min_version == "1.3":
            oldest = ssl.TLSVersion.TLSv1_3
        pair = Pair(Path(cert), Path(key))
        certificates = Certificates(None, pair=pair, client_ca=ca, oldest=oldest, protocol="http/1.1")
        self.refreshers[name] = certificates.refresh
        return certificates.context

    def export(self, app: App) -> None:
        """Have what passes the doors counted, and endpoints asked for their metrics as the proxy asks them."""
        app.scrape_key = self.asking_key
        if self.trust.files != TrustFiles():
            app.scrape_tls = self.trust.context
        app.telemetry.registry.register(KeyMetrics(self.keys))
        app.telemetry.registry.register(DoorMetrics(self.data))


def fixed_keys(api_key: str | None, variable: str | None) -> tuple[Key, ...]:
    """The keys of command line and environment."""
    keys = [] if api_key is None else [named_key("default", api_key)]
    if variable:
        keys += parse_keys("\n".join(variable.replace(",", "\n").split("\n")), origin=KEYS_VARIABLE)
    return tuple(keys)


def connection_limits(config: Config) -> ConnectionLimits:
    told = config.connections
    return ConnectionLimits(
        max_connections=told.max_connections,
        max_head_bytes=told.max_head_bytes,
        max_target_bytes=told.max_target_bytes,
        max_headers=told.max_headers,
        head_timeout=told.head_timeout_s,
        idle_timeout=told.idle_timeout_s,
    )


def allowance(config: Config) -> Allowance:
    return Allowance(config.keys.max_concurrent, config.keys.max_body_bytes)


def trust_files(config: Config) -> TrustFiles:
    told = config.upstream
    return TrustFiles(_path(told.ca), _path(told.cert), _path(told.key), told.server_name, told.insecure)


def endpoint_key(config: Config) -> str | None:
    """What is sent to endpoints without a key of their own; raises ConfigError for a file that does not do."""
    if config.upstream.api_key_file is None:
        key = config.upstream.api_key
    else:
        try:
            key = Path(config.upstream.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"upstream.api_key_file: {config.upstream.api_key_file}: cannot be read: {error}"
            ) from None
    if key is not None:
        named_key("upstream.api_key", key)
    return key


def endpoint_keys(config: Config) -> dict[str, str]:
    """The keys of endpoints that have one of their own, by name."""
    specs = [spec for spec in config.endpoints if isinstance(spec, EndpointSpec)]
    return {build_endpoint(spec).name: spec.api_key for spec in specs if spec.api_key is not None}


def passes_on(config: Config) -> bool:
    """Whether clients' keys go on to endpoints: where they are not picker's own business, unless told."""
    if config.keys.pass_on is not None:
        return config.keys.pass_on
    return config.keys.file is None and not os.environ.get(KEYS_VARIABLE)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


# --- changing ----------------------------------------------------------------------------------------------


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
        self.reloading = Reload(app.config, load, self._live(), doors.refreshers, watched, set_log_level)
        set_log_level(app.config)

    def admin(self) -> Admin:
        """The admin API, with what can be changed."""
        config = self.app.config.admin
        return Admin(
            self.app.runtime,
            keys=self.doors.admin_keys,
            control=self,
            read_only=config.read_only,
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
        try:
            spec = msgspec.convert(dict(values), EndpointSpec)
        except msgspec.ValidationError as error:
            raise ConfigError(str(error)) from None
        if spec.api_key is not None:
            named_key("api_key", spec.api_key)
        endpoint = build_endpoint(spec)
        self.app.roster.add(endpoint)
        if spec.weight != 1.0:
            self.app.roster.weigh(endpoint.name, spec.weight)
        if spec.api_key is not None:
            self.doors.trust.keys[endpoint.name] = spec.api_key
        return self.endpoint(endpoint.name)

    def remove(self, name: str) -> dict[str, Any]:
        standing = self._known(lambda: self.app.roster.remove(name), name)
        owners = [owner for owner in standing.owners if owner != "operator"]
        if owners:
            back = f"listed by {owners[0]}: it stays away until it is added here, or that list drops and names it again"
            return {"name": name, "removed": True, "note": back}
        self.doors.trust.keys.pop(name, None)
        return {"name": name, "removed": True, "note": None}

    def drain(self, name: str, *, draining: bool) -> dict[str, Any]:
        self._known(lambda: self.app.roster.drain(name, draining=draining), name)
        return self.endpoint(name)

    def weigh(self, name: str, weight: float) -> dict[str, Any]:
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

    def _live(self) -> Mapping[tuple[str, ...], Callable[[Config], Commit]]:
        return {
            ("endpoints",): self._endpoints,
            _POLICY: self._policy,
            ("limits", "objectives"): self._limits,
            ("queue.size", "queue.max_inflight"): self._queue,
            ("proxy.first_byte_timeout_s", "proxy.idle_timeout_s", "drain_timeout_s"): self._times,
            (
                *("connections.max_connections", "connections.max_head_bytes", "connections.max_target_bytes"),
                *("connections.max_headers", "connections.head_timeout_s", "connections.body_timeout_s"),
                "connections.idle_timeout_s",
            ): self._connections,
            ("keys.max_concurrent", "keys.max_body_bytes", "keys.pass_on"): self._keys,
            ("upstream",): self._upstream,
            ("log_level",): self._log_level,
        }

    def _endpoints(self, config: Config) -> Commit:
        for spec in config.endpoints:
            build_endpoint(spec)
        if self.app.discovery is not None or not (config.endpoints or config.endpoints_file):
            raise ConfigError("endpoints: there must be one, or a file of them")
        keys = endpoint_keys(config)
        names = [build_endpoint(spec).name for spec in config.endpoints]
        if len(set(names)) < len(names):
            raise ConfigError("endpoints: two of them have the same name")

        def commit() -> None:
            added = self.app.roster.all()
            ours = {name: key for name, key in self.doors.trust.keys.items() if name in added and name not in names}
            self.doors.trust.learn(ours | keys)
            self.app.list_endpoints(config)

        return commit

    def _policy(self, config: Config) -> Commit:
        profile, picker = build_policy(config)
        if config.saturation != self.reloading.config.saturation:
            raise NeedsRestartError
        if not frozenset(getattr(profile, "headers", ())) <= self.app.policy.headers:
            raise NeedsRestartError  # requests are told to the scheduler with the headers that it first asked for
        return lambda: self.app.policy.replace(profile, picker)

    def _limits(self, config: Config) -> Commit:
        discovery = self.app.discovery
        limits = build_limits(config, None if discovery is None else discovery.objectives)

        def commit() -> None:
            self.app.runtime.limits = limits

        return commit

    def _queue(self, config: Config) -> Commit:
        before, after = self.reloading.config.queue.max_inflight, config.queue.max_inflight
        if (before is None) != (after is None):
            raise NeedsRestartError  # who waits is told apart by headers that are asked for from the start
        scheduler = self.app.runtime.scheduler

        def commit() -> None:
            scheduler.settings = replace(scheduler.settings, max_inflight=after)
            scheduler.queue.capacity = config.queue.size

        return commit

    def _times(self, config: Config) -> Commit:
        def commit() -> None:
            self.proxy.first_byte_timeout = config.proxy.first_byte_timeout_s
            self.proxy.idle_timeout = config.proxy.idle_timeout_s
            self.proxy.grace = config.drain_timeout_s

        return commit

    def _connections(self, config: Config) -> Commit:
        def commit() -> None:
            self.doors.data.limits = connection_limits(config)
            self.proxy.body_timeout = config.connections.body_timeout_s

        return commit

    def _keys(self, config: Config) -> Commit:
        def commit() -> None:
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

    def _log_level(self, config: Config) -> Commit:
        return lambda: None  # see `set_log_level`


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
