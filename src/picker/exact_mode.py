"""Puts exact prefix knowledge together: what a configuration asks for becomes readers, an index and its sources.

Used by `app` alone. Which model's vocabulary an endpoint's events are spelled with follows from the models it serves.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from picker.config import ExactConfig, TokenizerSpec
from picker.core.scheduler import Scheduler
from picker.errors import ConfigError
from picker.prefix.exact import Exact
from picker.prefix.precise import PreciseIndex
from picker.prefix.spellers import ByBytes, ByTokens
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.sources.engine_post import EnginePost
from picker.sources.ingest import Ingest, Judge
from picker.sources.kv_events import KvEventSource
from picker.sources.kv_snapshot import Snapshots, read_key
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.model import LocalModel, load_model
from picker.tokenizers.prompt import ReadPrompt
from picker.tokenizers.reader import Reader
from picker.tokenizers.remote import Learner, RemotePrompts
from picker.types import Call

log = logging.getLogger("picker.exact")

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

    by_name = {name: _load(f"exact.tokenizers.{name}", spec) for name, spec in config.tokenizers.items()}
    return LocalModels(by_name, None if config.tokenizer is None else _load("exact.tokenizer", config.tokenizer))


def _load(key: str, told: str | TokenizerSpec) -> LocalModel:
    spec = told if isinstance(told, TokenizerSpec) else TokenizerSpec(folder=told)
    folder, template = Path(spec.folder), None if spec.chat_template is None else Path(spec.chat_template)
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no folder {spec.folder}; give one with the model's tokenizer.json")
    if template is not None and not template.is_file():
        raise ConfigError(f"{key}.chat_template: there is no file {spec.chat_template}")
    try:
        model = load_model(
            folder,
            seconds=time.monotonic,
            today=datetime.now,
            chat_template=template,
            defaults=spec.chat_template_kwargs,
            content_format=spec.content_format,
            exclude_tools=spec.exclude_tools,
        )
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if model.no_chat is not None:
        log.warning("%s: chats will be routed by approximate knowledge: %s", key, model.no_chat)
    if model.dated:
        log.info("%s: the chat template tells the date; this machine's and the engines' must be the same", key)
    return model


def fingerprint(config: ExactConfig) -> bytes:
    """Of what the keys of blocks depend on beside the secret: how they are matched, and what ids spell."""
    digest = hashlib.blake2b(config.mode.encode(), digest_size=16)
    for name, told in sorted({**config.tokenizers, "": config.tokenizer}.items()):
        if told is None:
            continue
        folder = Path(told.folder if isinstance(told, TokenizerSpec) else told)
        digest.update(b"\0model\0" + name.encode())
        for file in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / file
            digest.update(b"\0file\0" + (hashlib.blake2b(path.read_bytes()).digest() if path.is_file() else b""))
    return digest.digest()


class ExactMode:
    """The parts, for `app` to join with the rest. secret: of the process, so that nobody can craft equal prefixes.

    models_of: endpoint name -> the model names it serves, as far as they are known. Raises ConfigError.
    """

    def __init__(self, config: ExactConfig, secret: bytes) -> None:
        self.models = load_models(config)
        if config.mode == "tokens" and self.models.single is None:
            raise ConfigError("exact.by: tokens needs exactly one tokenizer; give it with --tokenizer DIR")
        if config.snapshot is not None:  # its hashes must mean the same to the next process
            secret = read_key(Path(config.snapshot))
        self.config = config
        self.secret = secret
        self.post = EnginePost()
        self._hasher = PrefixHasher(secret)
        self._learned = Vocabulary()
        self._learners: dict[str, Learner] = {}
        self._reader: Reader | None = None

    def knowledge(self, models_of: ModelsOf) -> Exact:
        """The index, its blocks spelled as the reader spells prompts."""
        index = self._index()
        if self.config.mode == "tokens":
            return Exact(index, ByTokens(self._hasher))
        return Exact(index, ByBytes(self._hasher, lambda name: self._vocabulary(models_of(name))))

    def snapshots(self, scheduler: Scheduler, events: KvEventSource, idle: Callable[[], bool]) -> Snapshots | None:
        """What saves the index and takes it up again, where that is asked for."""
        if self.config.snapshot is None or scheduler.exact is None:
            return None
        return Snapshots(
            Path(self.config.snapshot),
            secret=self.secret,
            fingerprint=fingerprint(self.config),
            exact=scheduler.exact,
            events=events,
            idle=idle,
            rows=scheduler.pool,
            fresh=self._index,
            interval=self.config.snapshot_interval_s,
        )

    def _index(self) -> PreciseIndex:
        return PreciseIndex(self.config.budget_bytes, secret=self.secret)

    def reader(self, is_adapter: Callable[[str], bool]) -> Reader:
        """Reads requests with the tokenizers at hand, or by asking an engine where there are none."""
        budget, single = self.config.budget_ms / 1000.0, self.models.single
        if not self.models.known:
            remote = RemotePrompts(self.post.any, self._learned)
            self._reader = Reader(self._hasher, remote=remote, is_adapter=is_adapter, budget=budget)
            return self._reader
        whole = single.whole() if self.config.mode == "tokens" and single is not None else None
        self._reader = Reader(self._hasher, prompts=self.models, whole=whole, is_adapter=is_adapter, budget=budget)
        return self._reader

    def readings(self) -> dict[str, float]:
        """Prompts by how they were read."""
        stats = None if self._reader is None else self._reader.stats
        if stats is None:
            return {}
        return {name: getattr(stats, name) for name in ("read", "unreadable", "late", "busy", "failed")}

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
