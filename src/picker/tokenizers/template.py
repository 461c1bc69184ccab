"""A model's chat template: the text that its engine tokenises, from the body of a chat request.

Renders as vLLM 0.32 does through transformers 5 (`render_jinja_template`). A template that the request itself brings is
never run: such a request is `Unreadable`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from picker.errors import ConfigError
from picker.tokenizers.conversation import (
    MEDIUM,
    Message,
    Unreadable,
    before_media,
    conversation,
    tools_of,
    without_developers,
)
from picker.tokenizers.libraries import library

if TYPE_CHECKING:
    import jinja2

    from picker.tokenizers.sandbox import Limits

Body = Mapping[str, Any]

_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own mark
_UNSET = (None, "auto")
# Parameters of transformers' `apply_chat_template`, which never reach a template from `chat_template_kwargs`.
_NOT_FOR_TEMPLATES = frozenset(
    (
        *(
            "conversation",
            "messages",
            "chat_template",
            "tokenize",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
        ),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text, and whether it is all of it: False where it ends before the first medium.

    after: the beginning of what follows a text that is not whole, enough to see which token stands for the medium.
    """

    text: str = field(repr=False)
    whole: bool = True
    after: str = field(default="", repr=False)


class ChatTemplate:
    """The templates of one model and how its engine was told to use them.

    sources: by name; "default", and "tool_use" where tools have a template of their own. special_tokens: `bos_token`
    and its like, as templates see them. defaults: the engine's `--default-chat-template-kwargs`. content_format: its
    `--chat-template-content-format`. exclude_tools: its `--exclude-tools-when-tool-choice-none`. Raises ConfigError for
    a template that does not parse.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        seconds: Callable[[], float],
        today: Callable[[], datetime],
        defaults: Body | None = None,
        content_format: str = "auto",
        exclude_tools: bool = False,
        limits: Limits | None = None,
    ) -> None:
        library("jinja2")
        if "default" not in sources:
            raise ConfigError("the model has chat templates, but none that is the default")
        self._special_tokens, self._defaults, self._exclude_tools = dict(special_tokens), defaults or {}, exclude_tools
        self._programs = _programs(sources, content_format, limits, seconds, today)

    @property
    def dated(self) -> bool:
        """Whether what is rendered may depend on the engine's clock and time zone."""
        return any("strftime_now" in program.source for program in self._programs.values())

    def render(self, body: Body) -> Rendered:
        """What the engine tokenises for this body of a chat request. Raises Unreadable."""
        variables = self._variables(body)
        tools = variables.pop("tools", None)
        program = self._programs["tool_use" if tools is not None and "tool_use" in self._programs else "default"]
        messages, media = self._messages(body, program)
        given = {name: value for name, value in variables.items() if name in program.accepted}
        given = {**self._special_tokens, "documents": None, "add_generation_prompt": False, **given, "tools": tools}
        open_end = bool(given.pop("continue_final_message", False))
        if open_end and given["add_generation_prompt"]:
            raise Unreadable("a final message cannot be continued and followed by a prompt for another")
        if media:
            return _until_medium(program, messages, given)
        return Rendered(_continued(program, messages, given) if open_end else program.run(messages, given))

    def _variables(self, body: Body) -> dict[str, Any]:
        if body.get("chat_template") is not None:
            raise Unreadable("the request brings its own chat template")
        own = body.get("chat_template_kwargs") or {}
        if not isinstance(own, dict) or not _NOT_FOR_TEMPLATES.isdisjoint(own):
            raise Unreadable("chat_template_kwargs that no template takes")
        effort = body.get("reasoning_effort")
        asked: dict[str, Any] = {
            "add_generation_prompt": body.get("add_generation_prompt", True),
            "continue_final_message": body.get("continue_final_message", False),
            "documents": body.get("documents"),
            "reasoning_effort": effort,
        }
        if effort is not None and "enable_thinking" not in own:
            asked["enable_thinking"] = effort != "none"
        choice = body.get("tool_choice")
        tools = tools_of(body.get("tools"), choice, exclude_when_none=self._exclude_tools)
        return {**_set(self._defaults), **_set({"tools": tools}), **_set({**own, **_set(asked)})}

    def _messages(self, body: Body, program: _Program) -> tuple[list[Message], bool]:
        sent = body.get("messages")
        if not isinstance(sent, list) or not sent:
            raise Unreadable("no messages")
        messages, media = conversation(sent, parts=program.parts)
        developer = any(message["role"] == "developer" for message in messages)
        if developer and '"developer"' not in program.source and "'developer'" not in program.source:
            messages = without_developers(messages)
        return messages, media


