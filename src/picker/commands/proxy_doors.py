"""The doors of a `picker proxy`: keys, certificates and limits of those who come in, keys and TLS towards endpoints.

Puts together what the configuration says of them, and follows the files that it names. Serves nothing.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from picker.app import CONFIGURATION, ENDPOINTS_FILE, App
from picker.commands.options import admin_token, secret_variable
from picker.config import Config, EndpointSpec
from picker.discovery import build_endpoint
from picker.errors import ConfigError
from picker.frontends.admin_control import closed_by_default
from picker.frontends.certificates import Certificates, Pair
from picker.frontends.keys import Allowance, Key, KeyFile, KeyMetrics, Keyring, named_key, parse_keys
from picker.frontends.limits import ConnectionLimits, Door, DoorMetrics, allow_many_files
from picker.frontends.trust import Trust, TrustFiles
from picker.sources.file import read_key
from picker.sources.roster import OPERATOR
from picker.sources.scrape import Manner, root_of
from picker.types import EndpointAdded, EndpointRemoved, Fact

log = logging.getLogger("picker.keys")

KEYS_VARIABLE = "PICKER_API_KEYS"  # entries as in a file of keys, between commas or on lines of their own
ENDPOINT_KEYS, TOKEN = "keys of endpoints", "admin token"  # what is followed, as a reload names it


class Doors:
    """Who comes in where, and what endpoints are shown: of one proxy, as its configuration says.

    api_key: of the command line or its environment. config: in force, to be replaced when another one is.
    """

    def __init__(self, config: Config, api_key: str | None = None) -> None:
        """Raises ConfigError for what does not do."""
        allow_many_files()
        self.config = config
        self.api_key = api_key
        self.refreshers: dict[str, Callable[[], bool]] = {}
        self.keys = Keyring(allowance=allowance(config))
        self.key_file(config)()
        self.admin_keys = Keyring()
        self.admin_ring(config)()
        self.trust = Trust(trust_files(config), key=endpoint_key(config), pass_on=passes_on(config))
        self.endpoint_keys = EndpointKeys(self.trust)
        self.endpoint_keys.say(CONFIGURATION, keys_of_endpoints(config))
        self.manners = Manners(self.trust, api_key)
        self.refreshers["upstream certificates"] = self.trust.refresh
        self._followed = {
            ENDPOINT_KEYS: Followed(lambda: files_of_endpoint_keys(self.config), self._read_endpoint_keys),
            TOKEN: Followed(lambda: _given(self.config.admin.token_file), self._read_token),
        }
        self.refreshers |= {name: each.refresh for name, each in self._followed.items()}
        self.certificates: dict[str, Certificates] = {}
        tls, admin = config.connections, config.admin
        self.data = Door(connection_limits(config), self._tls("certificate", tls.tls_cert, tls.tls_key, config))
        self.admin = Door(tls=self._tls("admin certificate", admin.tls_cert, admin.tls_key))

    def key_file(self, config: Config) -> Callable[[], None]:
        """What has clients asked for the keys of a configuration. Raises ConfigError for a file that does not do."""
        fixed = fixed_keys(self.api_key, secret_variable(KEYS_VARIABLE))
        file = None if config.keys.file is None else KeyFile(Keyring(), Path(config.keys.file), fixed)
        return lambda: self._have(self.keys, "keys", fixed, file)

    def admin_ring(self, config: Config) -> Callable[[], None]:
        """The same of those who operate. Raises ConfigError, also for an admin API that would be open to everybody."""
        token = admin_token(config.admin)
        fixed = () if token is None else (named_key("admin", token),)
        path = config.admin.keys_file
        file = None if path is None else KeyFile(Keyring(), Path(path), fixed)
        if config.admin.port is not None:
            ring = Keyring(fixed, closed=file is not None)
            closed_by_default(config.admin.host, ring, read_only=config.admin.read_only)
        return lambda: self._have(self.admin_keys, "admin keys", fixed, file)

    def _have(self, ring: Keyring, name: str, fixed: Iterable[Key], file: KeyFile | None) -> None:
        if file is not None:
            file.serve(ring)
            self.refreshers[name] = file.refresh
            return
        ring.closed = False
        ring.replace(fixed)
        self.refreshers.pop(name, None)

    def _read_endpoint_keys(self) -> None:
        key, keys = endpoint_key(self.config), keys_of_endpoints(self.config)
        self.trust.key = key
        self.endpoint_keys.say(CONFIGURATION, keys)

    def _read_token(self) -> None:
        self.admin_ring(self.config)()

    def _tls(self, name: str, cert: str | None, key: str | None, config: Config | None = None) -> ssl.SSLContext | None:
        if cert is None or key is None:
            return None
        ca = None if config is None else path_of(config.connections.tls_client_ca)
        oldest = ssl.TLSVersion.TLSv1_2 if config is None else oldest_tls(config)
        pair = Pair(Path(cert), Path(key))
        certificates = Certificates(None, pair=pair, client_ca=ca, oldest=oldest, protocol="http/1.1")
        self.refreshers[name], self.certificates[name] = certificates.refresh, certificates
        return certificates.context

    def adopt(self, config: Config) -> None:
        """Follow the files that this configuration names, which have just been read."""
        self.config = config
        for each in self._followed.values():
            each.settle()

    def export(self, app: App) -> None:
        """Have what passes the doors counted, and endpoints asked by picker itself as the proxy asks them."""
        app.manners = self.manners
        app.runtime.listen(self.manners.observe)
        app.tell_keys = self.endpoint_keys.say
        app.telemetry.registry.register(KeyMetrics(self.keys))
        app.telemetry.registry.register(DoorMetrics(self.data))


class EndpointKeys:
    """The keys that endpoints are shown of their own, as those who list endpoints say.

    Of an endpoint that two list, the first one's description counts, and with it its key: see `Roster`.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._said: dict[str, dict[str, str | None]] = {}

    def say(self, owner: str, keys: Mapping[str, str | None]) -> None:
        """All that an owner lists, by name; None: without a key of its own."""
        self._said[owner] = dict(keys)
        self._settle()

    def add(self, name: str, key: str | None) -> None:
        """What was added by hand."""
        self._said.setdefault(OPERATOR, {})[name] = key
        self._settle()

    def drop(self, name: str) -> None:
        """What was added by hand, and has been removed."""
        self._said.get(OPERATOR, {}).pop(name, None)
        self._settle()

    def _settle(self) -> None:
        merged: dict[str, str | None] = {}
        for owner in (OPERATOR, ENDPOINTS_FILE, CONFIGURATION):
            merged |= self._said.get(owner, {})
        self._trust.learn({name: key for name, key in merged.items() if key is not None})


