"""What is checked at tier T0: files, read and told apart. Judges nothing but whether they can be read."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from picker.check.verdict import Trace
from picker.config import Config

_OWN_KEYS = frozenset(Config.__struct_fields__)
_SUFFIXES = (".yaml", ".yml", ".json")
# libyaml where PyYAML has it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Kind(enum.Enum):
    """What a document is, by its keys."""

    ENVOY = "Envoy configuration"
    MANIFEST = "Kubernetes manifest"
    POOL = "endpoints file"
    PICKER = "picker configuration"
    OTHER = "not recognised"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Paper:
    """One document of a file. problem: why it cannot be read."""

    path: Path
    kind: Kind
    value: dict[str, Any]
    problem: str = ""

    @property
    def name(self) -> str:
        kind, meta = self.value.get("kind"), self.value.get("metadata")
        named = meta.get("name") if isinstance(meta, dict) else None
        return f"{self.path.name}: {kind} {named}" if self.kind is Kind.MANIFEST else self.path.name


@dataclass(frozen=True, slots=True)
class Papers:
    """All documents. binary: the Envoy to ask about its configurations; None: the one that is installed."""

    all: tuple[Paper, ...]
    trace: Trace = field(default_factory=Trace)
    binary: Path | None = None

    def of(self, kind: Kind) -> list[Paper]:
        return [paper for paper in self.all if paper.kind is kind]

    def manifests(self, *kinds: str) -> list[Paper]:
        return [paper for paper in self.of(Kind.MANIFEST) if paper.value.get("kind") in kinds]


def read(paths: Sequence[Path]) -> tuple[Paper, ...]:
    """Every document in these files, and in the YAML and JSON files of these folders."""
    return tuple(paper for path in paths for file in _files(path) for paper in _documents(file))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    return [path]


def _documents(path: Path) -> Iterator[Paper]:
    try:
        values = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Paper(path, Kind.UNREADABLE, {}, " ".join(str(error).split()))
        return
    for value in values:
        if value is None:
            continue
        if not isinstance(value, dict):
            yield Paper(path, Kind.UNREADABLE, {}, f"a {type(value).__name__}, not a mapping")
        elif value.get("kind") == "List" and isinstance(value.get("items"), list):
            yield from (Paper(path, Kind.MANIFEST, item) for item in value["items"] if isinstance(item, dict))
        else:
            yield Paper(path, _kind(value), value)


def _kind(value: dict[str, Any]) -> Kind:
    if "static_resources" in value or "dynamic_resources" in value:
        return Kind.ENVOY
    if "apiVersion" in value and "kind" in value:
        return Kind.MANIFEST
    if set(value) == {"endpoints"}:
        return Kind.POOL
    # Folders hold files of other programs, too; what has no key of picker's is nobody's mistake here.
    return Kind.PICKER if _OWN_KEYS.intersection(map(str, value)) else Kind.OTHER


def within(value: object, key: str) -> Iterator[Any]:
    """Everything that stands under this key, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from within(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from within(inner, key)
