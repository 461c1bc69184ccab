"""Endpoints given by hand, on the command line or in a list: read once, never watched.

Owns the spelling of an endpoint's address, which other sources use too. Refuses what would only fail later: a missing
port, a path, an unknown scheme.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable

from picker.errors import ConfigError
from picker.types import Endpoint, EndpointAdded, Fact

SCHEMES = ("http", "https")

_LOCAL = {"localhost": {"127.0.0.1", "::1"}}
_ANY = ("", "0.0.0.0", "::")
_URL = re.compile(r"(?:(?P<scheme>[^/?#]*)://)?(?P<authority>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_CREDENTIALS = re.compile(r"[^/]*@")  # never shown
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")


class StaticSource:
    """Announces a fixed set of endpoints and is done."""

    provides = ("endpoints",)

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        require_unique_names(self.endpoints)

    async def run(self, emit: Callable[[Fact], None]) -> None:
        for endpoint in self.endpoints:
            emit(EndpointAdded(endpoint))


def parse_endpoint(text: str) -> Endpoint:
    """Read `http://host:port`, `https://host:port`, `host:port` or `[v6]:port`, with or without a trailing slash.

    The endpoint is named after its address. Raises ConfigError that says what is wrong with the text.
    """
    shown = f"endpoint {_CREDENTIALS.sub('***@', text)!r}"
    found = _URL.fullmatch(text.strip())
    if found is None or not text.strip():
        raise ConfigError(f"{shown} is empty; write http://host:port")
    scheme = "http" if found["scheme"] is None else found["scheme"].lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"{shown} has the unknown scheme {scheme!r}; use http or https")
    if found["rest"] not in ("", "/"):
        root = f"{scheme}://{_CREDENTIALS.sub('', found['authority'])}"
        raise ConfigError(f"{shown} goes on with {found['rest']!r}; give the server's root only: {root}")
    try:
        address = parse_address(found["authority"])
    except ConfigError as error:
        raise ConfigError(f"{shown}: {error}") from error
    return Endpoint(name=address, address=address, scheme=scheme)


def parse_address(text: str) -> str:
    """Check "host:port" and return its one spelling: host in lower case, IPv6 compressed and in brackets."""
    if "@" in text:
        raise ConfigError("credentials before the host are not supported; use the API key setting")
    if text and ":" not in text:
        raise ConfigError(f"the port is missing; write {text}:8000, or whatever it is")
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not port or (text.startswith("[") and not bracketed):
        raise ConfigError("the port is missing; write host:port")
    if ":" in host and not bracketed:  # in ::1:8000 nobody can tell the port from the address
        raise ConfigError("an IPv6 address goes in brackets, as in [::1]:8000")
    return join_address(host, port)


def join_address(host: str, port: str | int) -> str:
    """Put a host (name, IPv4, or IPv6 with or without brackets) and a port together; raises ConfigError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare:
        raise ConfigError("the host or the port is missing; write host:port")
    return f"{_host(bare)}:{parse_port(port)}"


def parse_port(port: str | int) -> int:
    text = str(port)
    if not (re.fullmatch(r"[0-9]{1,5}", text) and 1 <= int(text) <= 65535):
        raise ConfigError(f"the port {text!r} is not a number from 1 to 65535")
    return int(text)


def leads_to(endpoint: Endpoint, host: str, port: int) -> bool:
    """Whether an endpoint is, by its address alone, whoever listens on this host ("" or a wildcard: on all) and port.

    A name that only DNS knows is never taken for it.
    """
    name, _, number = endpoint.address.rpartition(":")
    if int(number) != port:
        return False
    theirs, ours = (_LOCAL.get(each.lower(), {each.strip("[]").lower()}) for each in (name, host))
    return bool(theirs & ours) or (host in _ANY and any(map(_is_loopback, theirs)))


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def require_unique_names(endpoints: Iterable[Endpoint]) -> None:
    """Raise ConfigError if a name comes twice: a name is an endpoint's identity."""
    counts = Counter(endpoint.name for endpoint in endpoints)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(
            f"endpoint {twice[0]!r} is listed {counts[twice[0]]} times; "
            "list it once, or give each a name of its own (data-parallel ranks have one by their rank)"
        )


def _host(bare: str) -> str:
    if (v6 := _as_ipv6(bare)) is not None:
        return f"[{v6.compressed}]"
    if not _HOST.fullmatch(bare):
        raise ConfigError(f"{bare!r} is no host name or IP address")
    return bare.lower()


def _as_ipv6(text: str) -> ipaddress.IPv6Address | None:
    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        return None
