"""Chat requests as text: what vLLM and transformers make of them, and an end to what a template may cost."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from picker.errors import ConfigError
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.sandbox import Limits
from picker.tokenizers.template import ChatTemplate
from tiny_tokenizers import CHAT_TEMPLATE

USER = {"role": "user", "content": "hi"}
CALL = {
    "id": "c1",
    "type": "function",
    "index": 0,
    "function": {"name": "f", "arguments": '{"city": "Zürich", "n": 1}'},
}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"b": 1, "a": [2]}, "other": 1}}
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
PROMPT = "<|im_start|>assistant\n"
ECHO = "{{ messages | tojson }}|{{ tools | tojson }}"
PARTS = (
    "{% for message in messages %}[{{ message.role }}:{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}]{% endfor %}"
)


def template(source: str = CHAT_TEMPLATE, **settings: Any) -> ChatTemplate:
    settings.setdefault("special_tokens", {"bos_token": "<s>"})
    settings.setdefault("sources", {"default": source})
    return ChatTemplate(seconds=lambda: 0.0, today=lambda: datetime(2026, 7, 4, 12), **settings)


def text(source: str = CHAT_TEMPLATE, *messages: object, **body: object) -> str:
    return template(source).render({"messages": list(messages) or [USER], **body}).text


# --- what a request says -----------------------------------------------------------------------------------


def test_messages_are_rendered_with_a_prompt_for_the_answer() -> None:
    assert text() == TURN.format("user", "hi") + PROMPT
    assert text(add_generation_prompt=False) == TURN.format("user", "hi")
    assert text(chat_template_kwargs={"add_generation_prompt": False}).endswith(PROMPT)  # the field wins


def test_a_tool_is_told_with_its_known_fields_in_their_order() -> None:
    told = '{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": [2]}, '
    assert told + '"strict": true}}' in text(tools=[TOOL])


def test_tools_are_told_even_if_none_may_be_called_unless_the_engine_leaves_them_out() -> None:
    body = {"messages": [USER], "tools": [TOOL], "tool_choice": "none"}
    assert "# Tools" in template().render(body).text
    assert "# Tools" not in template(exclude_tools=True).render(body).text


@pytest.mark.parametrize(
    ("arguments", "object_"),
    [
        ('{"a": 1.50}', '{"a": 1.5}'),
        ("", "{}"),
        ("no json", "{}"),
        ("[1]", "{}"),
        ('{"b": {"ü": null}}', '{"b": {"ü": null}}'),
    ],
)
def test_arguments_of_tool_calls_become_objects(arguments: str, object_: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    assert f'"arguments": {object_}}}' in text(CHAT_TEMPLATE, USER, {"role": "assistant", "tool_calls": [call]})


def test_a_tool_call_is_seen_in_the_order_of_vllms_model() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    seen = '[{"id": "c1", "function": {"arguments": {"city": "Zürich", "n": 1}, "name": "f"}, "type": "function"}]'
    assert text(ECHO, message) == f'[{{"role": "assistant", "content": "", "tool_calls": {seen}}}]|null'


def test_fields_that_vllm_drops_are_dropped() -> None:
    odd = {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": 1}], "name": "bob", "foo": 1}
    assert text(ECHO, odd) == '[{"role": "user", "content": "a", "name": "bob"}]|null'
    assert text(ECHO, {"role": "assistant", "content": "x", "tool_calls": []}) == (
        '[{"role": "assistant", "content": "x"}]|null'
    )


def test_reasoning_has_two_names() -> None:
    for name in ("reasoning", "reasoning_content"):
        seen = text(ECHO, {"role": "assistant", "content": "x", name: "because"})
        assert '"reasoning": "because", "reasoning_content": "because"' in seen


def test_content_is_lines_for_one_template_and_parts_for_another() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]}
    assert text("{{ messages[0].content }}", message) == "a\nb\nc"
    assert text(PARTS, message) == "[user:abc]"
    assert text(PARTS, USER) == "[user:hi]"


def test_an_operator_may_force_the_content_format() -> None:
    forced = template("{{ messages | tojson }}", content_format="openai")
    assert forced.render({"messages": [USER]}).text == '[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]'


def test_the_content_of_a_tool_message_is_text_in_either_format() -> None:
    message = {
        "role": "tool",
        "tool_call_id": "c",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    for content_format in ("string", "openai"):
        seen = template(ECHO, content_format=content_format).render({"messages": [message]}).text
        assert '"content": "a\\nb"' in seen


def test_developers_are_systems_where_the_template_knows_none() -> None:
    system, developer = {"role": "system", "content": "s"}, {"role": "developer", "content": "d", "tools": [1]}
    assert text(ECHO, system, USER, developer) == (
        '[{"role": "system", "content": "s\\n\\nd"}, {"role": "user", "content": "hi"}]|null'
    )
    assert text(ECHO, developer, USER).startswith('[{"role": "system", "content": "d"}, ')
    assert '"developer"' in text(ECHO + "{# 'developer' #}", developer)


def test_a_coding_agents_billing_line_is_cut_off() -> None:
    line = "x-anthropic-billing-header: cch=5"
    assert text("{{ messages[0].content }}", {"role": "system", "content": line + "\nreal"}) == "real"
    assert text("{{ messages[0].content }}", {"role": "user", "content": line + "\nreal"}) == line + "\nreal"


def test_arguments_for_the_template_reach_it_if_it_takes_them() -> None:
    source = "{{ bos_token }}{{ style }}{{ enable_thinking }}{{ reasoning_effort }}"
    assert text(source, chat_template_kwargs={"style": "x", "unused": 1}) == "<s>x"
    assert text(source, reasoning_effort="high") == "<s>Truehigh"
    assert text(source, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}) == "<s>Truenone"
    assert text(source, chat_template_kwargs={"style": None, "bos_token": "B"}) == "B"
    assert template(source, defaults={"style": "d"}).render({"messages": [USER]}).text == "<s>d"


def test_documents_are_told() -> None:
    assert text("{{ documents[0].text }}", documents=[{"text": "t"}]) == "t"
    assert text("{{ documents is none }}") == "True"


def test_a_final_message_is_left_open() -> None:
    answer = {"role": "assistant", "content": "I think"}
    open_end = {"continue_final_message": True, "add_generation_prompt": False}
    assert text(CHAT_TEMPLATE, USER, answer, **open_end).endswith(PROMPT + "I think")
    assert text(PARTS, USER, {**answer, "content": [{"type": "text", "text": "I think "}]}, **open_end).endswith(
        "I think "
    )
    trimmed = "{{ messages[-1].content | trim }}|end"
    assert text(trimmed, USER, {**answer, "content": "I think "}, **open_end) == "I think"


def test_a_template_of_its_own_is_used_where_tools_are_given() -> None:
    named = template(sources={"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert named.render({"messages": [USER]}).text == "plain"
    assert named.render({"messages": [USER], "tools": [TOOL]}).text == "1 tools"


def test_a_template_may_ask_for_the_date() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert text(source) == "04 Jul 2026"
    assert template(source).dated
    assert not template().dated


def test_generation_marks_and_loop_controls_are_understood() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert text(source, USER, USER) == "hi"


# --- media -------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def test_a_reading_ends_before_the_first_medium() -> None:
    content = [{"type": "text", "text": "look: "}, IMAGE, {"type": "text", "text": "what?"}]
    found = template(PARTS).render({"messages": [USER, {"role": "user", "content": content}, USER]})
    assert found.text == "[user:hi][user:look: "
    assert not found.whole
    assert found.after.startswith("<image>what?")


def test_media_of_a_message_stand_before_its_text_where_content_is_a_string() -> None:
    found = template().render({"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]})
    assert found.text == TURN.format("user", "hi") + "<|im_start|>user\n"
    assert not found.whole


def test_a_template_that_begins_otherwise_because_of_a_medium_is_read_up_to_there() -> None:
    source = "start {{ 'with' if messages[0].content[1].type == 'image' else 'none' }} " + PARTS
    found = template(source).render({"messages": [{"role": "user", "content": ["a", IMAGE]}]})
    assert (found.text, found.whole) == ("start ", False)


# --- what is not read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template": "x"},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": [1]},
        {"messages": []},
        {"messages": ["x"]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "thinking"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]},
        {"messages": [{"role": "assistant", "reasoning": 5}]},
        {"tools": []},
        {"tools": [{"type": "function"}]},
        {"continue_final_message": True},
    ],
)
def test_what_the_engine_refuses_or_we_do_not_follow_is_unreadable(body: dict[str, object]) -> None:
    with pytest.raises(Unreadable) as why:
        template().render({"messages": [USER], **body})
    assert "hi" not in str(why.value).split()


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('secret') }}", "{{ messages[5].x.y }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"]
)
def test_a_template_that_fails_makes_a_request_unreadable_without_quoting_it(source: str) -> None:
    with pytest.raises(Unreadable) as why:
        text(source)
    assert "secret" not in str(why.value)


def test_a_template_that_does_not_parse_is_a_fault_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        template("\n{% if %}")
    with pytest.raises(ConfigError, match="none that is the default"):
        template(sources={"tool_use": "x"})


# --- limits ------------------------------------------------------------------------------------------------

SMALL = Limits(steps=20_000, seconds=1.0, size=10_000)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% set a = 'xxxxxxxxxx' %}" + "{% set a = a ~ a %}" * 60 + "{{ a }}",
        "{% set a = 'xxxxxxxxxx' %}" + "{% set a = a + a %}" * 60 + "{{ a }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 2 ** 64 ** 60 ** 60 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ messages | batch(10 ** 9, 'x') | list }}",
        "{{ ('a' * 9000).replace('a', 'b' * 9000) }}",
        "{{ ('a' * 9000) | replace('a', 'b' * 9000) }}",
        "{{ ('x' * 9000).join(['a'] * 9000) }}",
        "{% for i in range(5000) %}xxxx{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
    ],
)
def test_a_template_cannot_take_what_it_likes(source: str) -> None:
    with pytest.raises(Unreadable):
        template(source, limits=SMALL).render({"messages": [USER]})


def test_a_template_cannot_take_longer_than_it_may() -> None:
    passing = iter(range(10_000))
    slow = ChatTemplate(
        {"default": "{% for i in range(9999) %}{% endfor %}"},
        special_tokens={},
        seconds=lambda: float(next(passing)),
        today=datetime.now,
        limits=Limits(steps=10**9, seconds=3.0),
    )
    with pytest.raises(Unreadable, match="TooCostly"):
        slow.render({"messages": [USER]})
    assert next(passing) < 10
