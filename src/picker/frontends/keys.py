"""API keys: who may ask, how much at once, and under which name it is told of.

Keys come from files that are watched and from the environment; picker keeps their SHA-256 only. A name is shown in
metrics and logs, a key nowhere. Owns the counting of requests by key; what is done with an answer is the front end's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.errors import ConfigError

log = logging.getLogger("picker.keys")

MAX_FILE_BYTES = 4 << 20
FIELDS = (b"authorization", b"x-api-key")  # OpenAI's clients use the former, Anthropic's the latter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"sha256=([0-9a-fA-F]{64})")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_SIZE = re.compile(r"([0-9]{1,15})(|k|m|g|ki|mi|gi)b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_READABLE_BY_OTHERS = 0o004


@dataclass(frozen=True, slots=True)
class Key:
    """One key. digest: SHA-256 of it. max_concurrent, max_body_bytes: None for what holds for all keys."""

    name: str
    digest: bytes = field(repr=False)
    max_concurrent: int | None = None
    max_body_bytes: int | None = None
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may have that says nothing itself; None: no limit of its own."""

    max_concurrent: int | None = None
    max_body_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class KeyRefusal:
    """Why a request is not let in: an HTTP status, a message for its sender, and the reason for metrics."""

    status: int
    message: str
    reason: str


_MISSING = KeyRefusal(401, "This gateway wants an API key: send authorization: Bearer KEY, or x-api-key.", "missing")
_TWICE = KeyRefusal(401, "The API key is given more than once.", "twice")
_WRONG = KeyRefusal(401, "The API key is not known here.", "wrong")
_DISABLED = KeyRefusal(403, "This API key has been switched off.", "disabled")


class Keyring:
    """The keys of one door, how many requests run by each, and how many were refused why.

    Without a key it is open to everyone, unless `closed`: then an empty keyring lets nobody in (a file that has lost
    its last line must not open the gateway).
    """

    def __init__(self, keys: Iterable[Key] = (), *, allowance: Allowance | None = None, closed: bool = False) -> None:
        self.allowance = allowance or Allowance()
        self.closed = closed
        self.running: Counter[str] = Counter()
        self.admitted: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self._keys: dict[bytes, Key] = {}
        self.replace(keys)

    @property
    def open(self) -> bool:
        """Whether nobody is asked for a key."""
        return not self._keys and not self.closed

    @property
    def keys(self) -> Sequence[Key]:
        return list(self._keys.values())

    def replace(self, keys: Iterable[Key]) -> None:
        """Other keys from here on; what runs goes on."""
        self._keys = {key.digest: key for key in keys}

    def find(self, given: bytes) -> Key | None:
        """The key with these bytes; takes as long for any wrong one: only a digest of it is ever compared."""
        digest = hashlib.sha256(given).digest()
        known = self._keys.get(digest)
        return known if known is not None and hmac.compare_digest(known.digest, digest) else None

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | KeyRefusal:
        """Whose request this is, which counts as running until `leave`; or why it is not let in."""
        key = self.identify(headers)
        if isinstance(key, Key) and not self._has_room(key):
            most = self.most_of(key)
            return self._refuse(
                KeyRefusal(429, f"This API key has {most} requests running, as many as it may.", "busy"), key.name
            )
        if isinstance(key, Key):
            self.running[key.name] += 1
            self.admitted[key.name] += 1
        return key

    def leave(self, key: Key) -> None:
        """The request is over."""
        self.running[key.name] -= 1
        if not self.running[key.name]:
            del self.running[key.name]

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | KeyRefusal:
        """Whose request this is, without counting it as running."""
        given = list(_given(headers))
        if not given:
            return self._refuse(_MISSING)
        if len({name for name, _ in given}) < len(given):
            return self._refuse(_TWICE)
        found = [key for _, text in given if (key := self.find(text)) is not None]
        if not found:
            return self._refuse(_WRONG)
        return self._refuse(_DISABLED, found[0].name) if found[0].disabled else found[0]

    def most_of(self, key: Key) -> int | None:
        """Requests that may run at once by this key."""
        return self.allowance.max_concurrent if key.max_concurrent is None else key.max_concurrent

    def body_limit(self, key: Key) -> int | None:
        """Bytes that a body may have by this key."""
        return self.allowance.max_body_bytes if key.max_body_bytes is None else key.max_body_bytes

    def _has_room(self, key: Key) -> bool:
        most = self.most_of(key)
        return most is None or self.running[key.name] < most

    def _refuse(self, refusal: KeyRefusal, name: str = "") -> KeyRefusal:
        self.refused[name, refusal.reason] += 1
        return refusal


