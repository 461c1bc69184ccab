"""What a configuration's `exact` section becomes: which tokenizer reads what, and as which engine flags say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from picker.app import App
from picker.config import Config, ExactConfig, TokenizerSpec, from_values
from picker.errors import ConfigError
from picker.exact_mode import ExactMode, LocalModels, fingerprint, load_models
from picker.types import Call, CallKind
from tiny_tokenizers import CHAT_TEMPLATE, spec

TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "tokenizer.json").write_text(json.dumps(spec("qwen")), encoding="utf-8")
    (made / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return made


def read(exact: ExactConfig | LocalModels, model: str | None = "m", **body: Any) -> bytes:
    """The text of a chat, as the configured model reads it."""
    models = load_models(exact) if isinstance(exact, ExactConfig) else exact
    sent = {"messages": [{"role": "user", "content": "hi"}], **body}
    call = Call(CallKind.CHAT, model, body=json.dumps(sent).encode())
    return models.read(call).data


def test_a_folder_alone_is_a_tokenizer(folder: Path) -> None:
    assert read(ExactConfig(tokenizer=str(folder))).startswith(b"<|im_start|>user\nhi")


def test_another_chat_template_replaces_the_models_own(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0].content }}!", encoding="utf-8")
    told = TokenizerSpec(folder=str(folder), chat_template=str(other))
    assert read(ExactConfig(tokenizer=told)) == b"hi!"


def test_template_kwargs_are_the_engines_and_a_request_may_say_otherwise(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("{{ mood }} {{ messages[0].content }}", encoding="utf-8")
    told = TokenizerSpec(folder=str(folder), chat_template=str(other), chat_template_kwargs={"mood": "glad"})
    models = load_models(ExactConfig(tokenizer=told))
    assert read(models) == b"glad hi"
    assert read(models, chat_template_kwargs={"mood": "sad"}) == b"sad hi"


def test_a_content_format_that_is_told_is_not_guessed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0].content is string }}", encoding="utf-8")

    def found(content_format: str) -> bytes:
        told = TokenizerSpec(folder=str(folder), chat_template=str(other), content_format=content_format)
        return read(ExactConfig(tokenizer=told))

    assert (found("auto"), found("string"), found("openai")) == (b"True", b"True", b"False")


def test_tools_are_left_out_where_the_engine_leaves_them_out(folder: Path) -> None:
    for excludes in (False, True):
        told = TokenizerSpec(folder=str(folder), exclude_tools=excludes)
        assert (b"weather" in read(ExactConfig(tokenizer=told), tools=TOOLS, tool_choice="none")) is not excludes


def test_a_model_is_read_with_its_own_tokenizer_and_any_other_with_the_common_one(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text("special", encoding="utf-8")
    own: dict[str, str | TokenizerSpec] = {"m": TokenizerSpec(folder=str(folder), chat_template=str(other))}
    models = load_models(ExactConfig(tokenizers=own, tokenizer=str(folder)))
    assert read(models, "m") == b"special"
    assert read(models, "n").startswith(b"<|im_start|>user")
    assert models.of_endpoint(frozenset({"m", "an-adapter"})) is models.by_name["m"]
    assert models.of_endpoint(frozenset({"n"})) is models.other


def test_the_file_says_all_of_it(folder: Path) -> None:
    config = from_values(
        {
            "exact": {
                "tokenizer": str(folder),
                "tokenizers": {"m": {"folder": str(folder), "chat_template_kwargs": {"enable_thinking": False}}},
                "snapshot": "picker.snapshot",
                "snapshot_interval_s": 60,
            }
        }
    )
    told = config.exact.tokenizers["m"]
    assert isinstance(told, TokenizerSpec)
    assert told.chat_template_kwargs == {"enable_thinking": False}
    assert (config.exact.mode, config.exact.snapshot_interval_s) == ("bytes", 60)


@pytest.mark.parametrize(
    ("exact", "complaint"),
    [
        ({"tokenizer": {"chat_template": "x"}}, r"exact\.tokenizer.*missing required field `folder`"),
        ({"tokenizer": {"folder": "x", "chat_templat": "y"}}, r"exact\.tokenizer\.chat_templat: .*'chat_template'\?"),
        ({"tokenizers": {"m": {"folder": "x", "kwargs": {}}}}, r"exact\.tokenizers.*kwargs: unknown key; .*folder"),
        ({"tokenizers": {"m": 3}}, r"exact\.tokenizers.*is a whole number"),
        ({"tokenizer": {"folder": "x", "chat_template_kwargs": [1]}}, r"chat_template_kwargs: must be keys and values"),
        (
            {"tokenizers": {"m": {"folder": "x", "content_format": "opnai"}}},
            r"exact\.tokenizers\.m\.content_format: 'opnai' is not one of auto, string, openai; did you mean 'openai'",
        ),
        ({"snapshot": "x"}, r"exact\.snapshot: there is nothing to save: give exact\.tokenizer"),
        ({"tokenizer": "x", "snapshot_interval_s": 0}, r"exact\.snapshot_interval_s: must be greater than 0"),
        ({"snapshots": "x"}, r"exact\.snapshots: unknown key; did you mean 'snapshot'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(exact: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_values({"exact": exact})


def test_what_is_not_there_is_named_with_its_key(folder: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for exact, complaint in [
        (ExactConfig(tokenizer=absent), r"exact\.tokenizer: there is no folder .*absent"),
        (ExactConfig(tokenizers={"m": absent}), r"exact\.tokenizers\.m: there is no folder .*absent"),
        (
            ExactConfig(tokenizers={"m": TokenizerSpec(folder=str(folder), chat_template=absent)}),
            r"exact\.tokenizers\.m\.chat_template: there is no file .*absent",
        ),
        (ExactConfig(tokenizer=str(tmp_path)), r"exact\.tokenizer: cannot read .*tokenizer\.json"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            load_models(exact)
    (folder / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"exact\.tokenizer: the chat template 'default' does not parse: line 1"):
        load_models(ExactConfig(tokenizer=str(folder)))


def test_a_model_without_a_chat_template_is_named_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "chat_template.jinja").unlink()
    load_models(ExactConfig(tokenizers={"m": str(folder)}))
    assert "exact.tokenizers.m: chats will be routed by approximate knowledge: the model has no" in caplog.text


def test_a_template_that_tells_the_date_is_named_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}", encoding="utf-8")
    load_models(ExactConfig(tokenizer=str(folder)))
    assert "tells the date" in caplog.text


def test_the_key_of_a_snapshot_is_the_next_process_s_too(folder: Path, tmp_path: Path) -> None:
    exact = ExactConfig(tokenizer=str(folder), snapshot=str(tmp_path / "snapshot"))
    assert ExactMode(exact, b"one").secret == ExactMode(exact, b"two").secret
    assert ExactMode(ExactConfig(tokenizer=str(folder)), b"one").secret == b"one"


def test_a_snapshot_where_nothing_can_be_written_is_an_error_at_the_start(folder: Path, tmp_path: Path) -> None:
    exact = ExactConfig(tokenizer=str(folder), snapshot=str(tmp_path / "absent" / "snapshot"))
    with pytest.raises(ConfigError, match=r"exact\.snapshot: cannot use .*absent"):
        App(Config(endpoints=["127.0.0.1:1"], exact=exact))


def test_a_fingerprint_is_of_the_files_and_the_way_to_match(folder: Path) -> None:
    told = ExactConfig(tokenizer=str(folder))
    before = fingerprint(told)
    assert fingerprint(ExactConfig(tokenizer=TokenizerSpec(folder=str(folder)))) == before
    assert fingerprint(ExactConfig(tokenizer=str(folder), by="tokens")) != before
    assert fingerprint(ExactConfig(tokenizers={"m": str(folder)})) != before
    (folder / "tokenizer.json").write_text(json.dumps(spec("llama3")), encoding="utf-8")
    assert fingerprint(told) != before
