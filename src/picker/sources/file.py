"""Endpoints from a YAML file that is watched: edit the file, and the pool follows without a restart.

Beside what an endpoint is, an entry says how it is to be treated: its weight, and the key it is shown. The file is a
list under `endpoints:`, in picker's own words or in those of llm-d's file discovery. It is read strictly: what is not
understood is an error with its place and a way to mend it. A bad edit never empties the pool: the last good state
stays. Polls instead of using inotify, which sees neither NFS nor the symlink swap of a mounted ConfigMap.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from picker.errors import ConfigError
from picker.sources.roster import check_weight
from picker.sources.static import SCHEMES, join_address, parse_endpoint, require_unique_names
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact, Role

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20  # the bound of llm-d's file discovery
ROLE_LABEL = "llm-d.ai/role"

# llm-d's values of the label, by what an endpoint with it can do for a request here.
_LABEL_ROLES = {
    "both": Role.BOTH,
    "prefill-decode": Role.BOTH,
    "encode-prefill-decode": Role.BOTH,
    "prefill": Role.PREFILL,
    "encode-prefill": Role.PREFILL,
    "decode": Role.DECODE,
}

# libyaml where PyYAML has it: a thousand endpoints take tens of milliseconds instead of seconds.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """How an endpoint of the file is treated. weight: see `LivePolicy`. key: what it is shown, None for all others'.

    key_file: where the key was read.
    """

    weight: float = 1.0
    key: str | None = field(default=None, repr=False)
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What the file says of one endpoint."""

    endpoint: Endpoint
    terms: Terms = Terms()


@dataclass(frozen=True, slots=True)
class _Key:
    """What may stand at one key of an entry: a test, and the words for it. secret: its value is not repeated."""

    fits: Callable[[object], bool]
    words: str
    secret: bool = False


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(_is_text(item) for item in value)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)


_TEXT = _Key(_is_text, "text (in quotes where YAML would read something else)")
_KEYS = {
    "name": _TEXT,
    "namespace": _TEXT,
    "address": _TEXT,
    "port": _Key(lambda value: _is_whole(value) or _is_text(value), "a number from 1 to 65535"),
    "models": _Key(_is_texts, "a list of model names"),
    "role": _TEXT,
    "rank": _Key(_is_whole, "a whole number from 0 up"),
    "scheme": _TEXT,
    "labels": _Key(_is_text_map, "a mapping of text to text"),
    "weight": _Key(_is_number, "a number"),
    "api_key": _Key(_is_text, _TEXT.words, secret=True),
    "api_key_file": _TEXT,
}
_VISIBLE = re.compile(r"[\x21-\x7e]+")  # of a header's value


def load_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """The endpoints of the file; raises ConfigError, also when it cannot be read. Blocks."""
    return tuple(entry.endpoint for entry in load_entries(path))


def load_entries(path: Path) -> tuple[Entry, ...]:
    """Read and check the file and those that it names; raises ConfigError, also when it cannot be read. Blocks."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    return parse_entries(text, origin=str(path))


def parse_endpoints(text: bytes | str, *, origin: str) -> tuple[Endpoint, ...]:
    """The endpoints of a file's text, in its order; `origin` leads every message. Raises ConfigError."""
    return tuple(entry.endpoint for entry in parse_entries(text, origin=origin))


def parse_entries(text: bytes | str, *, origin: str) -> tuple[Entry, ...]:
    """The same with their terms; reads the files of keys that are named."""
    try:
        document = _document(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: is not usable YAML: {_yaml_problem(error)}") from error
    entries = _entries(document, origin)
    found = tuple(_entry(entry, f"{origin}: endpoint {n}") for n, entry in enumerate(entries, start=1))
    try:
        require_unique_names(entry.endpoint for entry in found)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return found


def _document(text: bytes | str) -> object:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        _refuse_repeated_keys(root, set())
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """YAML lets the last of two equal keys win; here it would drop an endpoint whose dash was forgotten."""
    if id(node) in seen:  # reached by an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
                keys.add(key.value)
            _refuse_repeated_keys(value, seen)


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).split("\n")[0] or type(error).__name__
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _entries(document: object, origin: str) -> list[object]:
    if not isinstance(document, dict):
        raise ConfigError(f"{origin}: has no 'endpoints:' list at its top")
    _refuse_unknown(document, ("endpoints",), origin)
    entries = document.get("endpoints")
    if not isinstance(entries, list):
        raise ConfigError(f"{origin}: 'endpoints' must be a list, not {_kind(entries)}; write [] for none")
    return entries


