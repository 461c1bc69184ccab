from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from picker.commands.options import ADMIN_VARIABLE, admin_token, routing_config
from picker.config import AdminConfig, from_values, to_values
from picker.errors import ConfigError


def test_the_admin_token_is_the_configurations_or_its_files_or_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert admin_token(AdminConfig()) is None
    monkeypatch.setenv(ADMIN_VARIABLE, "from-env")
    assert admin_token(AdminConfig()) == "from-env"
    assert admin_token(AdminConfig(token="said")) == "said"
    assert admin_token(AdminConfig(token_file=str(file))) == "from-file"


@pytest.mark.parametrize("content", ["", "two words", "\n"])
def test_a_file_without_a_token_opens_nothing(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(ConfigError, match="token"):
        admin_token(AdminConfig(token_file=str(file)))
    with pytest.raises(ConfigError, match="cannot be read"):
        admin_token(AdminConfig(token_file=str(tmp_path / "none")))


def test_an_empty_variable_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_VARIABLE, "")
    with pytest.raises(ConfigError, match="empty"):
        admin_token(AdminConfig())


def test_a_token_is_given_once() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        from_values({"admin": {"token": "a", "token_file": "b"}})


def test_every_command_that_routes_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picker.commands.options.start_logging", lambda level: None)
    monkeypatch.setenv(ADMIN_VARIABLE, "from-env")
    flags = dict.fromkeys(inspect.signature(routing_config).parameters)
    for given in ("more", "load"):
        del flags[given]
    config = routing_config({}, **(flags | {"endpoints": ("a:1",), "log_level": "info"}))  # type: ignore[arg-type]
    assert config.admin.token == "from-env"
    assert "from-env" not in str(to_values(config))
