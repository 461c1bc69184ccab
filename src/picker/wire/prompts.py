r"""What a prompt is to prefix matching: one run of bytes that grows only at its end as a conversation grows.

The canonical prompt is not what the engine tokenises; it is a stand-in with the same prefixes. Two calls share a prefix
of it exactly as far as their options, tools and messages agree. Structure is marked with the bytes 0xFE and 0xFF, which
no UTF-8 text contains, so no text can imitate it; nothing is closed at the end, so a later turn extends an earlier.

    chat   = [FE o (FF tag raw)*] [FE t raw-tools] message* [FE tail]
    message = FE m role field*          field = FF tag bytes
    text   = the text, without marks    token ids = little-endian uint32, four bytes a token

Media become a digest: megabytes of base64 are hashed once and not carried. Random ids of tool calls are left out. This
file decides nothing about errors: a shape nobody serves raises `msgspec.ValidationError`, text that is not UTF-8
`UnicodeDecodeError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
from msgspec import Raw

_ABSENT = frozenset((b"", b"null", b"false", b"[]", b"{}"))
_MEDIA_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """data: the leading prompt. tokens: its exact length when it came as token ids. extra_bytes: further prompts."""

    data: bytes = field(default=b"", repr=False)
    tokens: int | None = None
    extra_bytes: int = 0


# --- what clients send -------------------------------------------------------------------------------------


class Part(msgspec.Struct, gc=False):
    """One element of a content list, in the dialects of Chat Completions, Responses, Anthropic and vLLM's own."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    uuid: str | None = None
    name: str | None = None
    image_url: Raw = Raw()
    image_embeds: Raw = Raw()
    image_pil: Raw = Raw()
    audio_url: Raw = Raw()
    input_audio: Raw = Raw()
    audio_embeds: Raw = Raw()
    video_url: Raw = Raw()
    video_embeds: Raw = Raw()
    source: Raw = Raw()
    data: Raw = Raw()
    file: Raw = Raw()
    file_id: Raw = Raw()
    file_data: Raw = Raw()
    input: Raw = Raw()
    content: Raw = Raw()


Content = str | list[str | Part] | None


class Item(msgspec.Struct, kw_only=True, gc=False):
    """A message, or an item of a Responses `input` (which may lack a role)."""

    role: str = ""
    type: str = ""
    content: Content = None
    name: str | None = None
    tool_call_id: str | None = None
    call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Raw = Raw()
    tools: Raw = Raw()
    arguments: Raw = Raw()
    output: Raw = Raw()
    summary: Raw = Raw()


class Message(Item, kw_only=True, gc=False):
    """A message of Chat Completions: the role is required."""

    role: str


class Options(msgspec.Struct, kw_only=True):
    """Fields beside the messages that change the rendered prompt. The first six may change its very beginning."""

    chat_template: Raw = Raw()
    chat_template_kwargs: Raw = Raw()
    documents: Raw = Raw()
    reasoning_effort: Raw = Raw()
    mm_processor_kwargs: Raw = Raw()
    add_special_tokens: Raw = Raw()
    tools: Raw = Raw()
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class _Function(msgspec.Struct):
    name: str = ""
    arguments: Raw = Raw()


class _ToolCall(msgspec.Struct):
    """The random `id` is not read: it is no part of what a template renders for most models."""

    function: _Function | None = None
    custom: Raw = Raw()


_tool_calls = msgspec.json.Decoder(list[_ToolCall])
_content = msgspec.json.Decoder(Content)


# --- canonical bytes ---------------------------------------------------------------------------------------


def chat_prompt(options: Options, messages: Iterable[Item]) -> bytes:
    """Canonical bytes of a conversation, in a chat template's order: options, tools, messages.

    A string and a list of one text part with that string give the same bytes, as engines render them alike. The two
    switches that only change how the rendered prompt ends are marked at the end: elsewhere they would hide a
    prefix that the engine does share.
    """
    out: list[bytes] = []
    _add_options(out, options)
    if options.tools and (tools := bytes(options.tools)) not in _ABSENT:
        out += (b"\xfet", _utf8(tools))
    for message in messages:
        _add_message(out, message)
    if options.continue_final_message:
        out.append(b"\xfec")
    elif options.add_generation_prompt is False:
        out.append(b"\xfeg")
    return b"".join(out)


def text_prompt(prompt: str | Sequence[object]) -> Prompt:
    """A completion's or embedding's prompt: text, texts, token ids or lists of token ids; the first one leads.

    Text carries no marks, and ids are packed without any, so that either can be read back from the bytes.
    """
    if isinstance(prompt, str):
        return Prompt(prompt.encode())
    if not prompt or isinstance(prompt[0], int):
        return Prompt(_packed(prompt), len(prompt))
    if isinstance(prompt[0], str):
        texts = [text.encode() for text in prompt if isinstance(text, str)]
        _expect_all(len(texts) == len(prompt))
        return Prompt(texts[0], extra_bytes=sum(map(len, texts)) - len(texts[0]))
    lists = [ids for ids in prompt if isinstance(ids, list)]
    _expect_all(len(lists) == len(prompt))
    return Prompt(_packed(lists[0]), len(lists[0]), extra_bytes=4 * sum(map(len, lists[1:])))