class Manners:
    """How picker itself asks an endpoint, by its root URL: with the key, the certificates and the name of its clients'.

    usual: the key of clients, shown where it would be passed on. Follows the pool by the facts that it is shown.
    """

    def __init__(self, trust: Trust, usual: str | None) -> None:
        self._trust = trust
        self._usual = usual
        self._names: dict[str, str] = {}
        self._roots: dict[str, str] = {}

    def observe(self, fact: Fact) -> None:
        """To be shown every fact."""
        match fact:
            case EndpointAdded(endpoint):
                self._forget(endpoint.name)
                self._roots[endpoint.name] = root_of(endpoint)
                self._names[root_of(endpoint)] = endpoint.name
            case EndpointRemoved(name):
                self._forget(name)
            case _:
                pass

    def _forget(self, name: str) -> None:
        root = self._roots.pop(name, "")
        if self._names.get(root) == name:  # ranks share an address
            del self._names[root]

    def __call__(self, root: str) -> Manner:
        trust = self._trust
        key = trust.keys.get(self._names.get(root, ""), trust.key) or (self._usual if trust.pass_on else None)
        return Manner(key, trust.context if root.startswith("https:") else True, trust.server_name, shared=True)


class Followed:
    """Files that something is read from: whether they have changed, and the reading then.

    paths: which they are at the moment. read: raises ConfigError for what does not do, and changes nothing then.
    """

    def __init__(self, paths: Callable[[], Iterable[Path]], read: Callable[[], None]) -> None:
        self._paths = paths
        self._read = read
        self._seen = self._state()
        self._complaint: str | None = None

    def settle(self) -> None:
        """What is there has been read."""
        self._seen, self._complaint = self._state(), None

    def refresh(self) -> bool:
        """Read again what has changed; whether it had and does. What does not is told once and looked at again."""
        state = self._state()
        if state == self._seen:
            return False
        try:
            self._read()
        except ConfigError as error:
            if self._complaint != str(error):
                log.warning("%s; what was read before stays", error)
            self._complaint = str(error)
            return False
        self._seen, self._complaint = state, None
        return True

    def _state(self) -> list[tuple[Path, int, int, int]]:
        return [(path, *_identity(path)) for path in self._paths()]


