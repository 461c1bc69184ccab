"""A mixed workload of a few hundred requests, the same every time but for what the model answers.

Owns what is asked and in which order: conversations that grow, with tools, salts, an adapter and several scripts; texts
and token ids that share beginnings; and prompts that have no other purpose than to need room. One request at a time:
what an engine will have cached is a fact then, and a prediction right or wrong. Sampling has no `seed`: a seeded prompt
longer than one step's budget ends vLLM 0.32.0 on a CPU ("CPU Generator does not use offset").
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from real_vllm.script import LINES, TOOLS, Answer, Body, Step, Steps, chat, completion, ids, said
from real_vllm.tiny_model import ADAPTER

_SYSTEMS = ("".join(LINES[:6]), "".join(LINES[4:18]), LINES[2], "".join(LINES[-8:]))
_OPEN = 6  # sessions that go on at the same time
_LONGEST = 10


def workload(seed: int, count: int) -> Steps:
    """`count` requests of interleaved sessions. Send each answer back in."""
    rng = random.Random(seed)
    fresh = _sessions(rng)
    open_sessions = [next(fresh) for _ in range(_OPEN)]
    waiting: list[Step | None] = [next(session, None) for session in open_sessions]
    for _ in range(count):
        at = rng.randrange(_OPEN)
        while (step := waiting[at]) is None:
            open_sessions[at] = next(fresh)
            waiting[at] = next(open_sessions[at], None)
        answer = yield step
        try:
            waiting[at] = open_sessions[at].send(answer)
        except StopIteration:
            waiting[at] = None


def _sessions(rng: random.Random) -> Iterator[Steps]:
    """Sessions without end; the kinds take turns in a shuffled order, so that a short run has them all."""
    kinds = [_talk, _talk, _talk_with_tools, _salted_talk, _adapted_talk, _documents, _token_ids, _filler, _parts]
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            yield kind(random.Random(rng.random()))


def _talk(rng: random.Random, name: str = "talk", **rest: object) -> Steps:
    """A conversation on one of a few system prompts; answers are sampled, so that they are spelt unlike any text."""
    messages = [said("system", rng.choice(_SYSTEMS)), said("user", _sentence(rng))]
    for _ in range(rng.randint(3, _LONGEST)):
        answer = yield chat(name, list(messages), rng.randint(8, 48), temperature=1.0, **rest)
        messages += [said("assistant", _text(answer)), said("user", _sentence(rng))]


def _salted_talk(rng: random.Random) -> Steps:
    yield from _talk(rng, "salted", cache_salt=rng.choice("ab"))


def _adapted_talk(rng: random.Random) -> Steps:
    """With a LoRA adapter, whose blocks are nobody else's."""
    yield from _talk(rng, "adapter", model=ADAPTER)


def _talk_with_tools(rng: random.Random) -> Steps:
    """A conversation in which the assistant has called functions."""
    tools = TOOLS[: rng.randint(1, 2)]
    messages = [said("system", rng.choice(_SYSTEMS[:3])), said("user", _sentence(rng))]
    for turn in range(rng.randint(2, 6)):
        answer = yield chat("tools", list(messages), rng.randint(8, 32), tools=tools, temperature=1.0)
        messages += [said("assistant", _text(answer)), said("user", _sentence(rng))]
        messages += _called(rng, f"call-{turn}")


def _called(rng: random.Random, call: str) -> list[Body]:
    function = {"name": "get_weather", "arguments": f'{{"city": "Zürich","days": {rng.randint(1, 9)}}}'}
    asked = said("assistant", None, tool_calls=[{"id": call, "type": "function", "function": function}])
    return [asked, said("tool", _sentence(rng), tool_call_id=call)]


def _documents(rng: random.Random) -> Steps:
    """Several questions about one text, as plain completions."""
    start = rng.randrange(12)
    text = "".join(LINES[start : start + 12])
    for _ in range(rng.randint(2, 5)):
        yield completion("document", text + _sentence(rng), rng.randint(1, 24))


def _token_ids(rng: random.Random) -> Steps:
    """Prompts of token ids that part from each other anywhere."""
    prompt = ids(rng.randrange(20), rng.randint(100, 500))
    for _ in range(rng.randint(2, 4)):
        at = rng.randint(20, len(prompt))
        yield completion("ids", prompt[:at] + ids(rng.randrange(20, 900), rng.randint(0, 60)), rng.randint(1, 16))


def _filler(rng: random.Random) -> Steps:
    """One prompt that needs room."""
    yield completion("filler", ids(rng.randrange(1000), rng.randint(600, 1200)))


def _parts(rng: random.Random) -> Steps:
    """A conversation in content parts, asked again and again in other ways."""
    messages = [said("user", [{"type": "text", "text": _SYSTEMS[3]}, {"type": "text", "text": _sentence(rng)}])]
    for _ in range(rng.randint(2, 4)):
        yield chat("parts", [*messages, said("user", _sentence(rng))], rng.randint(1, 8))


def _text(answer: Answer) -> str:
    return answer.text if answer.status == 200 else ""


def _sentence(rng: random.Random) -> str:
    """Words of one line, out of order, with the odd character that is written in two ways."""
    words = rng.choice(LINES).split()
    rng.shuffle(words)
    return " ".join(words[: rng.randint(3, 14)]) + rng.choice(["?", " …", "\n", " cafe\u0301", "  \t", "'re", ""])
