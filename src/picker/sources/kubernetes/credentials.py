"""Where the API server is and what to say to be let in: the pod's service account, or a kubeconfig file.

Reads files, and runs the program that a kubeconfig names for tokens. Tokens are read again as they are renewed: the
kubelet replaces a service account's within its hour. Nothing of what is secret gets into messages.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import ssl
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec
import yaml

from picker.errors import ConfigError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_AGE = 60.0  # seconds that client-go keeps a token before it reads the file again
_EXEC_TIMEOUT = 60.0
_BEFORE_EXPIRY = 60.0


class Tokens(Protocol):
    """Where bearer tokens come from."""

    async def token(self, *, renew: bool = False) -> str | None:
        """The token to send, None for none. renew: the last one was refused. Raises OSError where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """A way to an API server. url: without a slash at its end. server_name: for TLS, None for the host's.

    namespace: that of the context or service account, None where it names none.
    """

    url: str
    tokens: Tokens = field(repr=False)
    tls: ssl.SSLContext | bool = True
    server_name: str | None = None
    namespace: str | None = None


def find_access(
    kubeconfig: str | None = None,
    context: str | None = None,
    *,
    environment: Mapping[str, str] = os.environ,
    service_account: Path = SERVICE_ACCOUNT,
) -> Access:
    """By the file that was named, else as a pod, else by `$KUBECONFIG` or `~/.kube/config`. Raises ConfigError."""
    if kubeconfig is not None:
        return from_kubeconfig(Path(kubeconfig), context)
    if environment.get("KUBERNETES_SERVICE_HOST") and (service_account / "token").exists():
        return in_cluster(environment, service_account)
    named = [Path(each) for each in environment.get("KUBECONFIG", "").split(os.pathsep) if each]
    for path in named or [Path(environment.get("HOME", "/")) / ".kube" / "config"]:
        if path.exists():
            return from_kubeconfig(path, context)
    raise ConfigError(
        "kubernetes: this is no pod with a service account, and there is no kubeconfig: give --kubeconfig FILE"
    )


# --- service accounts --------------------------------------------------------------------------------------


def in_cluster(environment: Mapping[str, str], folder: Path) -> Access:
    """As a pod sees it: the addresses are in its environment, the rest is mounted into it."""
    host, port = environment["KUBERNETES_SERVICE_HOST"], environment.get("KUBERNETES_SERVICE_PORT", "443")
    namespace = folder / "namespace"
    return Access(
        url=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        tokens=FileTokens(folder / "token"),
        tls=_tls(cafile=folder / "ca.crt"),
        namespace=namespace.read_text(encoding="utf-8").strip() if namespace.exists() else None,
    )


