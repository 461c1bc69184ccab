"""A call's leading prompt as canonical bytes: chats, completions, token ids, and what is left unread."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.prompt import LocalPrompts
from picker.tokenizers.template import ChatTemplate
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import Seams
from picker.types import Call, CallKind
from tiny_tokenizers import CHAT_TEMPLATE, spec

PARTS = CHAT_TEMPLATE.replace(
    "{%- if message.content is string %}{{- message.content }}{%- endif %}",
    "{%- for part in message.content %}{{- part.text or '<|endoftext|>' }}{%- endfor %}",
)


def prompts(kind: str = "llama3", source: str | None = CHAT_TEMPLATE) -> LocalPrompts:
    tokenizer = TextTokenizer(spec(kind))
    template = None
    if source is not None:
        template = ChatTemplate({"default": source}, special_tokens={}, seconds=lambda: 0.0, today=datetime.now)
    return LocalPrompts(tokenizer, Seams(tokenizer), template)


PROMPTS = prompts()


def call(kind: CallKind = CallKind.COMPLETION, **body: object) -> Call:
    return Call(kind, "m", body=json.dumps(body).encode())


def chat(**body: object) -> Call:
    return call(CallKind.CHAT, messages=[{"role": "user", "content": "hi there"}], **body)


def test_a_chat_is_rendered_and_opened_only_if_asked() -> None:
    text = b"<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    assert PROMPTS.read(chat()).data == text
    assert PROMPTS.read(chat(add_special_tokens=True)).data == b"<|endoftext|>" + text


def test_a_completion_is_opened_unless_asked_not_to() -> None:
    assert PROMPTS.read(call(prompt="some words")).data == b"<|endoftext|>some words"
    assert PROMPTS.read(call(prompt="some words", add_special_tokens=False)).data == b"some words"


def test_the_first_prompt_of_a_batch_leads() -> None:
    assert PROMPTS.read(call(prompt=["one", "two"], add_special_tokens=False)).data == b"one"
    assert PROMPTS.read(call(prompt=[[5, 6], [7]])).ids == [5, 6]


def test_token_ids_are_spelled_and_end_where_they_end() -> None:
    ids = PROMPTS.tokenizer.encode("some words, and 中文")
    read = PROMPTS.read(call(prompt=ids))
    assert read.data == "some words, and 中文".encode()
    assert read.ids == ids
    spelling = PROMPTS.tokenizer.vocabulary.spell(ids)
    assert spelling is not None
    assert [n for n in range(len(read.data) + 1) if read.splits(n)] == [0, *spelling.ends.tolist()]


def test_splits_of_a_text_are_those_of_its_tokens() -> None:
    read = PROMPTS.read(call(prompt="some words, and 中文 as well"))
    spelling = PROMPTS.tokenizer.vocabulary.spell(PROMPTS.tokenizer.encode(read.data.decode()))
    assert spelling is not None
    assert [n for n in range(len(read.data) + 1) if read.splits(n)] == [0, *spelling.ends.tolist()]


def test_text_is_canonical() -> None:
    assert prompts("qwen").read(call(prompt="cafe\u0301")).data == "caf\u00e9".encode()


def test_what_ends_before_a_medium_ends_a_token_if_an_added_one_follows() -> None:
    content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = call(CallKind.CHAT, messages=[{"role": "user", "content": content}])
    read = prompts(source=PARTS).read(body)
    assert (read.data, read.whole) == (b"<|im_start|>user\nlook", False)
    assert read.splits(len(read.data))
    plain = prompts(source=PARTS.replace("<|endoftext|>", "picture")).read(body)
    assert not plain.splits(len(plain.data))


@pytest.mark.parametrize(
    "unread",
    [
        Call(CallKind.OTHER, "m", body=b"{}"),
        Call(CallKind.CHAT, "m", body=b"{"),
        Call(CallKind.CHAT, "m", body=b"[" * 100_000),
        Call(CallKind.CHAT, "m", body=b"[]"),
        Call(CallKind.CHAT, "m"),
        chat(truncate_prompt_tokens=5),
        chat(kv_transfer_params={"prompt_token_ids": [1]}),
        call(prompt="x", prompt_embeds="AA"),
        call(prompt=""),
        call(prompt=[5, "x"]),
        call(prompt=[True]),
        call(prompt=[10**9]),
        call(prompt=[-1]),
        call(prompt={"a": 1}),
        Call(CallKind.COMPLETION, "m", body=b'{"prompt": "\\ud800"}'),
    ],
)
def test_what_cannot_be_read_is_unreadable(unread: Call) -> None:
    with pytest.raises(Unreadable):
        PROMPTS.read(unread)


def test_a_model_without_a_template_reads_completions_only() -> None:
    without = prompts(source=None)
    assert without.read(call(prompt="x")).whole
    with pytest.raises(Unreadable, match="cannot be rendered"):
        without.read(chat())
