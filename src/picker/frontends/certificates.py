"""What a gRPC server shows of itself over TLS: a folder's certificate, followed as it changes, or one of its own.

The names in the folder are those of a Kubernetes TLS secret. A self-signed certificate encrypts and proves nothing:
gateways that speak the endpoint-picker protocol take it without looking, as they do the endpoint picker's of llm-d.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import socket
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from picker.errors import ConfigError

log = logging.getLogger("picker.tls")

CERTIFICATE, KEY = "tls.crt", "tls.key"

_LIFE = datetime.timedelta(days=3650)
_SKEW = datetime.timedelta(hours=1)  # of the clocks of those who look


@dataclass(frozen=True, slots=True)
class Pair:
    """The files (PEM) of a certificate, with those that it descends from, and of its key."""

    certificate: Path
    key: Path

    def __str__(self) -> str:
        if self.certificate.parent == self.key.parent != Path():
            return f"{self.certificate.name} and {self.key.name} in {self.key.parent}"
        return f"{self.certificate} and {self.key}"


class Certificates:
    """A server's TLS identity, for the life of the server. context: offers one protocol, from TLS `oldest` on.

    client_ca: a file of certificates (PEM); when given, only clients that show a certificate of theirs are served.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        pair: Pair | None = None,
        client_ca: Path | None = None,
        oldest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        protocol: str = "h2",
    ) -> None:
        """folder: with tls.crt and tls.key; or pair: those two; neither: self-signed. protocol: that is spoken.

        Raises ConfigError for files that do not do.
        """
        self._pair = pair or (None if folder is None else Pair(folder / CERTIFICATE, folder / KEY))
        self.context = _context(protocol)
        self.context.minimum_version = oldest
        if self._pair is None:
            _load_self_signed(self.context)
        else:
            _load(self.context, self._pair)
        if client_ca is not None:
            _trust_only(self.context, client_ca)
        self._seen = self._state()

    async def follow(self, *, interval: float = 1.0) -> None:
        """Look for new files for ever; connections made after a change are shown the new certificate."""
        while self._pair is not None:
            await asyncio.sleep(interval)
            self.refresh()

    def refresh(self) -> bool:
        """Load the files when they have changed; whether they had. A pair that does not fit is left for next time."""
        state = self._state()
        if self._pair is None or state == self._seen:
            return False
        try:
            check_pair(self._pair)  # a half-written pair must not spoil the one in use
            _load(self.context, self._pair)
        except ConfigError as error:
            log.warning("the certificate has changed and cannot be used, the old one stays: %s", error)
            self._seen = state
            return False
        self._seen = state
        log.info("the certificate has changed and is in use")
        return True

    def change(self, pair: Pair, oldest: ssl.TLSVersion) -> None:
        """Other files, and another oldest protocol, for connections made from here on.

        Raises ConfigError, and changes nothing, for files that do not do.
        """
        check_pair(pair)
        _load(self.context, pair)
        self.context.minimum_version = oldest
        self._pair = pair
        self._seen = self._state()

    def _state(self) -> list[tuple[int, int, int]]:
        """What changes with the files; a secret is swapped by a symbolic link, which stat follows."""
        return [] if self._pair is None else [_identity(path) for path in (self._pair.certificate, self._pair.key)]


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_mtime_ns, found.st_size


def check_pair(pair: Pair) -> None:
    """Raises ConfigError for files that are no certificate and its key."""
    _load(_context("h2"), pair)


def _context(protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    return context


def _load(context: ssl.SSLContext, pair: Pair) -> None:
    if absent := [str(path) for path in (pair.certificate, pair.key) if not path.exists()]:
        raise ConfigError(f"cannot use {pair}: there is no {' and no '.join(absent)}")
    try:
        context.load_cert_chain(pair.certificate, pair.key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot use {pair}: {reason}") from None


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks the terminal


def _trust_only(context: ssl.SSLContext, client_ca: Path) -> None:
    try:
        context.load_verify_locations(client_ca)
    except OSError as error:
        raise ConfigError(f"cannot use {client_ca} to verify clients: {error.strerror or error}") from None
    context.verify_mode = ssl.CERT_REQUIRED


def _load_self_signed(context: ssl.SSLContext) -> None:
    certificate, key = self_signed(("localhost", socket.gethostname(), "127.0.0.1", "::1"))
    with tempfile.TemporaryDirectory(prefix="picker-tls-") as name:  # readable for this user alone
        folder = Path(name)
        (folder / CERTIFICATE).write_bytes(certificate)
        (folder / KEY).write_bytes(key)
        _load(context, Pair(folder / CERTIFICATE, folder / KEY))


def self_signed(names: Sequence[str]) -> tuple[bytes, bytes]:
    """A new certificate for these host names and addresses, and its key, both PEM.

    Raises ConfigError without the library that makes them.
    """
    try:
        return _make(names)
    except ImportError:
        raise ConfigError(
            "a self-signed certificate needs the package `cryptography`; install it, give a certificate of your own "
            "(--cert-path), or serve in clear text (--secure-serving false)"
        ) from None


def _make(names: Sequence[str]) -> tuple[bytes, bytes]:
    from cryptography import x509  # loads OpenSSL a second time: only for those who need it
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "picker")])
    addresses = [x509.IPAddress(address) for address in map(_address, names) if address is not None]
    hosts = [x509.DNSName(name) for name in names if _address(name) is None]
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName([*hosts, *addresses]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(pem), key.private_bytes(pem, form, serialization.NoEncryption())


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