def _entry(entry: object, place: str) -> Entry:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: must be a mapping such as {{address: 10.0.0.1, port: 8000}}, not {_kind(entry)}")
    if _is_text(entry.get("name")):
        place = f"{place} ({entry['name']!r})"
    _refuse_unknown(entry, _KEYS, place)
    for key, value in entry.items():
        if not _KEYS[key].fits(value):
            but = "" if _KEYS[key].secret else f", not {_kind(value)}"
            raise ConfigError(f"{place}: {key!r} must be {_KEYS[key].words}{but}")
    try:
        return Entry(_built(entry), _terms(entry))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _built(entry: Mapping[str, Any]) -> Endpoint:
    plain = _located(entry)
    labels = entry.get("labels", {})
    return replace(
        plain,
        name=_name(entry, plain.address),
        models=frozenset(entry.get("models", ())),
        role=_role(entry.get("role"), labels),
        rank=entry.get("rank"),
        labels=labels,
    )


def _terms(entry: Mapping[str, Any]) -> Terms:
    weight, key, file = float(entry.get("weight", 1.0)), entry.get("api_key"), entry.get("api_key_file")
    check_weight(weight)
    if file is not None:
        if key is not None:
            raise ConfigError("the key is given twice, in 'api_key' and in 'api_key_file'")
        return Terms(weight, read_key(Path(file)), Path(file))
    if key is not None and not _VISIBLE.fullmatch(key):
        raise ConfigError("'api_key' has characters that no header can have")
    return Terms(weight, key)


def read_key(path: Path) -> str:
    """The one key in a file, without what is blank around it; raises ConfigError that never shows it. Blocks."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"the file of a key, {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the file of a key, {path}: is not UTF-8 text") from None
    if not _VISIBLE.fullmatch(key):
        raise ConfigError(f"the file of a key, {path}: is empty, or has characters that no header can have")
    return key


def _located(entry: Mapping[str, Any]) -> Endpoint:
    """Where it is: `address` holds host and port, or a whole URL, or the host alone with `port` beside it."""
    address, port, scheme = entry.get("address"), entry.get("port"), entry.get("scheme")
    if address is None:
        raise ConfigError("the key 'address' is missing")
    if scheme is not None:
        if scheme not in SCHEMES:
            raise ConfigError(f"unknown scheme {scheme!r}{_nearest(scheme, SCHEMES)}")
        if "://" in address:
            raise ConfigError("the scheme is given twice, in 'address' and in 'scheme'")
    if port is not None:
        joined = join_address(address, port)
        return Endpoint(name=joined, address=joined, scheme=scheme or "http")
    located = parse_endpoint(address)
    return replace(located, scheme=scheme or located.scheme)


def _name(entry: Mapping[str, Any], address: str) -> str:
    """llm-d's identity is (namespace, name), its default namespace `default`; ranks are named as GIE names them."""
    name: str | None = entry.get("name")
    namespace = entry.get("namespace", "default")
    if name is None:
        return address if entry.get("rank") is None else f"{address}-rank-{entry['rank']}"
    return name if namespace == "default" else f"{namespace}/{name}"


def _role(role: str | None, labels: Mapping[str, str]) -> Role:
    """The entry's own word wins over the label."""
    if role is not None:
        names = [known.value for known in Role]
        if role not in names:
            raise ConfigError(f"unknown role {role!r}{_nearest(role, names)}")
        return Role(role)
    label = labels.get(ROLE_LABEL, "both")
    if label not in _LABEL_ROLES:
        raise ConfigError(f"label {ROLE_LABEL} has the unknown role {label!r}{_nearest(label, _LABEL_ROLES)}")
    return _LABEL_ROLES[label]


