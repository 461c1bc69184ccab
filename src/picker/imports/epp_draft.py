"""An import of an `EndpointPickerConfig` while it is being made: its plugins by name, and what was said so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from picker.errors import ConfigError
from picker.imports.epp_plugins import KINDS, Kind, Part, translate
from picker.imports.epp_schema import Plugin, near
from picker.imports.report import Fate, Line


@dataclass(slots=True)
class Named:
    """A plugin of the configuration. idle: parameters that do nothing here."""

    where: str
    name: str
    type: str
    kind: Kind
    given: Mapping[str, Any]
    ours: dict[str, Any]
    idle: list[str]

    @property
    def spec(self) -> dict[str, Any]:
        """As a scorer or filter of ours; its own name is shown in explanations."""
        named = {"name": self.name} if self.name != self.type else {}
        return {"name": self.kind.name or self.type, "parameters": {**self.ours, **named}}


@dataclass(slots=True)
class Draft:
    """values: a configuration in picker's words. plugins: by name. used: names of those that something refers to."""

    values: dict[str, Any] = field(default_factory=lambda: {"policy": "weighted"})
    lines: list[Line] = field(default_factory=list)
    plugins: dict[str, Named] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def say(self, where: str, fate: Fate, says: str) -> None:
        self.lines.append(Line(where, fate, says))

    def add(self, where: str, plugin: Plugin) -> None:
        """A plugin of the file; raises ConfigError for a type or a parameter that there is not."""
        name, kind = plugin.name or plugin.type, KINDS.get(plugin.type)
        if kind is None:
            raise ConfigError(f"{where}.type: there is no plugin type {plugin.type!r}{near(plugin.type, list(KINDS))}")
        if name in self.plugins:
            raise ConfigError(f"{where}: two plugins are called {name!r}")
        given = plugin.parameters or {}
        ours, idle = translate(plugin.type, kind, given, where)
        self.plugins[name] = Named(where, name, plugin.type, kind, given, ours, idle)

    def find(self, name: str, where: str, *, known: Iterable[str] = ()) -> Named:
        """The plugin of that name; those the endpoint picker adds by itself need no entry."""
        if not name:
            raise ConfigError(f"{where}: a pluginRef is missing")
        if name not in self.plugins:
            if name not in known:
                raise ConfigError(f"{where}: there is no plugin {name!r}{near(name, list(self.plugins))}")
            ours, idle = translate(name, KINDS[name], {}, where)
            self.plugins[name] = Named(where, name, name, KINDS[name], {}, ours, idle)
        self.used.add(name)
        return self.plugins[name]

    def of(self, *parts: Part) -> list[Named]:
        return [plugin for plugin in self.plugins.values() if plugin.kind.part in parts]

    def of_type(self, *types: str) -> list[Named]:
        return [plugin for plugin in self.plugins.values() if plugin.type in types]

    def tell_plugins(self) -> None:
        """A line on each plugin, in the order of the file."""
        for plugin in self.plugins.values():
            kind, fate, says = plugin.kind, plugin.kind.fate, plugin.kind.says
            ours = kind.name or (plugin.type if kind.part.schedules else "")
            parts = [text for text in (says, f"as {ours}" if kind.name else "") if text]
            if plugin.idle and fate is not Fate.MISSING:
                reason = "" if kind.any_keys else f" ({kind.idle})"
                parts.append(f"without effect: {', '.join(plugin.idle)}{reason}")
            if kind.part.schedules and plugin.name not in self.used:
                parts.append("no profile refers to it")
            self.say(f"{plugin.where} {plugin.name}", fate, "; ".join(parts) or "as it is there")
