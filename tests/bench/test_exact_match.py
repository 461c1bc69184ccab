import numpy as np
import pytest

from picker.bench.block_index import BUDGET
from picker.bench.chat_model import Conversation, Prose, made_model
from picker.bench.exact_match import Asked, Gateway, told
from picker.prefix.precise import PreciseIndex

MODEL = made_model()


def asked(size: int) -> Asked:
    conversation = Conversation.of(size, Prose(seed=size))
    held = MODEL.prompts.read(conversation.before())
    return Asked(conversation.call(), MODEL.tokenizer.encode(held.data.decode()))


def test_a_conversation_is_as_long_as_asked_and_ends_with_the_user() -> None:
    conversation = Conversation.of(20_000, Prose(seed=1))
    text = sum(len(message["content"]) for message in conversation.messages)
    assert 19_000 <= text <= 21_000
    assert [message["role"] for message in conversation.messages[:2]] == ["system", "user"]
    assert conversation.messages[-1]["role"] == "user"


def test_the_prompt_before_is_a_beginning_of_the_next() -> None:
    conversation = Conversation.of(20_000, Prose(seed=1))
    before, after = MODEL.prompts.read(conversation.before()), MODEL.prompts.read(conversation.call())
    assert after.data.startswith(before.data)
    assert len(after.data) < len(before.data) + 4000


@pytest.mark.parametrize("tokens", [False, True])
async def test_a_prompt_that_was_told_of_is_found_to_its_last_full_block(tokens: bool) -> None:
    gateway, one = Gateway(MODEL, PreciseIndex(BUDGET, 4), 4, tokens=tokens), asked(6000)
    with pytest.raises(ValueError, match="not found"):
        await gateway.time(one)
    await gateway.hear(list(told(one, 4, np.random.default_rng(0))))
    read, walked = await gateway.time(one)
    assert read > 0
    assert walked > 0
    gateway.reader.close()
