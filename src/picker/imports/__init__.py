"""Configurations of other projects, read as ours. One module a project; each says line by line what became of what.

Pure: values in, values and a report out. Nothing of a foreign file is dropped without a line about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from picker.errors import ConfigError
from picker.imports import epp
from picker.imports.report import Imported

# name of --from -> (whether a document is one, how it is read)
IMPORTERS: Mapping[str, tuple[Callable[[Any], bool], Callable[[Any], Imported]]] = {
    "epp": (epp.is_one, epp.read),
}


def import_text(text: str, project: str | None = None) -> Imported:
    """A foreign configuration, of that project or of the one that it looks like; raises ConfigError."""
    document = parse(text)
    project = project or recognise(document)
    if project is None:
        raise ConfigError(f"this is no configuration of {', '.join(IMPORTERS)}: say whose with --from")
    return IMPORTERS[project][1](document)


def recognise(document: Any) -> str | None:
    """Whose configuration a parsed document is, None where it is nobody's that we know."""
    return next((name for name, (is_one, _) in IMPORTERS.items() if is_one(document)), None)


def parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
