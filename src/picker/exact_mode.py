"""Puts exact prefix knowledge together: what a configuration asks for becomes readers, an index and its sources.

Used by `app` alone. Which model's vocabulary an endpoint's events are spelled with follows from the models it serves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from picker.config import ExactConfig
from picker.errors import ConfigError
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, ByTokens
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.sources.engine_post import EnginePost
from picker.sources.ingest import Ingest, Judge
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.model import LocalModel, load_model
from picker.tokenizers.prompt import ReadPrompt
from picker.tokenizers.reader import Reader
from picker.tokenizers.remote import Learner, RemotePrompts
from picker.types import Call

ModelsOf = Callable[[str], frozenset[str]]
"""Endpoint name -> the model names it serves, as far as they are known."""


@dataclass(frozen=True, slots=True)
class LocalModels:
    """Tokenizers by model name, and the one for every other model; None where there is none for it."""

    by_name: Mapping[str, LocalModel] = field(default_factory=dict)
    other: LocalModel | None = None

    @property
    def known(self) -> bool:
        """Whether there are any."""
        return bool(self.by_name) or self.other is not None

    @property
    def single(self) -> LocalModel | None:
        """The only one; None where there are none or several."""
        all_of_them = [*self.by_name.values(), *([] if self.other is None else [self.other])]
        return all_of_them[0] if len(all_of_them) == 1 else None

    def of(self, model: str | None) -> LocalModel | None:
        """The one to read a request for a model with; an adapter's name is not in the table, its base model's is."""
        return self.by_name.get(model or "") or self.other or self.single

    def of_endpoint(self, models: frozenset[str]) -> LocalModel | None:
        """The one to spell an endpoint's blocks with."""
        named = next((self.by_name[model] for model in sorted(models) if model in self.by_name), None)
        return named or self.other or self.single

    def read(self, call: Call) -> ReadPrompt:
        """What `Reader` asks for. Raises Unreadable."""
        model = self.of(call.model)
        if model is None:
            raise Unreadable("a model whose tokenizer was not given")
        return model.prompts.read(call)


def load_models(config: ExactConfig) -> LocalModels:
    """Read the tokenizers that a configuration names. Raises ConfigError for one that cannot be followed."""

    def load(folder: str) -> LocalModel:
        path = Path(folder)
        if not path.is_dir():
            raise ConfigError(f"exact.tokenizer: there is no folder {folder}; give one with the model's tokenizer.json")
        return load_model(path, seconds=time.monotonic, today=datetime.now)

    by_name = {name: load(folder) for name, folder in config.tokenizers.items()}
    return LocalModels(by_name, None if config.tokenizer is None else load(config.tokenizer))


class ExactMode:
    """The parts, for `app` to join with the rest. secret: of the process, so that nobody can craft equal prefixes.

    models_of: endpoint name -> the model names it serves, as far as they are known. Raises ConfigError.
    """

    def __init__(self, config: ExactConfig, secret: bytes) -> None:
        self.models = load_models(config)
        if config.mode == "tokens" and self.models.single is None:
            raise ConfigError("exact.by: tokens needs exactly one tokenizer; give it with --tokenizer DIR")
        self.config = config
        self.post = EnginePost()
        self._hasher = PrefixHasher(secret)
        self._secret = secret
        self._learned = Vocabulary()
        self._learners: dict[str, Learner] = {}

    def knowledge(self, models_of: ModelsOf) -> Exact:
        """The index, its blocks spelled as the reader spells prompts."""
        index = PreciseIndex(self.config.budget_bytes, secret=self._secret)
        if self.config.mode == "tokens":
            return Exact(index, ByTokens(self._hasher))
        return Exact(index, ByBytes(self._hasher, lambda name: self._vocabulary(models_of(name))))

    def reader(self, is_adapter: Callable[[str], bool]) -> Reader:
        """Reads requests with the tokenizers at hand, or by asking an engine where there are none."""
        budget, single = self.config.budget_ms / 1000.0, self.models.single
        if not self.models.known:
            remote = RemotePrompts(self.post.any, self._learned)
            return Reader(self._hasher, remote=remote, is_adapter=is_adapter, budget=budget)
        whole = single.whole() if self.config.mode == "tokens" and single is not None else None
        return Reader(self._hasher, prompts=self.models, whole=whole, is_adapter=is_adapter, budget=budget)

    def ingest(self, models_of: ModelsOf) -> Ingest:
        """What events go through before they are told."""
        learn = None if self.models.known else self._learn
        return Ingest(lambda name: self._vocabulary(models_of(name)), lambda name: self._judge(models_of(name)), learn)

    def _vocabulary(self, models: frozenset[str]) -> Vocabulary | None:
        if not self.models.known:
            return self._learned
        model = self.models.of_endpoint(models)
        return None if model is None else model.vocabulary

    def _judge(self, models: frozenset[str]) -> Judge | None:
        model = self.models.of_endpoint(models) if self.config.mode == "bytes" else None
        return None if model is None else model.canonical.check

    async def _learn(self, name: str, ids: Sequence[int]) -> bool:
        if name not in self._learners:
            self._learners[name] = Learner(lambda path, body: self.post.of(name, path, body), self._learned)
        return await self._learners[name].learn(ids)
