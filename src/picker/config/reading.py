"""From a YAML file or plain values to a checked configuration, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from picker.config.checks import check
from picker.config.faults import explain
from picker.config.sections import Config, Part
from picker.errors import ConfigError

AnyPart = TypeVar("AnyPart", bound=Part)


def load_config(path: Path | None) -> Config:
    """The configuration in a YAML file, or the defaults when there is none."""
    if path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(text: str) -> Config:
    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        place = "" if at is None else f"line {at.line + 1}, column {at.column + 1}: "
        raise ConfigError(f"not valid YAML: {place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_one_line(error)}") from None
    return from_values({} if values is None else values)


def from_values(values: Any) -> Config:
    """Checked configuration from plain values (a parsed file)."""
    if not isinstance(values, dict):
        raise ConfigError(f"expected keys and values at the top, got {type(values).__name__}")
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(str(error))) from None
    check(config)
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Put flags over a configuration: keys are dotted ("proxy.port"); None leaves the file's value."""
    for key, value in changes.items():
        if value is None:
            continue
        config = _replaced(config, key, value)
    check(config)
    return config


def _replaced(part: AnyPart, key: str, value: Any) -> AnyPart:
    field, _, rest = key.partition(".")
    return msgspec.structs.replace(part, **{field: _replaced(getattr(part, field), rest, value) if rest else value})


def schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    return msgspec.json.schema(Config)


def to_values(config: Config) -> dict[str, Any]:
    """Plain values, as the file would have them; secrets are masked."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    for section, secret in (("admin", "token"), ("api", "key"), ("replicas", "secret")):
        if values[section][secret] is not None:
            values[section][secret] = "***"
    if values["upstream"]["api_key"] is not None:
        values["upstream"]["api_key"] = "***"
    for endpoint in values["endpoints"]:
        if isinstance(endpoint, dict) and endpoint["api_key"] is not None:
            endpoint["api_key"] = "***"
    if (redis := values["replicas"]["redis"]) is not None:
        values["replicas"]["redis"] = re.sub(r"//[^@/]*@", "//***@", redis)
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