class FileTokens:
    """A token that somebody keeps fresh in a file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] | None = None) -> None:
        self._path = path
        self._clock = clock
        self._token: str | None = None
        self._read_at = 0.0

    async def token(self, *, renew: bool = False) -> str | None:
        now = (self._clock or asyncio.get_running_loop().time)()
        if renew or self._token is None or now - self._read_at >= _TOKEN_AGE:
            self._token, self._read_at = self._path.read_text(encoding="utf-8").strip(), now
        return self._token


class FixedTokens:
    """One token for ever, or none."""

    def __init__(self, token: str | None = None) -> None:
        self._token = token

    async def token(self, *, renew: bool = False) -> str | None:
        return self._token


# --- kubeconfig --------------------------------------------------------------------------------------------


def from_kubeconfig(path: Path, context: str | None = None) -> Access:
    """What a kubeconfig says of one of its contexts, the current one unless it is named. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the kubeconfig cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is no usable kubeconfig: it is not UTF-8 text") from None
    try:
        document = yaml.safe_load(text)
        config = msgspec.convert(document, _Kubeconfig)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: is no usable kubeconfig: {' '.join(str(error).split())[:200]}") from None
    try:
        return _access(config, context or config.current_context, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Part(msgspec.Struct, rename="kebab"):
    pass


class _Cluster(_Part):
    server: str
    certificate_authority: str | None = None
    certificate_authority_data: str | None = None
    insecure_skip_tls_verify: bool = False
    tls_server_name: str | None = None
    proxy_url: str | None = None


class _Variable(_Part):
    name: str
    value: str


class _Exec(msgspec.Struct, rename="camel"):
    command: str
    api_version: str = "client.authentication.k8s.io/v1"
    args: list[str] | None = None
    env: list[_Variable] | None = None


class _User(_Part):
    token: str | None = None
    token_file: str | None = msgspec.field(default=None, name="tokenFile")
    client_certificate: str | None = None
    client_certificate_data: str | None = None
    client_key: str | None = None
    client_key_data: str | None = None
    username: str | None = None
    exec: _Exec | None = None
    auth_provider: Any = None


class _Context(_Part):
    cluster: str
    user: str = ""
    namespace: str | None = None


class _NamedCluster(_Part):
    name: str
    cluster: _Cluster


class _NamedUser(_Part):
    name: str
    user: _User


class _NamedContext(_Part):
    name: str
    context: _Context


class _Kubeconfig(_Part):
    clusters: list[_NamedCluster] = []
    users: list[_NamedUser] = []
    contexts: list[_NamedContext] = []
    current_context: str = ""


def _access(config: _Kubeconfig, name: str, folder: Path) -> Access:
    context = {each.name: each.context for each in config.contexts}.get(name)
    if context is None:
        known = ", ".join(each.name for each in config.contexts) or "none"
        raise ConfigError(f"there is no context {name!r}; known are {known}")
    cluster = {each.name: each.cluster for each in config.clusters}.get(context.cluster)
    if cluster is None:
        raise ConfigError(f"context {name!r} names the cluster {context.cluster!r}, which is not there")
    if not cluster.server.startswith(("https://", "http://")):
        raise ConfigError(f"cluster {context.cluster!r} is at {cluster.server!r}, which is no http or https URL")
    if cluster.proxy_url:
        raise ConfigError(f"cluster {context.cluster!r} is behind a proxy-url, which is not supported")
    user = {each.name: each.user for each in config.users}.get(context.user, _User())
    return Access(
        url=cluster.server.rstrip("/"),
        tokens=_tokens(user, context.user, folder),
        tls=_client_tls(cluster, user, folder) if cluster.server.startswith("https") else True,
        server_name=cluster.tls_server_name,
        namespace=context.namespace,
    )


def _tokens(user: _User, name: str, folder: Path) -> Tokens:
    if user.auth_provider is not None or user.username is not None:
        raise ConfigError(f"user {name!r} logs in by auth-provider or password, which is not supported: use exec")
    if user.exec is not None:
        return ExecTokens(user.exec, folder)
    if user.token_file is not None:
        return FileTokens(folder / user.token_file)
    return FixedTokens(user.token)


class ExecTokens:
    """The token that a program prints, as the cloud providers' plugins do; run again when it expires."""

    def __init__(self, plugin: _Exec, folder: Path) -> None:
        self._plugin = plugin
        self._folder = folder
        self._token: str | None = None
        self._expires: datetime | None = None
        self._lock = asyncio.Lock()

    async def token(self, *, renew: bool = False) -> str | None:
        async with self._lock:
            if renew or self._token is None or self._stale():
                self._token, self._expires = _credential(await self._run(), self._plugin.command)
            return self._token

    def _stale(self) -> bool:
        return self._expires is not None and (self._expires - datetime.now(UTC)).total_seconds() < _BEFORE_EXPIRY

    async def _run(self) -> bytes:
        plugin = self._plugin
        asked = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
        added = {each.name: each.value for each in plugin.env or ()} | {"KUBERNETES_EXEC_INFO": json.dumps(asked)}
        # A command with a slash is relative to the kubeconfig, one without is looked for in PATH.
        command = str(self._folder / plugin.command) if "/" in plugin.command else plugin.command
        process = await asyncio.create_subprocess_exec(
            command,
            *(plugin.args or ()),
            env={**os.environ, **added},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_EXEC_TIMEOUT):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise OSError(f"{plugin.command} printed no token within {_EXEC_TIMEOUT:g} s") from None
        if process.returncode:
            raise OSError(f"{plugin.command} ended with status {process.returncode} instead of a token")
        return output


class _CredentialStatus(msgspec.Struct, rename="camel"):
    token: str | None = None
    expiration_timestamp: datetime | None = None


class _Credential(msgspec.Struct):
    status: _CredentialStatus


def _credential(output: bytes, command: str) -> tuple[str, datetime | None]:
    try:
        status = msgspec.json.decode(output, type=_Credential).status
    except msgspec.DecodeError:
        raise OSError(f"{command} printed no ExecCredential") from None
    if status.token is None:
        raise OSError(f"{command} printed no token; client certificates from programs are not supported")
    return status.token, status.expiration_timestamp


# --- TLS ---------------------------------------------------------------------------------------------------


def _client_tls(cluster: _Cluster, user: _User, folder: Path) -> ssl.SSLContext:
    authority = _bytes(cluster.certificate_authority_data, "certificate-authority-data")
    file = None if cluster.certificate_authority is None else folder / cluster.certificate_authority
    context = _tls(cafile=file, cadata=authority)
    if cluster.insecure_skip_tls_verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    certificate = _pem(user.client_certificate_data, user.client_certificate, folder, "client-certificate")
    key = _pem(user.client_key_data, user.client_key, folder, "client-key")
    if certificate is not None and key is not None:
        _load_pair(context, certificate, key)
    return context


def _tls(cafile: Path | None = None, cadata: bytes | None = None) -> ssl.SSLContext:
    try:
        text = None if cadata is None else cadata.decode("ascii")
        context = ssl.create_default_context(cafile=None if cafile is None else str(cafile), cadata=text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        named = "" if cafile is None else f", {cafile},"
        raise ConfigError(f"the API server's certificate authority{named} cannot be read: {reason}") from None
    return context


def _pem(data: str | None, path: str | None, folder: Path, key: str) -> bytes | None:
    if data is not None:
        return _bytes(data, f"{key}-data")
    try:
        return None if path is None else (folder / path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from None


def _bytes(data: str | None, key: str) -> bytes | None:
    try:
        return None if data is None else base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ConfigError(f"{key} is not base64") from None


def _load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """OpenSSL reads pairs from files only; this one is gone at once, and nobody else may read it meanwhile."""
    with tempfile.TemporaryDirectory(prefix="picker-") as folder:
        pair = Path(folder) / "pair.pem"
        pair.touch(mode=0o600)
        pair.write_bytes(certificate + b"\n" + key)
        try:
            context.load_cert_chain(pair)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"the client certificate and its key cannot be used: {error}") from None
