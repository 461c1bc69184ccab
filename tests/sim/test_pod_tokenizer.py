"""Pods that tokenize, speak and cache in the ids of a model; the model is as small as one can be."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from picker.errors import ConfigError, WireError
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import EventOptions, PodOptions
from picker.sim.pod_tokenizer import PodTokenizer
from picker.wire.kv_events import Stored, decode_batch
from real_vllm.tiny_model import write_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Please summarise the following report in three sentences."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PodTokenizer:
    return PodTokenizer.load(folder)


class Client:
    def __init__(self, pod: Pod, session: aiohttp.ClientSession) -> None:
        self.pod = pod
        self._session = session

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        async with self._session.post(self.pod.url + path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def ask(self, path: str, **body: Any) -> Any:
        status, answer = await self.post(path, body)
        assert status == 200, answer
        return answer

    async def text(self, path: str, **body: Any) -> str:
        async with self._session.post(self.pod.url + path, json=body) as response:
            return await response.text()

    async def told(self) -> list[Stored]:
        """All stores that the pod has published."""
        batches = [decode_batch(payload) for _, payload in self.pod.publishers[0].buffered]
        return [event for batch in batches for event in batch.events if isinstance(event, Stored)]


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Client]:
    defaults: dict[str, Any] = {"model": "tiny", "time_scale": 1000.0, "noise": False, "block_size": 8}
    chosen = PodOptions(events=EventOptions(), **(defaults | options))
    async with open_pods(chosen) as pods, aiohttp.ClientSession() as session:
        yield Client(pods[0], session)


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


# --- the tokenizer alone -------------------------------------------------------------------------------------


def test_text_becomes_the_models_ids_and_text_again(tokenizer: PodTokenizer) -> None:
    ids = tokenizer.encode("Größe <|im_end|>", special=True)
    assert tokenizer.decode(ids) == "Größe <|im_end|>"
    assert tokenizer.names(ids)[-1] == "<|im_end|>"
    assert max(ids) < tokenizer.vocabulary


def test_a_conversation_is_the_models_template(tokenizer: PodTokenizer) -> None:
    text = tokenizer.decode(tokenizer.encode_chat({"messages": HELLO}, special=False))
    assert text.endswith(f"<|im_start|>user\n{HELLO[0]['content']}<|im_end|>\n<|im_start|>assistant\n")


def test_what_cannot_be_rendered_is_refused_without_its_words(tokenizer: PodTokenizer) -> None:
    with pytest.raises(WireError) as refused:
        tokenizer.encode_chat({"messages": [{"role": "user", "content": 5, "x": "secret"}]}, special=False)
    assert "secret" not in refused.value.message


def test_an_answer_tokenizes_back_to_the_ids_it_was_made_of(tokenizer: PodTokenizer) -> None:
    for seed in range(50):
        ids, pieces = tokenizer.answer(seed, 40, ends=False)
        assert len(ids) == len(pieces) == 40
        assert tokenizer.decode(ids) == "".join(pieces)
        assert "".join(pieces).isascii()
        after = tokenizer.encode("<|im_start|>assistant\n" + "".join(pieces) + "<|im_end|>", special=False)
        assert after.tolist()[-41:-1] == ids.tolist()


def test_an_answer_that_ends_by_itself_ends_with_the_token_for_it(tokenizer: PodTokenizer) -> None:
    ids, pieces = tokenizer.answer(1, 5, ends=True)
    assert tokenizer.names(ids)[-1] in ("<|im_end|>", "<|endoftext|>")
    assert pieces[-1] == ""
    assert np.array_equal(ids[:-1], tokenizer.answer(1, 5, ends=False).ids[:-1])


def test_a_folder_without_a_usable_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        PodTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: Cannot instantiate"):
        PodTokenizer.load(tmp_path)


def test_a_model_without_a_template_takes_no_conversations(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(WireError, match="chat template"):
        PodTokenizer.load(tmp_path).encode_chat({"messages": HELLO}, special=False)


# --- pods with it --------------------------------------------------------------------------------------------


async def test_tokenize_gives_the_ids_that_the_engine_caches(folder: Path) -> None:
    async with serving(tokenizer=folder) as client:
        told = await client.ask("/tokenize", messages=HELLO, return_token_strs=True)
        answer = await client.ask(CHAT, messages=HELLO, max_tokens=1)
        (event,) = await client.told()
        text = await client.ask("/detokenize", tokens=told["tokens"])
    assert answer["usage"]["prompt_tokens"] == told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert list(event.tokens) == told["tokens"][: told["count"] // 8 * 8]
    assert text["prompt"].startswith("<|im_start|>")


async def test_the_next_turn_hits_what_was_said(folder: Path) -> None:
    async with serving(tokenizer=folder) as client:
        first = await client.ask(CHAT, messages=HELLO, max_tokens=60)
        said = first["choices"][0]["message"]
        turns = [*HELLO, {"role": "assistant", "content": said["content"]}, {"role": "user", "content": "Go on."}]
        second = await client.ask(CHAT, messages=turns, max_tokens=1)
    assert cached(second) == (first["usage"]["total_tokens"] - 1) // 8 * 8


async def test_a_stream_says_the_whole_answer_token_by_token(folder: Path) -> None:
    async with serving(tokenizer=folder) as client:
        whole = await client.ask(CHAT, messages=HELLO)
        lines = (await client.text(CHAT, messages=HELLO, stream=True)).removesuffix("\n\n").split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    choice = whole["choices"][0]
    assert "".join(pieces) == choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert len(pieces) == 1 + whole["usage"]["completion_tokens"]


async def test_a_stop_string_cuts_text_and_tokens(folder: Path) -> None:
    async with serving(tokenizer=folder) as client:
        full = (await client.ask(COMPLETIONS, prompt="Once", max_tokens=20))["choices"][0]["text"]
        stop = full.split(" ")[7]
        cut = await client.ask(COMPLETIONS, prompt="Once", max_tokens=20, stop=stop)
        streamed = (await client.text(COMPLETIONS, prompt="Once", max_tokens=20, stop=stop, stream=True)).split("\n\n")
        kept = await client.ask(COMPLETIONS, prompt="Once", max_tokens=20, stop=stop, include_stop_str_in_output=True)
    end = full.index(stop)
    choice = cut["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (full[:end], "stop", stop)
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in streamed[:-2]) == full[:end]
    assert kept["choices"][0]["text"] == full[: end + len(stop)]
    assert cut["usage"]["completion_tokens"] <= 8


async def test_ids_beyond_the_vocabulary_are_refused(folder: Path) -> None:
    async with serving(tokenizer=folder) as client:
        status, answer = await client.post(COMPLETIONS, {"prompt": [99_999]})
    assert (status, answer["error"]["message"]) == (400, "Token id 99999 is out of vocabulary")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_ids_of_the_gateway_take_the_place_of_the_text(folder: Path, path: str) -> None:
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "ignored"}
    async with serving(tokenizer=folder) as client:
        given = {"prompt_token_ids": list(range(10, 30))}
        await client.ask(path, **asked, max_tokens=1, kv_transfer_params=given)
        (event,) = await client.told()
    assert event.tokens == tuple(range(10, 26))


# --- rendering -----------------------------------------------------------------------------------------------


async def test_rendering_is_refused_unless_it_is_enabled() -> None:
    async with serving() as client:
        status, answer = await client.post(CHAT + "/render", {"messages": HELLO})
    assert (status, answer["error"]["type"]) == (403, "PermissionDeniedError")
    assert answer["error"]["message"].startswith("Scale-out endpoints are disabled.")


@pytest.mark.parametrize("own", [True, False])
async def test_a_rendered_request_has_the_ids_that_the_engine_would_use(folder: Path, own: bool) -> None:
    async with serving(tokenizer=folder if own else None, scale_out=True) as client:
        told = await client.ask("/tokenize", messages=HELLO)
        body = {"messages": HELLO, "max_tokens": 5, "cache_salt": "s", "priority": 3, "request_id": "mine"}
        chat = await client.ask(CHAT + "/render", **body)
        prompts = await client.ask(COMPLETIONS + "/render", prompt=["one", [1, 2, 3]])
        status, _ = await client.post("/inference/v1/generate", {})
        queries = client.pod.engine.counters.queries
    assert (chat["request_id"], chat["token_ids"]) == ("chatcmpl-mine", told["tokens"])
    assert (chat["sampling_params"]["max_tokens"], chat["cache_salt"], chat["priority"]) == (5, "s", 3)
    assert [prompt["token_ids"] for prompt in prompts][1] == [1, 2, 3]
    assert list(chat) == [
        *("request_id", "token_ids", "token_offsets", "features", "content_parts", "sampling_params", "model"),
        *("reasoning_ended", "reasoning_parser_kwargs", "return_token_ids", "output_mode", "stream"),
        *("stream_options", "cache_salt", "priority", "kv_transfer_params", "ec_transfer_params"),
    ]
    assert (status, queries) == (501, 0)
