"""The files of a model that say how text becomes tokens: tokenizer.json, its configuration, its chat templates.

Reads local folders in Hugging Face's layout and nothing from any network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picker.errors import ConfigError

Json = Mapping[str, Any]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Models whose prompts vLLM writes in code, not by their chat template.
_WRITTEN_IN_CODE = frozenset(("gpt_oss", "deepseek_v32", "deepseek_v4", "kimi_k3", "inkling"))


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """tokenizer: tokenizer.json. config: tokenizer_config.json. templates: chat templates by name, one is "default".

    special_tokens: what templates see as `bos_token` and its like. no_chat: why chat requests cannot be read, if so.
    """

    tokenizer: Json = field(repr=False)
    config: Json = field(repr=False)
    templates: Mapping[str, str] = field(repr=False)
    special_tokens: Mapping[str, str]
    no_chat: str | None = None


def read_folder(folder: Path, chat_template: Path | None = None) -> ModelFiles:
    """Read a model's folder. chat_template: a file that replaces the model's own, as `--chat-template` does for vLLM.

    Raises ConfigError where tokenizer.json is missing or a file is not what its name says.
    """
    tokenizer = _json(folder / "tokenizer.json")
    if not isinstance(tokenizer.get("model"), dict):
        raise ConfigError(f"{folder / 'tokenizer.json'} describes no model of tokens")
    config = _json(folder / "tokenizer_config.json", optional=True)
    templates = {"default": _text(chat_template)} if chat_template is not None else _templates(folder, config)
    return ModelFiles(tokenizer, config, templates, _special_tokens(folder, config), _no_chat(folder, templates))


def _templates(folder: Path, config: Json) -> dict[str, str]:
    """Files win over the configuration, as in transformers: chat_template.jinja, additional_chat_templates/*.jinja."""
    found: dict[str, str] = {}
    match config.get("chat_template"):
        case str(source):
            found["default"] = source
        case list(named):
            found |= {each["name"]: each["template"] for each in named if isinstance(each, dict)}
    of_processor = _json(folder / "chat_template.json", optional=True).get("chat_template")
    if isinstance(of_processor, str):
        found["default"] = of_processor
    if (alone := folder / "chat_template.jinja").is_file():
        found["default"] = _text(alone)
    for each in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[each.stem] = _text(each)
    return found


def _special_tokens(folder: Path, config: Json) -> dict[str, str]:
    merged = {**_json(folder / "special_tokens_map.json", optional=True), **config}
    named = {name: merged.get(name) for name in _SPECIAL}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(more := merged.get(group), dict):
            named |= more
    texts = {name: each.get("content") if isinstance(each, dict) else each for name, each in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _no_chat(folder: Path, templates: Mapping[str, str]) -> str | None:
    kind = _json(folder / "config.json", optional=True).get("model_type")
    if kind in _WRITTEN_IN_CODE:
        return f"vLLM writes the prompts of {kind} models in code, not by a chat template"
    if (folder / "tekken.json").is_file():
        return "vLLM writes the prompts of this model with Mistral's own library"
    return None if "default" in templates else "the model has no chat template"


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError:
        raise ConfigError(f"{path} is not JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