def _refuse_unknown(mapping: Mapping[object, object], known: Iterable[str], place: str) -> None:
    for key in mapping:
        if key not in tuple(known):
            raise ConfigError(f"{place}: unknown key {str(key)!r}{_nearest(str(key), known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", bool: "true or false", type(None): "nothing"}
    return names.get(type(value)) or repr(value)[:60]


# --- watching ----------------------------------------------------------------------------------------------

_Signature = tuple[tuple[int, int, int] | None, ...]  # of the file, and of those that it names


class FileSource:
    """Follows a file of endpoints by looking at its time, size and inode every `interval` seconds.

    A file that breaks or vanishes leaves the last good endpoints in place and is reported once. path: None for no
    file, and so no endpoints, until there is one. terms: told how all are treated, before who is new is emitted.
    """

    provides = ("endpoints",)

    def __init__(
        self,
        path: str | Path | None,
        interval: float = 1.0,
        *,
        terms: Callable[[Mapping[str, Terms]], None] = lambda terms: None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._interval = interval
        self._tell = terms
        self._sleep = sleep
        self._signature: _Signature | None = None
        self._named: tuple[Path, ...] = ()
        self._known: dict[str, Endpoint] = {}
        self._complaint: str | None = None

    def move(self, path: Path | None) -> None:
        """Follow another file from the next look on, or none."""
        self._path, self._signature, self._named = path, None, ()

    async def run(self, emit: Callable[[Fact], None]) -> None:
        """Emit the file's endpoints, then every change, until cancelled. Raises ConfigError if the first look fails."""
        self._adopt(await asyncio.to_thread(self._look), emit)
        while True:
            await self._sleep(self._interval)
            try:
                endpoints = await asyncio.to_thread(self._look)
            except ConfigError as error:
                self._complain(str(error))
            else:
                self._recover()
                self._adopt(endpoints, emit)

    def _look(self) -> tuple[Entry, ...] | None:
        """The entries if the files are not those last read, else None. Runs in a thread: file systems can hang."""
        path = self._path
        if path is None:
            return () if self._known else None
        before = self._stat(path)
        if (before, *map(_state, self._named)) == self._signature:
            return None
        entries = load_entries(path)
        named = tuple(entry.terms.key_file for entry in entries if entry.terms.key_file is not None)
        if self._stat(path) != before:  # caught in the middle of a write: what is there may be valid YAML and a part
            return None if self._known else entries
        if path == self._path:  # else another one has been named meanwhile
            self._named = named
            # Only of what was read in full: a broken file is looked at again each time.
            self._signature = (before, *map(_state, named))
        return entries

    def _stat(self, path: Path) -> tuple[int, int, int]:
        try:
            return _identity(os.stat(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error

    def _adopt(self, entries: tuple[Entry, ...] | None, emit: Callable[[Fact], None]) -> None:
        if entries is None:
            return
        self._tell({entry.endpoint.name: entry.terms for entry in entries})
        before, self._known = self._known, {entry.endpoint.name: entry.endpoint for entry in entries}
        if not entries and self._path is not None:
            log.warning("%s lists no endpoints; it is looked at again and again", self._path)
        # Added first: a file whose every endpoint is replaced must not leave the pool empty in between.
        for name, endpoint in self._known.items():
            if before.get(name) != endpoint:
                emit(EndpointAdded(endpoint))
        for name in before:
            if name not in self._known:
                emit(EndpointRemoved(name))

    def _complain(self, problem: str) -> None:
        if problem != self._complaint:
            log.warning("%s; keeping the last good %d endpoints", problem, len(self._known))
        self._complaint = problem

    def _recover(self) -> None:
        if self._complaint is not None:
            log.info("%s is good again", self._path)
        self._complaint = None


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file; None where there is none to see."""
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino
