"""Requests that somebody may hope two servers read differently; each with the answers that picker may give.

The list is of what HTTP request smuggling research has found to work between some pair of servers, and of header
injection. What stands in `SMUGGLED` is a request of its own that no endpoint may ever see.
"""

from __future__ import annotations

from dataclasses import dataclass

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
_POST = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"
_GET = b"GET /v1/things HTTP/1.1\r\nHost: h\r\n"
_CHUNKS = b"0\r\n\r\n" + SMUGGLED
_END = b"\r\n"


@dataclass(frozen=True)
class Attack:
    """answers: the only statuses it may get, first of the connection; () where none comes. reaches: its own request
    may reach an endpoint, once, as the one it is."""

    name: str
    request: bytes
    answers: tuple[int, ...] = (400,)
    reaches: bool = False


def _te(name: str, field: bytes, *answers: int) -> Attack:
    """A chunked body announced in an odd way, with a length beside it that covers the smuggled request."""
    head = _POST + b"Content-Length: %d\r\n" % len(_CHUNKS) + field + _END
    return Attack(f"te-te {name}", head + _END + _CHUNKS, answers or (400, 501))


def _length(name: str, *values: bytes) -> Attack:
    fields = b"".join(b"Content-Length: %b\r\n" % value for value in values)
    return Attack(f"content-length {name}", _POST + fields + _END + SMUGGLED)


def _chunk(name: str, chunks: bytes, *answers: int) -> Attack:
    head = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
    return Attack(f"chunk {name}", head + chunks + SMUGGLED, answers or (400,))


def _field(name: str, lines: bytes) -> Attack:
    return Attack(f"field {name}", _GET + lines + _END + _END)


def _target(name: str, line: bytes, *answers: int, reaches: bool = False) -> Attack:
    return Attack(f"target {name}", line + b"\r\nHost: h\r\nConnection: close\r\n\r\n", answers or (400,), reaches)


