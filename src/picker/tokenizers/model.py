"""One model's reading of text, put together from its folder: what an application needs to build a reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from picker.prefix.spelling import Vocabulary
from picker.tokenizers.canonical import Canonical
from picker.tokenizers.folder import read_folder
from picker.tokenizers.prompt import LocalPrompts
from picker.tokenizers.template import ChatTemplate
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.whole import WholeTokens
from picker.tokenizers.window import Seams


@dataclass(frozen=True, slots=True)
class LocalModel:
    """prompts: for `Reader`. canonical: judges blocks at ingestion. no_chat: why chats are not read, if they are not.

    dated: what is rendered may depend on the engine's clock and time zone.
    """

    tokenizer: TextTokenizer
    seams: Seams
    prompts: LocalPrompts
    canonical: Canonical
    no_chat: str | None
    dated: bool

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    def whole(self, remembered: int = 32) -> WholeTokens:
        """Full tokenisation, for a reader that matches by tokens."""
        return WholeTokens(self.tokenizer, self.seams, remembered)


def load_model(
    folder: Path,
    *,
    seconds: Callable[[], float],
    today: Callable[[], datetime],
    chat_template: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    content_format: str = "auto",
    exclude_tools: bool = False,
) -> LocalModel:
    """Read a model's folder and try its tokenizer out; takes a second or more for large vocabularies.

    seconds: the clock that rendering is limited by. today: the date that templates see. The rest is what the engine was
    started with (see `ChatTemplate`). Raises ConfigError where there is anything that cannot be followed.
    """
    files = read_folder(folder, chat_template)
    tokenizer = TextTokenizer(files.tokenizer, files.config)
    seams = Seams(tokenizer)
    template = None
    if files.no_chat is None:
        template = ChatTemplate(
            files.templates,
            special_tokens=files.special_tokens,
            seconds=seconds,
            today=today,
            defaults=defaults,
            content_format=content_format,
            exclude_tools=exclude_tools,
        )
    prompts, canonical = LocalPrompts(tokenizer, seams, template), Canonical(tokenizer, seams)
    return LocalModel(tokenizer, seams, prompts, canonical, files.no_chat, template is not None and template.dated)
