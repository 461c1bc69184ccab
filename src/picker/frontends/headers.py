"""Which header fields cross the proxy: hop-by-hop fields stay behind, a client steers no endpoint, forwarding is said.

Pure functions over raw ASGI headers, (name in lower case, value) pairs of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from multidict import CIMultiDict

RawHeaders = Iterable[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1, and `proxy-connection` which old clients send. `proxy-authenticate` and
# `proxy-authorization` are meant for the next proxy, which is us.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# What a gateway tells an engine or its sidecar. From a client it would choose its own endpoint, or have a sidecar
# connect to an address of the client's choice.
_CONTROL = frozenset(
    (
        b"x-data-parallel-rank",
        b"x-data-parallel-host-port",
        b"x-prefiller-host-port",
        b"x-encoder-hosts-ports",
        b"x-kv-cache-source-host-port",
    )
)
_CONTROL_PREFIXES = (b"x-gateway-destination-endpoint", b"x-picker-")
# Set anew for the upstream connection; `expect` has been answered by our own server.
_OURS = frozenset((b"host", b"content-length", b"expect"))
_NOT_UPSTREAM = _HOP_BY_HOP | _CONTROL | _OURS
_BODYLESS = frozenset((204, 304))


def upstream_headers(
    raw: RawHeaders, added: Iterable[tuple[str, str]], *, client: str | None, scheme: str
) -> CIMultiDict[str]:
    """The client's headers as an endpoint may see them, with `added` set, and who asked for what appended.

    client: address the request came from. `x-forwarded-for` grows by it; `x-forwarded-proto` and `-host` keep the
    value of the outermost proxy.
    """
    headers: CIMultiDict[str] = CIMultiDict()
    host = ""
    listed: bytes | None = None
    for name, value in raw:
        if name in _NOT_UPSTREAM or name.startswith(_CONTROL_PREFIXES):
            if name == b"host":
                host = _text(value)
            elif name == b"connection":
                listed = value if listed is None else listed + b"," + value
            continue
        headers.add(name.decode("latin-1"), _text(value))
    if listed is not None:
        for named in _tokens(listed):
            headers.popall(named.decode("latin-1"), None)
    _forwarded(headers, client=client, scheme=scheme, host=host)
    for field, text in added:
        headers[field] = text
    return headers


def _forwarded(headers: CIMultiDict[str], *, client: str | None, scheme: str, host: str) -> None:
    if client is not None:
        before = headers.getall("x-forwarded-for", None)
        headers["x-forwarded-for"] = client if before is None else ", ".join((*before, client))
    headers.setdefault("x-forwarded-proto", scheme)
    if host:
        headers.setdefault("x-forwarded-host", host)


def client_headers(raw: RawHeaders, added: Iterable[tuple[str, str]], *, status: int) -> list[tuple[bytes, bytes]]:
    """An endpoint's response headers as the client may see them, `added` in place of fields of the same name."""
    dropped = _HOP_BY_HOP
    pairs = [(name.lower(), value) for name, value in raw]
    for name, value in pairs:
        if name == b"connection":
            dropped = dropped | set(_tokens(value))
        elif name == b"transfer-encoding":
            dropped = dropped | {b"content-length"}  # RFC 9112 section 6.3: the coding overrides the length
    if status in _BODYLESS:
        dropped = dropped | {b"content-length"}  # a 304 may tell the length of a body that does not follow
    extra = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in added]
    if extra:
        dropped = dropped | {name for name, _ in extra}
    return [pair for pair in pairs if pair[0] not in dropped] + extra


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().lower() for token in value.split(b",")]


def _text(value: bytes) -> str:
    """A field value as text that the client side encodes to the same bytes (as UTF-8) again."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        # Latin-1 was allowed once (RFC 9110 section 5.5); what arrives upstream is the same text in UTF-8.
        return value.decode("latin-1")
