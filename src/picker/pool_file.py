"""The pool as a file that Envoy follows, and the addresses of endpoints that are given by name.

Envoy sends a request where picker says only if it knows that very address as a member, so names are looked up here,
again and again, and both are told the same. Follows the pool by the facts that it is shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace

from picker.data_plane import Folder, members, write_whole
from picker.envoy import Json
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact

log = logging.getLogger("picker.envoy")

# Seconds between two looks at a name: as Envoy itself and most clients of DNS have it.
_AGAIN = 5.0
_PATIENCE = 2.0

LookUp = Callable[[str], Awaitable[list[str]]]
Shown = Callable[[str], str | None]


async def look_up(host: str) -> list[str]:
    """The IP addresses of a name, in the order of preference; none when it cannot be told."""
    with contextlib.suppress(OSError, UnicodeError):
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
    return []


class PoolFile:
    """addresses: of endpoints by name, "name:port" to "ip:port"; names: the same the other way round.

    shown: the `authorization` that an endpoint is to get, by its name; None for what clients say.
    """

    def __init__(
        self, folder: Folder, *, shown: Shown = lambda name: None, find: LookUp = look_up, again: float = _AGAIN
    ) -> None:
        self.addresses: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.written = asyncio.Event()
        self._folder = folder
        self._shown = shown
        self._find = find
        self._again = again
        self._endpoints: dict[str, Endpoint] = {}
        self._changed = asyncio.Event()
        self._content: Json | None = None
        self._unknown: set[str] = set()
        self._at_odds: set[str] = set()

    def observe(self, fact: Fact) -> None:
        """To be shown every fact; reacts to endpoints that come and go."""
        match fact:
            case EndpointAdded(endpoint):
                self._endpoints[endpoint.name] = endpoint
            case EndpointRemoved(name):
                self._endpoints.pop(name, None)
            case _:
                return
        self._changed.set()

    def look_again(self) -> None:
        """What endpoints are shown may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Keep the file true until cancelled. written: set as soon as there is one."""
        while True:
            self._changed.clear()
            await self._resolve(each.address for each in list(self._endpoints.values()))
            self._write()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._again if self._by_name() else None):
                    await self._changed.wait()

    def _by_name(self) -> bool:
        return any(_is_name(_host(each.address)) for each in self._endpoints.values())

    async def _resolve(self, addresses: Iterable[str]) -> None:
        wanted = {address for address in addresses if _is_name(_host(address))}
        hosts = sorted({_host(address) for address in wanted})
        found = dict(zip(hosts, await asyncio.gather(*map(self._addresses_of, hosts)), strict=True))
        for address in wanted:
            self._note(address, found[_host(address)])
        for gone in self.addresses.keys() - wanted:
            del self.addresses[gone]
        self.names.clear()  # others hold it
        self.names.update((ip, name) for name, ip in self.addresses.items())

    async def _addresses_of(self, host: str) -> list[str]:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._find(host)
        except TimeoutError:
            return []

    def _note(self, address: str, found: list[str]) -> None:
        """A name that is not found keeps the address it had, and one with several keeps the one it has."""
        host, port = _host(address), address.rpartition(":")[2]
        here = [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in found]
        if not here and host not in self._unknown:
            kept = self.addresses.get(address)
            log.warning("%s has no address%s", host, f": {kept} is used on" if kept else " yet; it is looked up again")
        (self._unknown.discard if here else self._unknown.add)(host)
        if here and self.addresses.get(address) not in here:
            self.addresses[address] = here[0]

    def _write(self) -> None:
        known = [each for each in self._endpoints.values() if self._reachable(each)]
        hosts = {each.name: _host(each.address) for each in known if each.address in self.addresses}
        found = [replace(each, address=self.addresses.get(each.address, each.address)) for each in known]
        shown = {each.name: value for each in known if (value := self._shown(each.name)) is not None}
        self._warn(found, shown)
        content = members(found, hosts, shown)
        if content != self._content:
            write_whole(self._folder.pool, content)
            self._content = content
        self.written.set()

    def _warn(self, endpoints: Iterable[Endpoint], shown: Mapping[str, str]) -> None:
        """Of endpoints that are one to Envoy, and are to be shown different keys."""
        found: dict[str, list[str]] = {}
        for each in endpoints:
            found.setdefault(each.address, []).append(each.name)
        odd = {address: names for address, names in found.items() if len({shown.get(name) for name in names}) > 1}
        for address in odd.keys() - self._at_odds:
            names = ", ".join(odd[address])
            log.warning("%s are all at %s and have different keys: it is shown the first of them", names, address)
        self._at_odds = set(odd)

    def _reachable(self, endpoint: Endpoint) -> bool:
        return endpoint.address in self.addresses or not _is_name(_host(endpoint.address))


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False