def _given(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """(field, key) of every field that may hold one; another scheme than Bearer holds none."""
    for name, value in headers:
        if name not in FIELDS:
            continue
        if name == b"x-api-key":
            yield name, value.strip()
            continue
        scheme, _, key = value.strip().partition(b" ")
        yield name, key.strip() if scheme.lower() == b"bearer" else b""


# --- reading -----------------------------------------------------------------------------------------------


def parse_keys(text: str, *, origin: str) -> tuple[Key, ...]:
    """Keys of a text, one to a line: `name:key` or `name:sha256=HEX`, then options; `#` begins a comment line.

    Options: `concurrent=N`, `body=SIZE` (as 4MiB) and `disabled`. Raises ConfigError that names the line, never a key.
    """
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                keys.append(parse_key(line))
            except ConfigError as error:
                raise ConfigError(f"{origin}: line {number}: {error}") from None
    _require_unique(keys, origin)
    return tuple(keys)


def parse_key(line: str) -> Key:
    """One line of a file of keys; raises ConfigError that never shows the key."""
    entry, *options = line.split()
    name, colon, secret = entry.partition(":")
    if not colon or not secret:
        raise ConfigError("write name:key, or name:sha256= and 64 hexadecimal digits")
    if not _NAME.fullmatch(name):
        raise ConfigError("a name is of letters, digits and ._@- and has 64 of them at most")
    key = Key(name, _digest(secret))
    for option in options:
        key = _with_option(key, option)
    return key


def named_key(name: str, secret: str) -> Key:
    """A key that was given by itself, on the command line or in the environment."""
    if not secret or not _VISIBLE.fullmatch(secret):
        raise ConfigError(f"the API key {name!r} is empty, or has characters that no header can have")
    return Key(name, hashlib.sha256(secret.encode()).digest())


def _digest(secret: str) -> bytes:
    if secret.startswith("sha256="):
        found = _DIGEST.fullmatch(secret)
        if found is None:
            raise ConfigError("after sha256= there must be 64 hexadecimal digits")
        return bytes.fromhex(found[1])
    if not _VISIBLE.fullmatch(secret):
        raise ConfigError("the key has characters that no header can have")
    return hashlib.sha256(secret.encode()).digest()


def _with_option(key: Key, option: str) -> Key:
    word, _, value = option.partition("=")
    match word:
        case "disabled" if not value:
            return replace(key, disabled=True)
        case "concurrent" if value.isdecimal() and int(value[:10]) >= 1:
            return replace(key, max_concurrent=int(value[:10]))
        case "body" if (size := _SIZE.fullmatch(value)) is not None:
            return replace(key, max_body_bytes=int(size[1]) * _UNITS[size[2].lower()])
        case "concurrent" | "body" | "disabled":
            raise ConfigError(f"the option {word!r} has no such value; write concurrent=8, body=4MiB, disabled")
        case _:
            # Whatever this is, it may be a part of a key that has a space in it.
            raise ConfigError("what follows the key is no option; known are concurrent=N, body=SIZE, disabled")


def _require_unique(keys: Sequence[Key], origin: str) -> None:
    names = Counter(key.name for key in keys)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{origin}: the name {twice[0]!r} comes twice")
    if len({key.digest for key in keys}) < len(keys):
        raise ConfigError(f"{origin}: two names have the same key")


def load_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; raises ConfigError, also when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
            others = os.fstat(file.fileno()).st_mode & _READABLE_BY_OTHERS
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    keys = parse_keys(text, origin=str(path))
    if others and "sha256=" not in text:
        log.warning("%s: holds keys and can be read by every user of this machine; chmod 600 it", path)
    return keys


# --- watching ----------------------------------------------------------------------------------------------


class KeyFile:
    """Keeps a keyring to a file. fixed: keys from elsewhere, which the file adds to and may not name again.

    A file that breaks or vanishes leaves the keys as they are, is told once and looked at again.
    """

    def __init__(self, keyring: Keyring, path: Path, fixed: Sequence[Key] = ()) -> None:
        """Reads the file; raises ConfigError when it does not do."""
        self._keyring = keyring
        self._path = path
        self._fixed = tuple(fixed)
        self._seen: tuple[int, int, int] | None = None
        self._complaint: str | None = None
        keyring.closed = True
        keyring.replace(self._read())

    async def follow(self, *, interval: float = 1.0) -> None:
        """Look for changes for ever."""
        while True:
            await asyncio.sleep(interval)
            self.refresh()

    def serve(self, keyring: Keyring) -> None:
        """Keep another keyring to the file from here on; it gets the keys that were read."""
        keys, self._keyring = self._keyring.keys, keyring
        keyring.closed = True
        keyring.replace(keys)

    def refresh(self) -> bool:
        """Take over a file that has changed; whether it had and did."""
        if self._state() == self._seen:
            return False
        try:
            keys = self._read()
        except ConfigError as error:
            if self._complaint != str(error):
                log.warning("%s; the %d keys before stay", error, len(self._keyring.keys))
            self._complaint = str(error)
            return False
        self._complaint = None
        self._keyring.replace(keys)
        log.info("%s has changed: %d keys", self._path, len(keys))
        return True

    def _read(self) -> tuple[Key, ...]:
        seen = self._state()
        keys = (*self._fixed, *load_keys(self._path))
        _require_unique(keys, str(self._path))
        self._seen = seen
        return keys

    def _state(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return found.st_ino, found.st_mtime_ns, found.st_size


class KeyMetrics(Collector):
    """Requests by the names of keys. A request without a known key has the name ""."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def collect(self) -> Iterator[Metric]:
        ring = self._keyring
        running = GaugeMetricFamily("picker_key_running_requests", "Requests running, by API key.", labels=["key"])
        for name, count in ring.running.items():
            running.add_metric([name], count)
        admitted = CounterMetricFamily("picker_key_requests", "Requests let in, by API key.", labels=["key"])
        for name, count in ring.admitted.items():
            admitted.add_metric([name], count)
        refused = CounterMetricFamily(
            "picker_key_refusals", "Requests not let in, by API key and reason.", labels=["key", "reason"]
        )
        for (name, reason), count in ring.refused.items():
            refused.add_metric([name, reason], count)
        yield from (running, admitted, refused)
