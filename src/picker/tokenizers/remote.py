"""A vocabulary and prompts learned from an engine, for pools whose tokenizer files are not at hand.

`/detokenize` and `/tokenize` are open on every vLLM, and tell what ids spell; the render endpoint or `/tokenize` tells
what ids a chat request becomes. All of it costs a round trip, so the vocabulary is learned off the request path, as ids
turn up in KV events, and prompts are asked for within the reader's budget. HTTP is a function that is handed in.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from picker.prefix.spelling import Vocabulary
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.prompt import ReadPrompt, body_of, leading_prompt
from picker.tokenizers.tokenizer import bytes_of_pieces, bytes_of_token
from picker.tokenizers.window import KnownSplits
from picker.types import Call, CallKind

# (path, body) -> (status, body). Raises OSError or TimeoutError where the engine cannot be reached.
Post = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]

_BATCH = 512  # ids to one request
_SINGLES = 32  # requests for lone ids in one go
_LOST = "\ufffd"
_ABSENT = frozenset((401, 403, 404, 405, 501))
_WRITTEN = (bytes_of_token, bytes_of_pieces)  # how a tokenizer may write its tokens
# Fields of a chat request that `/tokenize` knows, and those that change the prompt and that it does not know.
_KNOWN = (
    *("model", "messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    "chat_template_kwargs",
)
_NOT_KNOWN = ("documents", "reasoning_effort", "chat_template", "mm_processor_kwargs")


class Learner:
    """Fills a vocabulary by asking one engine. requests, failures: what was asked, and what brought nothing."""

    def __init__(self, post: Post, vocabulary: Vocabulary, model: str | None = None) -> None:
        self._post, self._vocabulary, self._model = post, vocabulary, model
        self._hopeless: set[int] = set()
        self._written: Callable[[str], bytes] | None = None
        self._lock = asyncio.Lock()
        self.requests = self.failures = 0

    async def learn(self, ids: Sequence[int]) -> bool:
        """Learn what of these ids is not known; whether all are known then. Ids in the order of a text teach most."""
        async with self._lock:
            wanted = set(self._vocabulary.missing(ids)) - self._hopeless
            for start in range(0, len(ids), _BATCH):
                batch = list(ids[start : start + _BATCH])
                if not wanted.isdisjoint(batch):
                    await self._from_text(batch)
            for token in [each for each in self._vocabulary.missing(ids) if each not in self._hopeless][:_SINGLES]:
                await self._alone(token)
        return not self._vocabulary.missing(ids)

    async def _from_text(self, ids: list[int]) -> None:
        """Ids to text, and that text to ids with their written forms."""
        text = await self._text(ids)
        if not text:
            return
        answer = await self._ask("/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)
        tokens, written = answer.get("tokens"), answer.get("token_strs")
        if not isinstance(tokens, list) or not isinstance(written, list) or len(tokens) != len(written):
            return
        if not all(isinstance(each, str) for each in written):
            return
        for token, data in zip(tokens, self._read(text, written), strict=False):
            if self._vocabulary.spells(token) is None:
                self._vocabulary.learn(token, data)

    def _read(self, text: str, written: list[str]) -> list[bytes]:
        """What the written forms spell, if that is the text; nothing where it is not, or could be read two ways."""
        forms = [self._written] if self._written is not None else list(_WRITTEN)
        wanted = {way(text).encode() for way in (str, _composed, _led, lambda each: _led(_composed(each)))}
        fitting = [(form, found) for form in forms if b"".join(found := [form(each) for each in written]) in wanted]
        if len({tuple(found) for _, found in fitting}) != 1:
            return []
        if len(fitting) == 1 and len(forms) > 1:
            self._written = fitting[0][0]
        return fitting[0][1]

    async def _alone(self, token: int) -> None:
        """An id that its text is not cut into: the text it adds to that of a known one, if it is whole characters."""
        anchor = self._anchor()
        if anchor is None:
            return
        before, both = await self._text([anchor]), await self._text([anchor, token])
        if before is None or both is None:
            return
        if _LOST in both or not both.startswith(before):
            self._hopeless.add(token)
        else:
            self._vocabulary.learn(token, both[len(before) :].encode())

    def _anchor(self) -> int | None:
        """A known id that spells a plain word."""
        spelled = ((token, self._vocabulary.spells(token)) for token in range(len(self._vocabulary)))
        return next((token for token, data in spelled if data is not None and data.isalpha()), None)

    async def _text(self, ids: list[int]) -> str | None:
        found = (await self._ask("/detokenize", tokens=ids)).get("prompt")
        return found if isinstance(found, str) else None

    async def _ask(self, path: str, **fields: object) -> Mapping[str, Any]:
        self.requests += 1
        if self._model is not None:
            fields["model"] = self._model
        answer = await _asked(self._post, path, msgspec.json.encode(fields))
        self.failures += answer is None or not answer
        return answer or {}


class RemotePrompts:
    """Asks an engine for the token ids of a prompt, and spells them. One request to the engine for each call."""

    def __init__(self, post: Post, vocabulary: Vocabulary) -> None:
        self._post, self._vocabulary = post, vocabulary
        self._paths = {"render": True, "tokenize": True}

    async def read(self, call: Call) -> ReadPrompt:
        """Raises Unreadable, also where the engine offers no way or answers with something else."""
        body = body_of(call)
        prompt = leading_prompt(body) if call.kind is CallKind.COMPLETION else None
        ids = prompt if isinstance(prompt, list) else await self._ids(call, body, prompt)
        spelling = self._vocabulary.spell(ids)
        if spelling is None:
            raise Unreadable("token ids whose spelling is not learned yet")
        return ReadPrompt(spelling.data, KnownSplits(spelling.ends.tolist()), ids)

    async def _ids(self, call: Call, body: Mapping[str, Any], prompt: str | None) -> list[int]:
        if prompt is None and self._paths["render"]:
            found = await self._tried("render", "/v1/chat/completions/render", call.body, "token_ids")
            if found is not None:
                return found
        if self._paths["tokenize"] and (asked := _for_tokenize(body, prompt)) is not None:
            found = await self._tried("tokenize", "/tokenize", msgspec.json.encode(asked), "tokens")
            if found is not None:
                return found
        raise Unreadable("the engine does not tell the tokens of this prompt")

    async def _tried(self, name: str, path: str, body: bytes, key: str) -> list[int] | None:
        answer = await _asked(self._post, path, body)
        if answer is None:
            self._paths[name] = False
            return None
        ids = answer.get(key)
        if answer.get("features") is not None:
            raise Unreadable("a prompt with media")
        return ids if isinstance(ids, list) and all(type(each) is int for each in ids) else None


async def _asked(post: Post, path: str, body: bytes) -> Mapping[str, Any] | None:
    """The answer's object; empty where it is unusable; None where the engine has no such path."""
    try:
        status, answer = await post(path, body)
    except (OSError, TimeoutError):
        return {}
    if status in _ABSENT:
        return None
    if status != 200:
        return {}
    try:
        found = msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _for_tokenize(body: Mapping[str, Any], prompt: str | None) -> dict[str, Any] | None:
    """The body of a `/tokenize` request with the same prompt; None where it cannot have it."""
    if prompt is not None:
        asked = {"prompt": prompt, "add_special_tokens": body.get("add_special_tokens") is not False}
        return asked | ({"model": body["model"]} if body.get("model") else {})
    if any(body.get(name) is not None for name in _NOT_KNOWN) or body.get("tool_choice") == "none":
        return None
    return {name: body[name] for name in _KNOWN if body.get(name) is not None}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _led(text: str) -> str:
    return " " + text
