"""The two optional libraries of the extra `exact`, asked for by name where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from picker.errors import ConfigError


def library(name: str) -> ModuleType:
    """Import `tokenizers` or `jinja2`. Raises ConfigError that says what to install where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"exact matching needs {name}: pip install tokenizers jinja2") from None
