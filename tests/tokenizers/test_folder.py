"""Model folders in Hugging Face's layout: which file says what, and which wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picker.errors import ConfigError
from picker.tokenizers.folder import read_folder
from tiny_tokenizers import spec


def folder(path: Path, **files: object) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(spec("qwen")))
    for name, content in files.items():
        target = path / name.replace("__", "/").replace("_DOT_", ".")
        target.parent.mkdir(exist_ok=True)
        target.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_configuration_names_templates_and_special_tokens(tmp_path: Path) -> None:
    config = {"chat_template": "x", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    found = read_folder(folder(tmp_path, tokenizer_config_DOT_json=config))
    assert found.templates == {"default": "x"}
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.no_chat is None


def test_named_templates_are_read(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = read_folder(folder(tmp_path, tokenizer_config_DOT_json={"chat_template": named}))
    assert found.templates == {"default": "d", "tool_use": "t"}


def test_files_win_over_the_configuration_and_a_given_file_over_all(tmp_path: Path) -> None:
    files = {
        "tokenizer_config_DOT_json": {"chat_template": "c"},
        "chat_template_DOT_jinja": "file",
        "additional_chat_templates__tool_use_DOT_jinja": "tools",
        "mine_DOT_jinja": "mine",
    }
    path = folder(tmp_path, **files)
    assert read_folder(path).templates == {"default": "file", "tool_use": "tools"}
    assert read_folder(path, path / "mine.jinja").templates == {"default": "mine"}


def test_a_processors_template_is_read(tmp_path: Path) -> None:
    assert read_folder(folder(tmp_path, chat_template_DOT_json={"chat_template": "p"})).templates == {"default": "p"}


def test_models_whose_prompts_are_not_templates_take_no_chat(tmp_path: Path) -> None:
    assert read_folder(folder(tmp_path)).no_chat == "the model has no chat template"
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    assert "gpt_oss" in str(read_folder(tmp_path).no_chat)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tekken.json").write_text("{}")
    assert "Mistral" in str(read_folder(tmp_path).no_chat)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not JSON"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no model of tokens"):
        read_folder(tmp_path)
