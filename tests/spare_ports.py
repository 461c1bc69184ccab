"""Ports for programs that cannot choose one by themselves."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_numbers = itertools.count(os.getpid() * 97)  # runs at the same time begin at different places


def spare_ports(count: int) -> list[int]:
    """Loopback ports in a row that nobody has, below those that the system gives away by itself: to a connection that
    anybody makes meanwhile, or to a listener on port 0.
    """
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    room = max(end, _LOWEST + 1000) - _LOWEST - count
    while True:
        first = _LOWEST + next(_numbers) * count % room
        if all(map(_is_free, range(first, first + count))):
            return list(range(first, first + count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
