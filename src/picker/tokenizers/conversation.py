"""The messages of a chat request as vLLM hands them to a chat template.

Follows vLLM 0.32 (`renderers/chat_utils.py`, `renderers/hf.py` and the request's model): fields it drops are dropped,
content becomes a string or a list of parts as the template wants it, arguments of tool calls become objects. What
vLLM would refuse, or what we do not understand, is `Unreadable`; its message never quotes the request.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

Message = dict[str, Any]

# Stands where the first medium of a request would: a private-use character that no placeholder begins with.
MEDIUM = "\ue0f1\ue0f2medium\ue0f2\ue0f1"

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image_embeds", "image_pil"), "image"),
    **dict.fromkeys(("audio_url", "input_audio", "audio_embeds"), "audio"),
    **dict.fromkeys(("video_url", "video_embeds"), "video"),
}
_BILLING = "x-anthropic-billing-header"


class Unreadable(Exception):  # noqa: N818 - no error: a request that is routed without exact knowledge
    """This request cannot be read as its engine reads it; the message says why, for a counter or a person."""


def conversation(messages: Iterable[object], *, parts: bool) -> tuple[list[Message], bool]:
    """The messages as the template gets them, and whether they hold media.

    parts: the template wants content as a list of parts (vLLM's content format "openai"), not as a string.
    """
    found: list[Message] = []
    media = False
    for message in messages:
        parsed, held = _message(_mapping(message, "a message"), parts)
        found.append(parsed)
        media |= held
    return found, media


def before_media(messages: list[Message]) -> list[Message]:
    """The same conversation up to its first medium, which becomes the text `MEDIUM`; what follows is left out.

    Only for templates that want parts: elsewhere an engine puts all media of a message before its text.
    """
    for place, message in enumerate(messages):
        content = message["content"]
        kinds = [part["type"] for part in content] if isinstance(content, list) else []
        first = next((n for n, kind in enumerate(kinds) if kind in ("image", "audio", "video")), None)
        if first is not None:
            cut = [*content[:first], {"type": "text", "text": MEDIUM}]
            return [*messages[:place], {**message, "content": cut}, *messages[place + 1 :]]
    return messages


def without_developers(messages: list[Message]) -> list[Message]:
    """For templates that know no developer: such messages become system messages, and all of these one at the front."""
    renamed = [_as_system(message) if message["role"] == "developer" else message for message in messages]
    systems = [place for place, message in enumerate(renamed) if message["role"] == "system"]
    if systems in ([], [0]):
        return renamed
    texts = [text for place in systems if (text := _plain(renamed[place]["content"]))]
    rest = [message for message in renamed if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def tools_of(tools: object, choice: object, *, exclude_when_none: bool = False) -> list[Message] | None:
    """Tools as the template gets them: known fields in a fixed order. None: the template is told of no tools."""
    if tools is None or (choice == "none" and exclude_when_none):
        return None
    if not isinstance(tools, list) or not tools:
        raise Unreadable("tools are not a list of at least one")
    return [_tool(_mapping(tool, "a tool")) for tool in tools]


# --- one message -------------------------------------------------------------------------------------------


def _message(message: Mapping[str, Any], parts: bool) -> tuple[Message, bool]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise Unreadable("a message without a role")
    parsed: Message = {"role": role, "content": content}
    media = False
    if role == "system" or parts or not isinstance(content, str):
        parsed["content"], media = _content(content, parts, system=role == "system")
    if role == "assistant":
        _add_assistant(parsed, message)
    elif role == "tool":
        _add_tool(parsed, message)
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            parsed[name] = message[name]
    if role == "developer":
        parsed["tools"] = message.get("tools")
    return parsed, media


def _content(content: object, parts: bool, *, system: bool) -> tuple[list[Message] | str, bool]:
    """Content as the template gets it, and whether it holds media."""
    if content is None:
        content = []
    elif isinstance(content, str):
        content = [content]
    elif not isinstance(content, list):
        raise Unreadable("content is neither text nor a list")
    if system:
        content = list(_without_billing(content))
    read = [part for each in content if (part := _part(each)) is not None]
    media = any(part["type"] in ("image", "audio", "video") for part in read)
    return (read if parts else _joined(read)), media


def _joined(parts: list[Message]) -> str:
    """Content as one string: texts by line. An engine puts what stands for media before the texts."""
    if any(part["type"] in ("image", "audio", "video") for part in parts):
        return MEDIUM
    return "\n".join(part["name"] if part["type"] == "tool_reference" else part["text"] for part in parts)


def _part(part: object) -> Message | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    fields = _mapping(part, "a part of content")
    kind = fields.get("type")
    if isinstance(kind, str) and (field := _TEXTS.get(kind)) is not None and fields.get("uuid") is None:
        text = fields.get(field)
        if text is None and kind in ("text", "refusal"):
            return None
        if not isinstance(text, str):
            raise Unreadable("a part of content whose text is no text")
        return {"type": "text", "text": text}
    if kind == "tool_reference" and isinstance(fields.get("name"), str):
        return {"type": "tool_reference", "name": fields["name"]}
    if isinstance(kind, str) and (medium := _MEDIA.get(kind)) is not None:
        return {"type": medium}
    named = next((medium for name, medium in _MEDIA.items() if kind is None and name in fields), None)
    if named is None:
        raise Unreadable("a part of content of a kind we do not know")
    return {"type": named}


def _without_billing(content: Iterable[object]) -> Iterable[object]:
    """A coding agent's system prompt may begin with a line that changes with every request; vLLM cuts it off."""
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not (isinstance(text, str) and text.startswith(_BILLING)):
            yield part
        elif rest := text.partition("\n")[2]:
            yield {"type": "text", "text": rest}


def _add_assistant(parsed: Message, message: Mapping[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise Unreadable("tool_calls are not a list")
        if calls:
            parsed["tool_calls"] = [_call(_mapping(call, "a tool call")) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise Unreadable("reasoning is no text")
        parsed["reasoning"] = parsed["reasoning_content"] = reasoning


def _add_tool(parsed: Message, message: Mapping[str, Any]) -> None:
    if "tool_call_id" in message:
        parsed["tool_call_id"] = message["tool_call_id"]
    content = parsed["content"]
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        parsed["content"] = "\n".join(part["text"] for part in content)


def _call(call: Mapping[str, Any]) -> Message:
    """Fields in the order in which vLLM's model of a request lists them, because a template may print the whole."""
    function = _mapping(call.get("function"), "the function of a tool call")
    name, arguments = function.get("name"), function.get("arguments")
    if call.get("type") != "function" or not isinstance(name, str) or not isinstance(arguments, str):
        raise Unreadable("a tool call that is no call of a function")
    return {"id": call.get("id"), "function": {"arguments": _arguments(arguments), "name": name}, "type": "function"}


def _arguments(text: str) -> Message:
    """An object, whatever the model once wrote: a conversation that contains nonsense must go on."""
    if not text:
        return {}
    try:
        # Not msgspec: Python's reader takes NaN and keeps what vLLM keeps.
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _tool(tool: Mapping[str, Any]) -> Message:
    function = _mapping(tool.get("function"), "the function of a tool")
    if not isinstance(function.get("name"), str):
        raise Unreadable("a tool without a name")
    deferred = tool.get("defer_loading")
    described = {name: function.get(name) for name in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        described["strict"] = function["strict"]
    if (inner := function.get("defer_loading", deferred)) is not None:
        described["defer_loading"] = inner
    found: Message = {"type": "function", "function": described}
    if deferred is not None:
        found["defer_loading"] = deferred
    return found


def _as_system(message: Message) -> Message:
    return {**{name: value for name, value in message.items() if name != "tools"}, "role": "system"}


def _plain(content: object) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if "text" in part)
    return content if isinstance(content, str) else ""


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable(f"{what} is not an object")
    return value
