"""One fixed script of requests that makes an engine's prefix cache do all it can do; and how to play it to a server.

Owns the bodies and their order, nothing about what should come of them: the real engine says that, once it has been
played to, and a simulated one is compared with it. Every answer is one token long: it leaves only blocks of the prompt
behind, so that engines whose answers differ can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from real_vllm.tiny_model import NAME, TEXT

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESET = "/reset_prefix_cache"

Body = dict[str, Any]
Steps = Generator["Step", "Answer", None]

LINES = TEXT.splitlines(keepends=True)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{line.strip()} <b>&amp; über 'quotes'</b>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
        },
    }
    for name, line in (("get_weather", LINES[0]), ("find_größe", LINES[1]))
]


@dataclass(frozen=True, slots=True)
class Step:
    """name: what it is there for. body: as JSON."""

    name: str
    path: str
    body: Body


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer to a step."""

    status: int
    body: Any

    @property
    def text(self) -> str:
        choice = self.body["choices"][0]
        return str(choice["message"]["content"] or "" if "message" in choice else choice["text"])

    @property
    def cached(self) -> int | None:
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        return None if cached is None else int(cached)

    @property
    def usage(self) -> Body | None:
        usage: Body | None = self.body.get("usage") if isinstance(self.body, dict) else None
        return usage


def script() -> Steps:
    """All of it, in order, from an empty cache on. Send each answer back in: conversations go on with what was said."""
    yield Step("reset-first", RESET, {})
    yield from _exact_multiples()
    yield from _shared_text()
    yield from _salts()
    yield from _conversation()
    yield from _tools()
    yield from _spellings()
    yield from _several_at_once()
    yield from _ids_of_our_own()
    yield from _evictions()
    yield from _reset()


def play(client: httpx.Client, steps: Steps) -> Iterator[tuple[Step, Answer]]:
    """Play a script to a server, one request at a time."""
    step = next(steps, None)
    while step is not None:
        answer = send(client, step)
        yield step, answer
        try:
            step = steps.send(answer)
        except StopIteration:
            return


def send(client: httpx.Client, step: Step) -> Answer:
    """One request, whatever its status."""
    body = json.dumps(step.body, ensure_ascii=False).encode()
    response = client.post(step.path, content=body, headers={"content-type": "application/json"})
    try:
        return Answer(response.status_code, response.json())
    except ValueError:
        return Answer(response.status_code, response.text)


def ids(start: int, count: int) -> list[int]:
    """Token ids that are none of the special ones; two starts give sequences that differ from the first id on."""
    return [3 + (start * 37 + i * 7) % 1000 for i in range(count)]


def completion(name: str, prompt: object, max_tokens: int = 1, **rest: object) -> Step:
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return Step(name, COMPLETIONS, body | rest)


def chat(name: str, messages: list[Body], max_tokens: int = 1, **rest: object) -> Step:
    body = {"model": NAME, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return Step(name, CHAT, body | rest)


def said(role: str, content: object, **rest: object) -> Body:
    return {"role": role, "content": content, **rest}


def _exact_multiples() -> Steps:
    prompt = ids(1, 300)
    for name, end in (("first", 300), ("again", 300), ("multiple", 288), ("past-it", 289), ("one-block", 32)):
        yield completion(f"ids-{name}", prompt[:end])
    yield completion("ids-multiple-again", prompt[:288])
    yield completion("ids-branch", prompt[:100] + ids(2, 60))
    yield completion("ids-no-block", prompt[:31])


def _shared_text() -> Steps:
    shared = "".join(LINES[:8])
    for line in (10, 12, 10):
        yield completion(f"text-{line}", shared + LINES[line])
    yield completion("text-shifted", " " + shared)


def _salts() -> Steps:
    prompt = "".join(LINES[2:12])
    for name, salt in (("a", "a"), ("a-again", "a"), ("b", "b"), ("none", None), ("none-again", None)):
        yield completion(f"salt-{name}", prompt, cache_salt=salt)


def _conversation() -> Steps:
    messages = [said("system", "".join(LINES[:5])), said("user", LINES[5])]
    for turn in range(5):
        answer = yield chat(f"conversation-{turn}", list(messages))
        messages += [said("assistant", answer.text), said("user", LINES[6 + turn].strip())]
    fork = [*messages[:3], said("user", "No. Say it again.")]
    yield chat("conversation-fork", fork)
    yield chat("conversation-salted", fork, cache_salt="a")


def _tools() -> Steps:
    asked = [said("system", LINES[2]), said("user", "What is the weather in Düsseldorf?")]
    yield chat("tools", asked, tools=TOOLS)
    function = {"name": "get_weather", "arguments": '{"city": "Düsseldorf", "days":2}'}
    called = said("assistant", None, tool_calls=[{"id": "call-1", "type": "function", "function": function}])
    answered = [*asked, called, said("tool", '{"sky": "bedeckt", "t": [3, 7.5]}', tool_call_id="call-1")]
    yield chat("tools-answered", answered, tools=TOOLS)
    yield chat("tools-answered-again", answered, tools=TOOLS)
    yield chat("tools-other", asked, tools=TOOLS[:1])


def _spellings() -> Steps:
    text = "".join(LINES[-9:])
    yield chat("non-ascii", [said("user", text)])
    yield chat("non-ascii-parts", [said("user", [{"type": "text", "text": text}])])
    yield chat("decomposed", [said("user", "e\u0301te\u0301 cafe\u0301 A\u030angstro\u0308m " * 12)])
    yield chat("composed", [said("user", "\u00e9t\u00e9 caf\u00e9 \u00c5ngstr\u00f6m " * 12)])
    yield chat("special-in-text", [said("user", "<|im_end|>\n<|im_start|>assistant\n" * 8 + "  \t\n\n x")])
    yield chat("unfinished", [said("user", text), said("assistant", "So")], **_unfinished())


def _unfinished() -> Body:
    return {"add_generation_prompt": False, "continue_final_message": True}


def _several_at_once() -> Steps:
    shared = "".join(LINES[20:27])
    yield completion("two-prompts", [shared + "one", shared + "two"])
    yield completion("two-answers", shared + "three", n=2, temperature=1.0)


def _ids_of_our_own() -> Steps:
    given = {"prompt_token_ids": ids(3, 200)}
    yield chat("own-ids", [said("user", "ignored")], kv_transfer_params=given)
    yield completion("own-ids-continued", ids(3, 260))


def _evictions() -> Steps:
    for start in range(4, 9):
        yield completion(f"filler-{start}", ids(start, 900))
    yield completion("after-eviction", ids(1, 300))
    yield completion("after-eviction-again", ids(1, 300))


def _reset() -> Steps:
    yield Step("reset", RESET, {})
    yield completion("after-reset", ids(1, 300))
    yield completion("after-reset-again", ids(1, 300))
