"""Where an engine publishes its KV events: as it says itself, as its labels say, or as a template says of all.

Pure: reads answers and spellings of addresses, connects to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from picker.types import Endpoint

_WILDCARDS = frozenset({"*", "0.0.0.0", "::", "[::]", ""})


@dataclass(frozen=True, slots=True)
class Where:
    """Addresses to connect to. rank: whose batches come there, None: not known. replay: None where none is offered."""

    events: str
    replay: str | None = None
    rank: int | None = None


class _Published(msgspec.Struct):
    """One rank's entry in vLLM's GET /kv_event_sources."""

    endpoint: str | None = None
    replay_endpoint: str | None = None
    enable_kv_cache_events: bool = True
    publisher: str | None = "zmq"


_PUBLISHED = msgspec.json.Decoder(dict[str, _Published])


def locate(body: bytes, endpoint: Endpoint) -> Where | str | None:
    """Where the engine says this endpoint's rank publishes, or in plain words why there is no such place.

    body: the answer to GET /kv_event_sources; None when it is no such answer.
    """
    try:
        sources = {int(rank): source for rank, source in _PUBLISHED.decode(body).items()}
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    on = {r: s for r, s in sources.items() if s.enable_kv_cache_events and s.publisher == "zmq" and s.endpoint}
    if not on:
        return "the engine publishes no KV events (--kv-events-config turns them on)"
    if endpoint.rank is None and len(on) > 1:
        return f"the engine has {len(on)} data-parallel ranks: list each as an endpoint of its own, with its rank"
    rank = next(iter(on)) if endpoint.rank is None else endpoint.rank
    if rank not in on:
        return f"the engine publishes for ranks {', '.join(map(str, sorted(on)[:8]))}, not for rank {rank}"
    events, replay = on[rank].endpoint, on[rank].replay_endpoint
    return _where(endpoint, events or "", replay, rank)


def configured(endpoint: Endpoint, events: str, replay: str | None) -> Where | str:
    """Where a template puts it: "tcp://{host}:5557", with the rank added to the port as vLLM does."""
    rank = endpoint.rank or 0
    return _where(endpoint, _shifted(events, rank), _shifted(replay, rank) if replay else None, endpoint.rank)


def labelled(endpoint: Endpoint) -> Where | str | None:
    """Where the labels `kv-events` and `kv-replay` put it, as they stand."""
    events = endpoint.labels.get("kv-events")
    return None if not events else _where(endpoint, events, endpoint.labels.get("kv-replay") or None, endpoint.rank)


def _where(endpoint: Endpoint, events: str, replay: str | None, rank: int | None) -> Where | str:
    try:
        return Where(_reachable(events, endpoint), _reachable(replay, endpoint) if replay else None, rank)
    except ValueError as error:
        return str(error)


def _reachable(url: str, endpoint: Endpoint) -> str:
    """The address to connect to. Raises ValueError with the reason why there is none."""
    own, _, _ = endpoint.address.rpartition(":")
    scheme, _, rest = url.replace("{host}", own).partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not port.isdecimal() or not 0 < int(port) < 1 << 16 or not (host.isprintable() and host):
        # An engine must not make us open files or sockets of other kinds.
        raise ValueError(f"its KV events are at {url[:80]!r}, which is no tcp://host:port")
    return f"tcp://{own if host in _WILDCARDS else host}:{port}"


def _shifted(url: str, rank: int) -> str:
    head, _, port = url.rpartition(":")
    return f"{head}:{int(port) + rank}" if rank and port.isdecimal() else url
