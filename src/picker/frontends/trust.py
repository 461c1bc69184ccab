"""Whom the proxy trusts behind it, and what it shows there: certificates of endpoints, one's own, and their API keys.

One of it serves all endpoints of a proxy; the files are read again when they change, for connections made from then on.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from picker.errors import ConfigError
from picker.frontends.keys import FIELDS

RawHeaders = Sequence[tuple[bytes, bytes]]
Headers = tuple[tuple[str, str], ...]

log = logging.getLogger("picker.tls")


@dataclass(frozen=True, slots=True)
class TrustFiles:
    """ca: certificates (PEM) that endpoints' must descend from; None: those of the system. certificate, key: one's own.

    server_name: that endpoints' certificates must bear, and that is asked for, instead of the name in the address.
    insecure: take any certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    insecure: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.ca, self.certificate, self.key) if path is not None)


class Trust:
    """The TLS context towards endpoints, and the key to send with a request to one.

    key: for every endpoint without one of its own; keys: by name of the endpoint. Clients' keys are passed on to
    endpoints without a key if `pass_on` says so.
    """

    def __init__(
        self,
        files: TrustFiles | None = None,
        *,
        key: str | None = None,
        pass_on: bool = True,
    ) -> None:
        """Raises ConfigError for files that do not do."""
        self.files = files or TrustFiles()
        self.keys: dict[str, str] = {}
        self._key = key
        self._listeners: list[Callable[[], None]] = []
        self.pass_on = pass_on
        self._context: ssl.SSLContext | None = None
        self._seen = self._state()
        if self.files.paths:
            self._context = build_context(self.files)

    @property
    def key(self) -> str | None:
        return self._key

    @key.setter
    def key(self, key: str | None) -> None:
        self._key = key
        self._tell()

    @property
    def server_name(self) -> str | None:
        return self.files.server_name

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        if self._context is None:  # reading the system's certificates takes tens of milliseconds
            self._context = build_context(self.files)
        return self._context

    def dress(self, endpoint: str, raw: RawHeaders, added: Headers) -> tuple[RawHeaders, Headers]:
        """A client's header fields and those to be set, as they are towards an endpoint: with its key, or none."""
        shown = self.authorization(endpoint)
        if shown is None and self.pass_on:
            return raw, added
        kept = [pair for pair in raw if pair[0] not in FIELDS]
        return kept, added if shown is None else (*added, ("authorization", shown))

    def authorization(self, endpoint: str) -> str | None:
        """What an endpoint is shown instead of clients' keys; None where it has none."""
        key = self.keys.get(endpoint, self._key)
        return None if key is None else f"Bearer {key}"

    def listen(self, heard: Callable[[], None]) -> None:
        """Have it called whenever endpoints' keys may have changed."""
        self._listeners.append(heard)

    def change(self, files: TrustFiles) -> None:
        """Other files from here on. Raises ConfigError, and changes nothing, for files that do not do."""
        self._context = build_context(files)
        self.files, self._seen = files, self._state(files)

    def refresh(self) -> bool:
        """Read files that have changed; whether they had and do."""
        state = self._state()
        if state == self._seen:
            return False
        self._seen = state
        try:
            self._context = build_context(self.files)
        except ConfigError as error:
            log.warning(
                "the certificates towards endpoints have changed and cannot be used, the old ones stay: %s", error
            )
            return False
        log.info("the certificates towards endpoints have changed and are in use")
        return True

    def learn(self, keys: Mapping[str, str]) -> None:
        """The keys of endpoints, by name, in place of those before."""
        self.keys = dict(keys)
        self._tell()

    def _tell(self) -> None:
        for heard in self._listeners:
            heard()

    def _state(self, files: TrustFiles | None = None) -> list[tuple[int, int, int]]:
        return [_identity(path) for path in (files or self.files).paths]


def build_context(files: TrustFiles) -> ssl.SSLContext:
    """A client's TLS context; raises ConfigError that names the file that does not do."""
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except OSError as error:
        raise ConfigError(f"cannot use {files.ca} to verify endpoints: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if files.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if files.certificate is not None:
        _show(context, files.certificate, files.key)
    return context


def _show(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot use {certificate} towards endpoints: {reason}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks the terminal


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size