def fixed_keys(api_key: str | None, variable: str | None) -> tuple[Key, ...]:
    """The keys of command line and environment. Raises ConfigError, also for a variable that is set and has no key."""
    keys = [] if api_key is None else [named_key("default", api_key)]
    if variable is None:
        return tuple(keys)
    listed = parse_keys("\n".join(variable.replace(",", "\n").split("\n")), origin=KEYS_VARIABLE)
    if not listed:
        raise ConfigError(f"{KEYS_VARIABLE}: it is set and has no key, which keeps nobody out; unset it, or give keys")
    return (*keys, *listed)


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


def oldest_tls(config: Config) -> ssl.TLSVersion:
    """That clients may speak."""
    return ssl.TLSVersion.TLSv1_3 if config.connections.tls_min_version == "1.3" else ssl.TLSVersion.TLSv1_2


def allowance(config: Config) -> Allowance:
    return Allowance(config.keys.max_concurrent, config.keys.max_body_bytes)


def trust_files(config: Config) -> TrustFiles:
    told = config.upstream
    return TrustFiles(path_of(told.ca), path_of(told.cert), path_of(told.key), told.server_name, told.insecure)


def endpoint_key(config: Config) -> str | None:
    """What is sent to endpoints without a key of their own; raises ConfigError for a file that does not do."""
    return _one_key("upstream", config.upstream.api_key, config.upstream.api_key_file)


def keys_of_endpoints(config: Config) -> dict[str, str | None]:
    """The configuration's endpoints by name, with the key of their own where they have one; raises ConfigError."""
    found: dict[str, str | None] = {}
    for spec in config.endpoints:
        name = build_endpoint(spec).name
        key, file = (spec.api_key, spec.api_key_file) if isinstance(spec, EndpointSpec) else (None, None)
        found[name] = _one_key(f"endpoint {name}", key, file)
    return found


def files_of_endpoint_keys(config: Config) -> list[Path]:
    """The files that these are read from."""
    specs = (spec.api_key_file for spec in config.endpoints if isinstance(spec, EndpointSpec))
    return [path for name in (config.upstream.api_key_file, *specs) for path in _given(name)]


def _one_key(place: str, key: str | None, file: str | None) -> str | None:
    if file is not None:
        try:
            return read_key(Path(file))
        except ConfigError as error:
            raise ConfigError(f"{place}: api_key_file: {error}") from None
    if key is not None:
        named_key(f"{place}: api_key", key)
    return key


def passes_on(config: Config) -> bool:
    """Whether clients' keys go on to endpoints: where they are not picker's own business, unless told."""
    if config.keys.pass_on is not None:
        return config.keys.pass_on
    return config.keys.file is None and not os.environ.get(KEYS_VARIABLE)


def path_of(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _given(name: str | None) -> list[Path]:
    return [] if name is None else [Path(name)]


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size
