"""Which header fields cross the proxy: hop-by-hop fields stay behind, a client steers no endpoint, forwarding is said.

Pure functions over raw ASGI headers, (name in lower case, value) pairs of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

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
_FORWARDED = frozenset((b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"))
_NOT_AS_IT_IS = _HOP_BY_HOP | _CONTROL | _OURS | _FORWARDED
_BODYLESS = frozenset((204, 304))


def upstream_headers(
    raw: RawHeaders, added: Iterable[tuple[str, str]], *, client: str | None, scheme: str
) -> list[tuple[bytes, bytes]]:
    """The client's headers as an endpoint may see them, with `added` set, and who asked for what appended.

    client: address the request came from. `x-forwarded-for` grows by it; `x-forwarded-proto` and `-host` keep the
    value of the outermost proxy. `forwarded` (RFC 7239) grows where another proxy has begun it.
    """
    headers: list[tuple[bytes, bytes]] = []
    forwarded: list[tuple[bytes, bytes]] = []
    host = b""
    listed: list[bytes] = []
    for pair in raw:
        name = pair[0]
        if name in _NOT_AS_IT_IS:
            if name == b"host":
                host = pair[1]
            elif name == b"connection":
                listed += _tokens(pair[1])
            elif name in _FORWARDED:
                forwarded.append(pair)
        elif not name.startswith(_CONTROL_PREFIXES):
            headers.append(pair)
    if listed:
        headers = [pair for pair in headers if pair[0] not in listed]
        forwarded = [pair for pair in forwarded if pair[0] not in listed]
    if extra := _encoded(added):
        names = {name for name, _ in extra}
        headers = [pair for pair in headers if pair[0] not in names] + extra
    headers += _forwarding(forwarded, client=client, scheme=scheme, host=host)
    return headers


def _forwarding(
    before: list[tuple[bytes, bytes]], *, client: str | None, scheme: str, host: bytes
) -> list[tuple[bytes, bytes]]:
    """The fields that say who asked for what, from what they said before."""
    if not before:
        named = [] if client is None else [(b"x-forwarded-for", client.encode("latin-1"))]
        return [*named, (b"x-forwarded-proto", scheme.encode()), *([(b"x-forwarded-host", host)] if host else ())]
    hops = [value for name, value in before if name == b"x-forwarded-for"]
    if client is not None:
        hops.append(client.encode("latin-1"))
    told = dict(reversed(before))
    fields = [(b"x-forwarded-for", b", ".join(hops))] if hops else []
    fields.append((b"x-forwarded-proto", told.get(b"x-forwarded-proto") or scheme.encode()))
    if host := told.get(b"x-forwarded-host") or host:
        fields.append((b"x-forwarded-host", host))
    if chain := [value for name, value in before if name == b"forwarded"]:
        fields.append((b"forwarded", b", ".join((*chain, _element(client, scheme)))))
    return fields


def _element(client: str | None, scheme: str) -> bytes:
    """Ours in a `forwarded` field. An IPv6 address is quoted and in brackets (RFC 7239 section 6)."""
    node = "unknown" if client is None else f'"[{client}]"' if ":" in client else client
    return f"for={node};proto={scheme}".encode("latin-1")


def client_headers(raw: RawHeaders, added: Iterable[tuple[str, str]], *, status: int) -> list[tuple[bytes, bytes]]:
    """An endpoint's response headers as the client may see them, `added` in place of fields of the same name."""
    dropped: set[bytes] = set()
    kept: list[tuple[bytes, bytes]] = []
    for pair in raw:
        name = pair[0]
        if name not in _HOP_BY_HOP:
            kept.append(pair)
        elif name == b"connection":
            dropped.update(_tokens(pair[1]))
        elif name == b"transfer-encoding":
            dropped.add(b"content-length")  # RFC 9112 section 6.3: the coding overrides the length
    if status in _BODYLESS:
        dropped.add(b"content-length")  # a 304 may tell the length of a body that does not follow
    extra = _encoded(added)
    dropped.update([name for name, _ in extra])
    return [pair for pair in kept if pair[0] not in dropped] + extra


def _encoded(fields: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in fields]


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().lower() for token in value.split(b",")]
