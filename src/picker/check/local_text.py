"""What the files that picker is given make of text: a tokenizer.json and a chat template, by the libraries alone.

Written apart from `picker.tokenizers`, so that one does not repeat the other's mistakes. Reads plain chats only.
"""

from __future__ import annotations

import json
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class UntoldError(Exception):
    """The files do not say, or cannot be read here; the message says why."""


class LocalText:
    """The files of one folder. Raises UntoldError where there is no tokenizer.json, or no library to read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._tokenizer = import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._jinja = import_module("jinja2.sandbox")
        except ImportError as error:
            raise UntoldError(f"{error.name} is not installed: pip install tokenizers jinja2") from None
        except Exception as error:  # the library raises nothing more special
            raise UntoldError(f"{folder / 'tokenizer.json'} cannot be read: {type(error).__name__}") from None
        self._config = self._json("tokenizer_config.json")

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        """Raises UntoldError where there is no template, or it does not take these messages."""
        jinja = self._jinja
        environment = jinja.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False)
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            template = environment.from_string(self._template())
            return str(template.render(messages=messages, add_generation_prompt=True, tools=None, **self._special()))
        except import_module("jinja2").TemplateError as error:
            raise UntoldError(f"its chat template does not take a plain chat: {type(error).__name__}") from None

    def _template(self) -> str:
        own = self._folder / "chat_template.jinja"
        if own.is_file():
            return own.read_text(encoding="utf-8")
        told = self._config.get("chat_template")
        if isinstance(told, list):
            told = next((each.get("template") for each in told if each.get("name") == "default"), None)
        if not isinstance(told, str):
            raise UntoldError(f"{self._folder} has no chat template")
        return told

    def _special(self) -> dict[str, str]:
        found = {name: self._config.get(name) for name in _SPECIAL}
        texts = {name: each.get("content") if isinstance(each, dict) else each for name, each in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
