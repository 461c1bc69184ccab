"""A vocabulary and prompts learned from an engine's endpoints: right, in few requests, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from picker.prefix.spelling import Vocabulary
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.remote import Learner, RemotePrompts
from picker.tokenizers.tokenizer import TextTokenizer
from picker.types import Call, CallKind
from tiny_tokenizers import PROSE, spec
from tokenizers import Tokenizer

TOKENIZERS = {kind: TextTokenizer(spec(kind)) for kind in ("qwen", "gpt2", "llama2", "metaspace", "gemma")}
MESSAGES = [{"role": "user", "content": "hi"}]


class FakeEngine:
    """Answers as vLLM does, with a tokenizer of one kind. statuses: by path, where it refuses."""

    def __init__(self, kind: str = "qwen", statuses: Mapping[str, int] | None = None) -> None:
        self.tokenizer = Tokenizer.from_str(msgspec.json.encode(spec(kind)).decode())
        self.statuses = statuses or {}
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.answer: bytes | None = None

    async def __call__(self, path: str, body: bytes) -> tuple[int, bytes]:
        self.asked.append(path)
        self.bodies.append(fields := msgspec.json.decode(body))
        if (status := self.statuses.get(path, 200)) != 200:
            return status, b'{"error": {}}'
        if status == 0:
            raise ConnectionError
        if self.answer is not None:
            return 200, self.answer
        if path == "/detokenize":
            return 200, msgspec.json.encode(
                {"prompt": self.tokenizer.decode(fields["tokens"], skip_special_tokens=False)}
            )
        if path == "/tokenize":
            found = self.tokenizer.encode(fields.get("prompt", "<|im_start|>user\nhi"), add_special_tokens=False)
            written = found.tokens if fields.get("return_token_strs") else None
            return 200, msgspec.json.encode({"tokens": found.ids, "token_strs": written})
        return 200, msgspec.json.encode(
            {"token_ids": self.tokenizer.encode("<|im_start|>user\nhi").ids, "features": None}
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
async def test_what_ids_of_a_text_spell_is_learned_in_a_few_requests(kind: str) -> None:
    truth = TOKENIZERS[kind].vocabulary
    engine, vocabulary = FakeEngine(kind), Vocabulary()
    ids = TOKENIZERS[kind].encode(TOKENIZERS[kind].canonical(PROSE))
    assert await Learner(engine, vocabulary, "m").learn(ids)
    assert [vocabulary.spells(token) for token in ids] == [truth.spells(token) for token in ids]
    assert len(engine.asked) <= 6
    assert all(body["model"] == "m" for body in engine.bodies)


async def test_what_is_known_is_not_asked_again() -> None:
    engine, vocabulary = FakeEngine(), Vocabulary()
    learner, ids = Learner(engine, vocabulary), TOKENIZERS["qwen"].encode("the scheduler places")
    await learner.learn(ids)
    before = len(engine.asked)
    assert await learner.learn(ids)
    assert len(engine.asked) == before


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
async def test_ids_that_their_text_is_not_cut_into_are_learned_alone(kind: str) -> None:
    truth = TOKENIZERS[kind].vocabulary
    engine, vocabulary = FakeEngine(kind), Vocabulary()
    learner = Learner(engine, vocabulary)
    await learner.learn(TOKENIZERS[kind].encode("The scheduler places each request"))
    sampled = [token for byte in b"once" for token in TOKENIZERS[kind].encode(chr(byte))]
    assert await learner.learn(sampled)
    assert [vocabulary.spells(token) for token in sampled] == [truth.spells(token) for token in sampled]


async def test_an_id_that_is_half_a_character_is_learned_from_its_neighbours_or_not_at_all() -> None:
    tokenizer, vocabulary = TOKENIZERS["gpt2"], Vocabulary()
    engine = FakeEngine("gpt2")
    learner = Learner(engine, vocabulary)
    ids = tokenizer.encode("words ꙮꚙ words")
    assert await learner.learn(ids)  # the text of all of them is whole
    spelling = vocabulary.spell(ids)
    assert spelling is not None
    assert spelling.data == "words ꙮꚙ words".encode()
    lone = next(token for token in range(300) if tokenizer.vocabulary.spells(token) == b"\xf3")
    assert not await learner.learn([lone])
    asked = len(engine.asked)
    assert not await learner.learn([lone])
    assert len(engine.asked) == asked  # once is enough
    assert vocabulary.spells(lone) is None


async def test_lone_ids_are_asked_for_a_few_at_a_time() -> None:
    engine, vocabulary = FakeEngine(), Vocabulary()
    learner = Learner(engine, vocabulary)
    await learner.learn(TOKENIZERS["qwen"].encode("word"))
    assert not await learner.learn(list(range(3, 203))[::-1])
    assert len(engine.asked) <= 4 + 2 * 32


@pytest.mark.parametrize("statuses", [{"/detokenize": 404}, {"/tokenize": 500}, {"/detokenize": 0}])
async def test_an_engine_that_refuses_teaches_nothing(statuses: dict[str, int]) -> None:
    learner = Learner(FakeEngine(statuses=statuses), Vocabulary())
    assert not await learner.learn([50, 51])
    assert learner.failures > 0


@pytest.mark.parametrize(
    "answer", [b"{", b"[]", b"{}", b'{"prompt": 5}', b'{"prompt": "x", "tokens": [1], "token_strs": ["y"]}']
)
async def test_answers_that_make_no_sense_teach_nothing(answer: bytes) -> None:
    engine, vocabulary = FakeEngine(), Vocabulary()
    engine.answer = answer
    assert not await Learner(engine, vocabulary).learn([1, 2])
    assert vocabulary.known == 0


# --- prompts -----------------------------------------------------------------------------------------------


def chat(**body: object) -> Call:
    return Call(CallKind.CHAT, "m", body=msgspec.json.encode({"messages": MESSAGES, **body}))


def completion(prompt: object) -> Call:
    return Call(CallKind.COMPLETION, "m", body=msgspec.json.encode({"prompt": prompt}))


TRUTH = TOKENIZERS["qwen"].vocabulary
TEXT = b"<|im_start|>user\nhi"


async def test_the_render_endpoint_is_asked_with_the_request_itself() -> None:
    engine = FakeEngine()
    read = await RemotePrompts(engine, TRUTH).read(chat(reasoning_effort="high"))
    assert (read.data, engine.asked) == (TEXT, ["/v1/chat/completions/render"])
    assert engine.bodies == [{"messages": MESSAGES, "reasoning_effort": "high"}]
    assert read.ids == TOKENIZERS["qwen"].encode(TEXT.decode())
    assert read.splits(len("<|im_start|>"))
    assert not read.splits(3)


@pytest.mark.parametrize("status", [403, 404])
async def test_where_rendering_is_not_allowed_tokenize_is_asked(status: int) -> None:
    engine = FakeEngine(statuses={"/v1/chat/completions/render": status})
    prompts = RemotePrompts(engine, TRUTH)
    for _ in range(2):
        assert (await prompts.read(chat(stream=True, tools=None))).data == TEXT
    assert engine.asked == ["/v1/chat/completions/render", "/tokenize", "/tokenize"]
    assert engine.bodies[-1] == {"messages": MESSAGES}


async def test_tokenize_is_not_asked_for_what_it_does_not_know() -> None:
    engine = FakeEngine(statuses={"/v1/chat/completions/render": 403})
    for body in ({"documents": [{"text": "x"}]}, {"reasoning_effort": "high"}, {"tool_choice": "none"}):
        with pytest.raises(Unreadable):
            await RemotePrompts(engine, TRUTH).read(chat(**body))
    assert "/tokenize" not in engine.asked


async def test_completions_are_tokenised_and_token_ids_only_spelled() -> None:
    engine = FakeEngine()
    prompts = RemotePrompts(engine, TRUTH)
    assert (await prompts.read(completion("some words"))).data == b"some words"
    assert engine.bodies == [{"prompt": "some words", "add_special_tokens": True}]
    assert (await prompts.read(completion([1]))).data == b"<|im_start|>"
    assert len(engine.asked) == 1


async def test_ids_that_are_not_learned_yet_and_media_are_not_read() -> None:
    with pytest.raises(Unreadable, match="not learned"):
        await RemotePrompts(FakeEngine(), Vocabulary()).read(chat())
    engine = FakeEngine()
    engine.answer = b'{"token_ids": [1], "features": {}}'
    with pytest.raises(Unreadable, match="media"):
        await RemotePrompts(engine, TRUTH).read(chat())


async def test_an_engine_that_offers_nothing_is_not_asked_for_ever() -> None:
    engine = FakeEngine(statuses={"/v1/chat/completions/render": 404, "/tokenize": 404})
    prompts = RemotePrompts(engine, TRUTH)
    for _ in range(3):
        with pytest.raises(Unreadable, match="does not tell"):
            await prompts.read(chat())
    assert len(engine.asked) == 2