ATTACKS = [
    # one length or the other
    Attack(
        "cl.te",
        _POST + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(_CHUNKS) + _CHUNKS,
    ),
    Attack("te.cl", _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + _CHUNKS),
    Attack("cl.0", _POST + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS),
    Attack("te in http/1.0", b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS),
    Attack("te gzip, chunked", _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + _CHUNKS, (501,)),
    Attack("te chunked, chunked", _POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + _CHUNKS, (400, 501)),
    Attack("te twice", _POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + _CHUNKS, (400, 501)),
    Attack("te and identity", _POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + _CHUNKS),
    Attack("te identity", _POST + b"Transfer-Encoding: identity\r\n\r\n" + _CHUNKS, (400, 501)),
    Attack("te empty", _POST + b"Transfer-Encoding:\r\n\r\n" + _CHUNKS, (400, 501)),
    # the same coding, said so that only one of two servers sees it
    _te("space before colon", b"Transfer-Encoding : chunked"),
    _te("tab before colon", b"Transfer-Encoding\t: chunked"),
    _te("leading space", b" Transfer-Encoding: chunked"),
    _te("vertical tab", b"Transfer-Encoding: \x0bchunked"),
    _te("form feed", b"Transfer-Encoding: \x0cchunked"),
    _te("nul", b"Transfer-Encoding: chunked\x00"),
    _te("no-break space", b"Transfer-Encoding: \xa0chunked"),
    _te("xchunked", b"Transfer-Encoding: xchunked"),
    _te("chunked, identity", b"Transfer-Encoding: chunked, identity"),
    _te("comma", b"Transfer-Encoding: chunked,"),
    _te("quoted", b'Transfer-Encoding: "chunked"'),
    _te("parameter", b"Transfer-Encoding: chunked;q=1"),
    _te("folded", b"Transfer-Encoding:\r\n chunked"),
    _te("bare cr", b"Transfer-Encoding:\rchunked"),
    _te("behind bare cr", b"X: y\rTransfer-Encoding: chunked"),
    _te("behind bare lf", b"X: y\nTransfer-Encoding: chunked"),
    _te("underscore", b"Transfer_Encoding: chunked", 200),
    _te("upper case", b"TRANSFER-ENCODING: CHUNKED"),
    _te("colon in name", b"Transfer-Encoding:: chunked"),
    _te("no space", b"Transfer-Encoding:chunked"),
    # lengths
    _length("twice, equal", b"5", b"5"),
    _length("twice, different", b"5", b"0"),
    _length("list", b"5, 5"),
    _length("list, different", b"5, 0"),
    _length("plus", b"+5"),
    _length("minus", b"-5"),
    _length("hex", b"0x5"),
    _length("octal", b"0o5"),
    _length("underscore", b"1_0"),
    _length("spaces within", b"1 0"),
    _length("fraction", b"5.0"),
    _length("exponent", b"5e0"),
    _length("empty", b""),
    _length("word", b"five"),
    _length("beyond 64 bits", b"18446744073709551621"),
    _length("beyond all bits", b"9" * 200),
    _length("other digits", "٥".encode()),
    # chunks
    _chunk("0x", b"0x1\r\na\r\n0\r\n\r\n"),
    _chunk("minus", b"-1\r\na\r\n0\r\n\r\n"),
    _chunk("plus", b"+1\r\na\r\n0\r\n\r\n"),
    _chunk("space before", b" 1\r\na\r\n0\r\n\r\n"),
    _chunk("space after", b"1 \r\na\r\n0\r\n\r\n"),
    _chunk("underscore", b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n"),
    _chunk("empty size", b"\r\na\r\n0\r\n\r\n"),
    _chunk("beyond 64 bits", b"10000000000000001\r\na\r\n0\r\n\r\n"),
    _chunk("bare lf", b"1\na\n0\n\n"),
    _chunk("bare lf after size", b"1\na\r\n0\r\n\r\n"),
    _chunk("bare cr after size", b"1\ra\r\n0\r\n\r\n"),
    _chunk("lf in extension", b"1;a\nb\r\na\r\n0\r\n\r\n"),
    _chunk("cr in extension", b"1;a\rb\r\na\r\n0\r\n\r\n"),
    _chunk("nul in extension", b"1;a\x00b\r\na\r\n0\r\n\r\n"),
    _chunk("longer than said", b"1\r\nab\r\n0\r\n\r\n"),
    _chunk("no end of data", b"1\r\na0\r\n\r\n"),
    _chunk("no end of last", b"1\r\na\r\n0\r\n", 400, 408),
    _chunk("bad trailer", b"1\r\na\r\n0\r\nX Y: 1\r\n\r\n"),
    # fields
    _field("bare lf ends a line", b"X: y\nZ: w"),
    _field("folded", b"X: y\r\n z"),
    _field("nul in value", b"X: a\x00b"),
    _field("nul in name", b"X\x00Y: a"),
    _field("control in value", b"X: a\x01b"),
    _field("delete in value", b"X: a\x7fb"),
    _field("bare cr in value", b"X: a\rY: b"),
    _field("space before colon", b"X : a"),
    _field("no colon", b"X"),
    _field("no name", b": a"),
    _field("name with a slash", b"X/Y: a"),
    _field("name beyond ascii", "Ä: a".encode()),
    _field("second host", b"Host: other"),
    _field("line before the fields", b"\rX: y"),
    Attack("field first line folded", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n"),
    Attack("field no host", b"GET / HTTP/1.1\r\nX: y\r\n\r\n"),
    Attack("field bare lf everywhere", b"GET / HTTP/1.1\nHost: h\n\n"),
    # request lines
    _target("space within", b"GET /a b HTTP/1.1"),
    _target("two spaces", b"GET  /v1/things HTTP/1.1", 200, 400, reaches=True),
    _target("tabs", b"GET\t/\tHTTP/1.1"),
    _target("leading space", b" GET / HTTP/1.1"),
    _target("nul", b"GET /\x00 HTTP/1.1"),
    _target("beyond ascii", b"GET /\xff HTTP/1.1"),
    _target("control", b"GET /\x01 HTTP/1.1"),
    _target("star", b"OPTIONS * HTTP/1.1"),
    _target("word", b"GET things HTTP/1.1"),
    _target("connect", b"CONNECT internal:80 HTTP/1.1", 501),
    _target("trace", b"TRACE / HTTP/1.1", 501),
    _target("unknown method", b"JUMP / HTTP/1.1"),
    _target("method in lower case", b"get / HTTP/1.1"),
    _target("http/0.9", b"GET / HTTP/0.9", 400, 505),
    _target("http/2.0", b"GET / HTTP/2.0", 505),
    _target("http/1.2", b"GET / HTTP/1.2", 400, 505),
    _target("http/1.10", b"GET / HTTP/1.10", 400, 505),
    _target("rtsp", b"DESCRIBE / RTSP/1.0", 400, 501),
    _target("ice", b"SOURCE / ICE/1.0", 400, 501),
    Attack("target http/0.9 without version", b"GET /\r\n\r\n", (400, 505)),
    Attack("target http/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 501, 505)),
    Attack("target tls hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32),
]