def _packed(ids: Sequence[object]) -> bytes:
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        # The error of `struct` may quote the value.
        raise msgspec.ValidationError("Expected token ids from 0 to 4294967295 - at `$.prompt`") from None


def _expect_all(alike: bool) -> None:
    if not alike:
        raise msgspec.ValidationError("Expected all texts, all token ids or all lists of token ids - at `$.prompt`")


def _add_options(out: list[bytes], options: Options) -> None:
    fronts = (
        (b"\xffj", options.chat_template),
        (b"\xffk", options.chat_template_kwargs),
        (b"\xffd", options.documents),
        (b"\xffe", options.reasoning_effort),
        (b"\xffp", options.mm_processor_kwargs),
        (b"\xffs", options.add_special_tokens),
    )
    present = [(tag, data) for tag, raw in fronts if raw and (data := bytes(raw)) not in _ABSENT]
    if present:
        out.append(b"\xfeo")
    for tag, data in present:
        out += (tag, _utf8(data))


def _add_message(out: list[bytes], message: Item) -> None:
    out += (b"\xfem", message.role.encode())
    if message.name is not None:
        out += (b"\xffn", message.name.encode())
    if (call_id := message.tool_call_id or message.call_id) is not None:
        out += (b"\xffi", call_id.encode())
    if (reasoning := message.reasoning or message.reasoning_content) is not None:
        out += (b"\xffr", reasoning.encode())
    _add_content(out, message.content)
    if message.tool_calls:
        _add_tool_calls(out, message.tool_calls)
    if message.arguments or message.output or message.tools or message.summary:
        _add_item(out, message)


def _add_item(out: list[bytes], message: Item) -> None:
    """What items of a Responses `input` have beside a message."""
    for tag, raw in (
        (b"\xffa", message.arguments),
        (b"\xffu", message.output),
        (b"\xfft", message.tools),
        (b"\xffy", message.summary),
    ):
        if raw and (data := bytes(raw)) not in _ABSENT:
            out += (tag, _utf8(data))


def _add_content(out: list[bytes], content: Content) -> None:
    if isinstance(content, str):
        out += (b"\xffx", content.encode())
    elif content:
        for part in content:
            if isinstance(part, str):
                out += (b"\xffx", part.encode())
            else:
                _add_part(out, part)


def _add_part(out: list[bytes], part: Part) -> None:
    text = part.text if part.text is not None else part.refusal if part.refusal is not None else part.thinking
    if text is not None:
        out += (b"\xffx", text.encode())
    elif (medium := _medium(part)) is not None:
        out += (b"\xffm", medium)
    elif part.type == "tool_result":
        _add_result(out, part.content)
    else:  # tool_use, tool_reference, and whatever comes next: by type and name
        out += (b"\xffo", part.type.encode(), b"\xffn", (part.name or "").encode())
        if part.input:
            out += (b"\xffa", _utf8(bytes(part.input)))


def _add_result(out: list[bytes], raw: Raw) -> None:
    out.append(b"\xffq")
    if raw:
        _add_content(out, _content.decode(raw))
    out.append(b"\xffz")  # a list within a list: without an end, the parts after it would seem to belong to it


def _medium(part: Part) -> bytes | None:
    """A digest that stands for an image, a sound, a film or a file: of its uuid when it has one, else of its data."""
    digest = blake2b(digest_size=_MEDIA_DIGEST_BYTES)
    if part.uuid is not None:
        # vLLM takes the client's uuid for the identity of the item and then may get no data at all.
        digest.update(b"uuid" + part.uuid.encode())
        return digest.hexdigest().encode()
    found = False
    for raw in _media(part):
        if raw:
            found = True
            digest.update(memoryview(raw))
    return digest.hexdigest().encode() if found else None


def _media(part: Part) -> tuple[Raw, ...]:
    images = (part.image_url, part.image_embeds, part.image_pil)
    films = (part.audio_url, part.input_audio, part.audio_embeds, part.video_url, part.video_embeds)
    return (*images, *films, part.source, part.data, part.file, part.file_id, part.file_data)


def _add_tool_calls(out: list[bytes], raw: Raw) -> None:
    data = bytes(raw)
    if data in _ABSENT:
        return
    try:
        calls = _tool_calls.decode(data)
    except msgspec.ValidationError:
        out += (b"\xffw", _utf8(data))  # a dialect of its own: the engine judges it
        return
    for call in calls:
        if call.function is not None:
            out += (b"\xffc", call.function.name.encode(), b"\xffa", _utf8(bytes(call.function.arguments)))
        else:
            out += (b"\xffw", _utf8(bytes(call.custom)))


def _utf8(data: bytes) -> bytes:
    """Raw JSON as it came; raises UnicodeDecodeError where it is not UTF-8, because then it could imitate the marks."""
    if not data.isascii():
        data.decode()
    return data
