"""The admin API's routes that change what picker does: endpoints and configuration.

They exist where there is somebody to change it and only for those who may: with a key, or without one on a loopback
address, where a web page in a browser on the same machine may not either. What a change does is `Control`'s business.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse

from picker.errors import ConfigError
from picker.frontends.keys import KeyRefusal, Keyring

_MAX_BODY_BYTES = 64 * 1024
_LOCAL_NAMES = frozenset(("localhost", "localhost."))


# Who has a key of the gateway and tries it here must not read that it is unknown.
_REFUSALS = {
    "missing": "The admin API wants its own key (admin.token_file, PICKER_ADMIN_KEY), which is not the gateway's API "
    "key: send authorization: Bearer KEY.",
    "twice": "The admin key is given more than once.",
    "wrong": "This is no admin key (admin.token_file, PICKER_ADMIN_KEY); the gateway's API keys are not known here.",
    "disabled": "This admin key has been switched off.",
}


class MisunderstoodError(ConfigError):
    """What is asked for could never be done: it is written wrongly."""


class Control(Protocol):
    """What can be asked for here.

    What is not understood is a MisunderstoodError, what is in the way of something else a plain ConfigError, an
    endpoint that is not there a KeyError.
    """

    def endpoints(self) -> list[dict[str, Any]]: ...

    def endpoint(self, name: str) -> dict[str, Any]: ...

    def add(self, values: Mapping[str, Any]) -> dict[str, Any]: ...

    def remove(self, name: str) -> dict[str, Any]: ...

    def drain(self, name: str, *, draining: bool) -> dict[str, Any]: ...

    def weigh(self, name: str, weight: float) -> dict[str, Any]: ...

    def config(self) -> dict[str, Any]: ...

    def reload(self) -> dict[str, Any]: ...


class Guard:
    """A dependency that lets in whoever shows a key; without keys, whoever is on this machine and no web page.

    everybody: without keys, everybody is let in.
    """

    def __init__(self, keys: Keyring, *, everybody: bool = False) -> None:
        self._keys = keys
        self._everybody = everybody

    async def __call__(
        self, request: Request, host: Annotated[str, Header()] = "", origin: Annotated[str, Header()] = ""
    ) -> None:
        if not self._keys.open:
            return require_key(self._keys, request)
        return None if self._everybody else _require_local(request, host, origin)


def require_key(keys: Keyring, request: Request) -> None:
    """Raise HTTPException for a request without one of the keys."""
    key = keys.identify(request.headers.raw)
    if isinstance(key, KeyRefusal):
        headers = {"WWW-Authenticate": "Bearer"} if key.status == 401 else None
        raise HTTPException(key.status, _REFUSALS[key.reason], headers=headers)


def _require_local(request: Request, host: str, origin: str) -> None:
    """A page of anybody's may have a browser send requests here, and name this address as it likes."""
    peer = request.client
    if peer is None or not is_loopback(peer.host):
        raise HTTPException(
            403, "without an admin key (admin.token_file, PICKER_ADMIN_KEY) this is for programs on this machine"
        )
    if not _is_local(host) or (origin and not _is_local(origin.partition("://")[2])):
        raise HTTPException(403, "without an admin key this is for programs on this machine, not for web pages")


def _is_local(authority: str) -> bool:
    name = authority.rpartition(":")[0] if authority.rpartition(":")[2].isdecimal() else authority
    return name.lower() in _LOCAL_NAMES or is_loopback(name.strip("[]"))


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        address = ipaddress.ip_address(host)
        # An IPv6 socket shows IPv4 clients as ::ffff:127.0.0.1.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host.lower() in _LOCAL_NAMES


def closed_by_default(host: str, keys: Keyring, *, read_only: bool) -> None:
    """Raise ConfigError for an admin API that everybody could reach and change things by."""
    if keys.open and not read_only and not is_loopback(host):
        raise ConfigError(
            f"admin.host: on {host or '*'} everybody could operate this gateway: give admin.token or admin.keys_file, "
            "listen on 127.0.0.1, or set admin.read_only: true (--admin-read-only)"
        )


def install(app: FastAPI, control: Control, keys: Keyring, *, read_only: bool) -> list[APIRouter]:
    """Put the routes into an app; those that change anything only unless `read_only`."""
    routers = [_views(control)] if read_only else [_views(control), _changes(control)]
    for router in routers:
        app.include_router(router, dependencies=[Depends(Guard(keys, everybody=read_only))])
    return routers


def _views(control: Control) -> APIRouter:
    router = APIRouter()

    @router.get("/endpoints")
    async def endpoints() -> JSONResponse:
        """Every endpoint: who lists it, whether it drains, its weight, what runs there."""
        return JSONResponse({"endpoints": control.endpoints()})

    @router.get("/endpoints/{name:path}")
    async def endpoint(name: str) -> JSONResponse:
        """One of them."""
        return _told(lambda: control.endpoint(name))

    @router.get("/config")
    async def config() -> JSONResponse:
        """The configuration in force, without its secrets, and what was last made of a new one."""
        return JSONResponse(control.config())

    return router


def _changes(control: Control) -> APIRouter:
    router = APIRouter()

    @router.post("/endpoints")
    async def add(request: Request) -> JSONResponse:
        """Add an endpoint: {"address": "http://host:port"}, and what a configuration may say of one."""
        values = await _object(request)
        return _told(lambda: control.add(values), status=201)

    @router.post("/endpoints/{name:path}/drain")
    async def drain(name: str) -> JSONResponse:
        """Send nothing new there; what runs goes on."""
        return _told(lambda: control.drain(name, draining=True))

    @router.post("/endpoints/{name:path}/undrain")
    async def undrain(name: str) -> JSONResponse:
        """Send requests there again."""
        return _told(lambda: control.drain(name, draining=False))

    @router.put("/endpoints/{name:path}/weight")
    async def weigh(name: str, request: Request) -> JSONResponse:
        """Take it for so many times as fast as it is found: {"weight": 0.5}."""
        values = await _object(request)
        weight = values.get("weight")
        if set(values) != {"weight"} or not isinstance(weight, int | float) or isinstance(weight, bool):
            raise HTTPException(422, 'write {"weight": NUMBER}')
        return _told(lambda: control.weigh(name, float(weight)))

    @router.delete("/endpoints/{name:path}")
    async def remove(name: str) -> JSONResponse:
        """Take it away; what runs there goes on."""
        return _told(lambda: control.remove(name))

    @router.post("/config/reload")
    async def reload() -> JSONResponse:
        """Read configuration, keys and certificates again; says what is in force and what wants a restart."""
        told = control.reload()
        return JSONResponse(told, status_code=422 if told["error"] else 200)

    return router


def _told(ask: Callable[[], dict[str, Any]], *, status: int = 200) -> JSONResponse:
    try:
        return JSONResponse(ask(), status_code=status)
    except KeyError as error:
        raise HTTPException(404, f"no endpoint is called {error.args[0]!r}") from None
    except MisunderstoodError as error:
        raise HTTPException(422, str(error)) from None
    except ConfigError as error:
        raise HTTPException(409, str(error)) from None


async def _object(request: Request) -> dict[str, Any]:
    """The JSON object of a request's body."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {_MAX_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise HTTPException(422, "the body is no JSON object") from None