class _Program:
    """One template, compiled."""

    def __init__(self, source: str, template: jinja2.Template, *, parts: bool, accepted: frozenset[str]) -> None:
        self.source, self.parts, self.accepted, self._template = source, parts, accepted, template

    def run(self, messages: list[Message], given: Body) -> str:
        import jinja2

        sandbox: Any = self._template.environment
        try:
            return str(sandbox.rendered(self._template, {**given, "messages": messages}))
        except jinja2.TemplateError as error:
            raise Unreadable(f"the chat template stopped: {type(error).__name__}") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Unreadable(f"the chat template failed: {type(error).__name__}") from None


def _programs(
    sources: Mapping[str, str],
    content_format: str,
    limits: Limits | None,
    seconds: Callable[[], float],
    today: Callable[[], datetime],
) -> dict[str, _Program]:
    import jinja2

    from picker.tokenizers.content_format import wants_parts
    from picker.tokenizers.sandbox import Limits, Sandbox, undeclared

    sandbox = Sandbox(limits or Limits(), seconds=seconds, today=today)
    programs = {}
    for name, source in sources.items():
        try:
            tree, template = sandbox.parse(source), sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template {name!r} does not parse: line {error.lineno}") from None
        parts = wants_parts(tree) if content_format == "auto" else content_format == "openai"
        accepted = {*undeclared(tree), "documents", "add_generation_prompt", "continue_final_message"}
        programs[name] = _Program(source, template, parts=parts, accepted=frozenset(accepted))
    return programs


def _set(values: Body) -> dict[str, Any]:
    """What vLLM takes for given: neither null nor "auto"."""
    return {name: value for name, value in values.items() if not (value is None or value == "auto")}


def _continued(program: _Program, messages: list[Message], given: Body) -> str:
    """The text up to the end of the last message, which the engine goes on with; as transformers finds that end."""
    last = messages[-1]
    content = last["content"]
    if isinstance(content, list):
        place = max((n for n, part in enumerate(content) if "text" in part), default=None)
        if place is None:
            raise Unreadable("the final message has no text to continue")
        ending = content[place]["text"]
        marked: object = [*content[:place], {**content[place], "text": ending + _OPEN_END}, *content[place + 1 :]]
    else:
        ending, marked = content, content + _OPEN_END
    text = program.run([*messages[:-1], {**last, "content": marked}], given)
    end = text.rfind(_OPEN_END.strip())
    if end < 0 or ending.strip() not in text:
        raise Unreadable("the chat template does not end with the final message")
    return text[:end] if text.startswith(_OPEN_END, end) else text[:end].rstrip()


def _until_medium(program: _Program, messages: list[Message], given: Body) -> Rendered:
    """The text before the first medium: what a rendering with it and one with a mark in its place have in common."""
    given = {name: value for name, value in given.items() if name != "continue_final_message"}
    cut = program.run(before_media(messages), given)
    before = cut[: cut.index(MEDIUM)] if MEDIUM in cut else cut
    if not program.parts:
        return Rendered(before, whole=False)
    full = program.run(messages, given)
    end = _common(before, full)
    return Rendered(before[:end], whole=False, after=full[end : end + 256])


def _common(one: str, other: str) -> int:
    """Length of the common beginning, by halving."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
