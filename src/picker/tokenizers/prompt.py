"""A call's leading prompt in the form exact matching hashes: canonical bytes, and where its tokens end.

Follows vLLM 0.32 in what it does with the body of a chat or completion request. Whatever it would refuse, or what we
cannot follow, is `Unreadable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.template import ChatTemplate, Rendered
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import KnownSplits, Seams, TextSplits
from picker.types import Call, CallKind, Splits

_decoder = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """data: canonical bytes. splits: where tokens end in them. ids: the prompt's tokens, where they were given."""

    data: bytes = field(repr=False)
    splits: Splits
    ids: list[int] | None = field(default=None, repr=False)
    whole: bool = True


class LocalPrompts:
    """Reads prompts by a model's own files. template: None where the model takes no chat that we can render."""

    def __init__(self, tokenizer: TextTokenizer, seams: Seams, template: ChatTemplate | None) -> None:
        self.tokenizer, self.seams, self._template = tokenizer, seams, template
        opening = tokenizer.vocabulary.spell(tokenizer.opening)
        self._opening = b"" if opening is None else opening.data

    def read(self, call: Call) -> ReadPrompt:
        """The prompt as the engine reads it. Raises Unreadable."""
        body = body_of(call)
        if call.kind is CallKind.CHAT:
            if self._template is None:
                raise Unreadable("this model's chat requests cannot be rendered")
            return self._of_text(self._template.render(body), opened=bool(body.get("add_special_tokens")))
        return self._of_completion(body)

    def _of_completion(self, body: Mapping[str, Any]) -> ReadPrompt:
        prompt = leading_prompt(body)
        if isinstance(prompt, str):
            return self._of_text(Rendered(prompt), opened=body.get("add_special_tokens") is not False)
        spelling = self.tokenizer.vocabulary.spell(prompt)
        if spelling is None:
            raise Unreadable("token ids that the tokenizer does not have")
        return ReadPrompt(spelling.data, KnownSplits(spelling.ends.tolist()), prompt)

    def _of_text(self, rendered: Rendered, *, opened: bool) -> ReadPrompt:
        try:
            data = self.tokenizer.canonical(rendered.text).encode()
        except UnicodeEncodeError:
            raise Unreadable("half a character") from None
        data = self._opening + data if opened else data
        pattern = self.tokenizer.added_pattern
        closed = rendered.whole or (pattern is not None and pattern.match(rendered.after) is not None)
        return ReadPrompt(data, TextSplits(self.seams, data, closed=closed), whole=rendered.whole)


def body_of(call: Call) -> Mapping[str, Any]:
    """The body of a chat or completion, if its prompt can be read at all. Raises Unreadable."""
    if call.kind is CallKind.OTHER:
        raise Unreadable("neither a chat nor a completion")
    try:
        body = _decoder.decode(call.body)
    except (msgspec.DecodeError, RecursionError):
        raise Unreadable("a body that is not JSON") from None
    if not isinstance(body, dict):
        raise Unreadable("a body that is no object")
    if body.get("truncate_prompt_tokens") is not None:
        raise Unreadable("a prompt that the engine is asked to shorten")
    transfer = body.get("kv_transfer_params")
    if isinstance(transfer, dict) and transfer.get("prompt_token_ids") is not None:
        raise Unreadable("a prompt whose tokens another engine made")
    return body


def leading_prompt(body: Mapping[str, Any]) -> str | list[int]:
    """The first prompt of a completion: a text or token ids. Raises Unreadable."""
    prompt = body.get("prompt")
    if body.get("prompt_embeds") is not None or not prompt:
        raise Unreadable("a prompt that is no text")
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(each) is int for each in prompt):
        return prompt
    raise Unreadable("a prompt that is neither text nor token ids")
