"""A model's folder, loaded as a whole: what it reads, what it cannot, and what is missing to try."""

from __future__ import annotations

import importlib
import json
from datetime import datetime
from pathlib import Path

import pytest

from picker.errors import ConfigError
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.model import LocalModel, load_model
from picker.types import Call, CallKind
from tiny_tokenizers import CHAT_TEMPLATE, spec

CHAT = Call(CallKind.CHAT, "m", body=b'{"messages": [{"role": "user", "content": "hi"}]}')


def load(folder: Path, template: str | None = CHAT_TEMPLATE) -> LocalModel:
    (folder / "tokenizer.json").write_text(json.dumps(spec("qwen")))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_model(folder, seconds=lambda: 0.0, today=lambda: datetime(2026, 1, 2))


def test_a_folder_reads_chats(tmp_path: Path) -> None:
    model = load(tmp_path)
    read = model.prompts.read(CHAT)
    assert read.data == b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = model.whole().ids(read.data)
    assert model.canonical.check([], ids)
    spelling = model.vocabulary.spell(ids)
    assert spelling is not None
    assert spelling.data == read.data
    assert (model.no_chat, model.dated) == (None, False)


def test_a_folder_without_a_template_says_so(tmp_path: Path) -> None:
    model = load(tmp_path, template=None)
    assert model.no_chat == "the model has no chat template"
    with pytest.raises(Unreadable):
        model.prompts.read(CHAT)


def test_a_template_with_a_date_is_told(tmp_path: Path) -> None:
    model = load(tmp_path, "{{ strftime_now('%Y') }}")
    assert model.dated
    assert model.prompts.read(CHAT).data == b"2026"


@pytest.mark.parametrize("name", ["tokenizers", "jinja2"])
def test_a_library_that_is_not_installed_is_named_with_the_way_to_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(wanted: str) -> object:
        if wanted == name:
            raise ImportError
        return real(wanted)

    monkeypatch.setattr("picker.tokenizers.libraries.importlib.import_module", absent)
    with pytest.raises(ConfigError, match=f"needs {name}: pip install tokenizers jinja2"):
        load(tmp_path)
