"""Picker reads prompts as the engine does: the same bytes, and tokens that end in the same places."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.folder import read_folder
from picker.tokenizers.prompt import LocalPrompts
from picker.tokenizers.template import ChatTemplate
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import Seams
from picker.wire.openai import parse_call
from real_vllm.script import CHAT, COMPLETIONS, Answer, Step, Steps, play, script
from real_vllm.workload import workload

_SCRIPTED, _MIXED = 46, 100
_EVERY = 5  # every so many bytes picker is asked whether a token ends there, and wherever one does


@dataclass(slots=True)
class Tally:
    """Prompts compared; token ends that picker was asked about, and those that it could not make out."""

    prompts: int = 0
    ends: int = 0
    unsure: int = 0


@pytest.fixture(scope="module")
def prompts(model: Path) -> LocalPrompts:
    files = read_folder(model)
    tokenizer = TextTokenizer(files.tokenizer, files.config)
    template = ChatTemplate(
        files.templates, special_tokens=files.special_tokens, seconds=time.monotonic, today=datetime.now
    )
    return LocalPrompts(tokenizer, Seams(tokenizer), template)


@pytest.mark.parametrize("source", ["script", "workload"])
def test_prompts_are_read_as_the_engine_reads_them(source: str, client: httpx.Client, prompts: LocalPrompts) -> None:
    steps, least = (script(), _SCRIPTED) if source == "script" else (workload(2, _MIXED), _MIXED)
    tally = Tally()
    for step, answer in play(client, telling(steps)):
        if step.path in (CHAT, COMPLETIONS) and answer.status == 200:
            compare(step, prompt_ids(answer), prompts, tally)
    assert tally.prompts >= least
    assert tally.unsure <= tally.ends / 1000, tally


def compare(step: Step, ids: list[int], prompts: LocalPrompts, tally: Tally) -> None:
    try:
        read = prompts.read(parse_call(step.path, json.dumps(step.body).encode()))
    except Unreadable:
        assert step.name == "own-ids"
        return
    spelling = prompts.tokenizer.vocabulary.spell(ids)
    assert spelling is not None
    assert read.data == spelling.data, step.name
    ends = {0, *spelling.ends.tolist()}
    said = {position for position in ends | set(range(0, len(read.data), _EVERY)) if read.splits(position)}
    assert said <= ends, step.name
    tally.prompts += 1
    tally.ends += len(ends)
    tally.unsure += len(ends - said)


def prompt_ids(answer: Answer) -> list[int]:
    """The tokens of the leading prompt, as the engine says."""
    ids: list[int] = answer.body.get("prompt_token_ids") or answer.body["choices"][0]["prompt_token_ids"]
    return ids


def telling(steps: Steps) -> Steps:
    """The same requests, each asking for its prompt's tokens too."""
    step = next(steps)
    while True:
        answer = yield Step(step.name, step.path, step.body | {"return_token_ids": True})
        try:
            step = steps.send(answer)
        except StopIteration:
            return
