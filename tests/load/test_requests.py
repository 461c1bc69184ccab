from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from load.fake_openai import DONE, FakeAnswer, Json, chunk, fake_server, usage
from picker.errors import ConfigError
from picker.load.client import Client, Target
from picker.load.requests import Asked, RequestFormat, load, sniff
from picker.load.schedule import Pace, drive
from picker.load.text import Words
from picker.load.workload import Plan


def written(folder: Path, *entries: Any, name: str = "r.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


CHAT = {"model": "theirs", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 7}


def read(path: Path, kind: RequestFormat, max_tokens: int | None = None) -> tuple[Asked, list[str]]:
    broken: list[str] = []
    return load(path, kind, max_tokens=max_tokens, on_broken=broken.append), broken


def test_openai_bodies_are_read_bare_and_in_batch_files(tmp_path: Path) -> None:
    batch = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "once", "max_tokens": 3}}
    asked, broken = read(written(tmp_path, CHAT, batch), RequestFormat.OPENAI)
    first, second = (each.turns[0] for each in asked.conversations)
    assert (broken, asked.timed) == ([], False)
    assert json.loads(first.raw or b"") == CHAT
    assert json.loads(second.raw or b"") == {"prompt": "once", "max_tokens": 3}
    assert (first.max_tokens, second.max_tokens) == (7, 3)


def test_times_are_kept_and_not_sent(tmp_path: Path) -> None:
    path = written(tmp_path, {**CHAT, "timestamp": 1700000010.5}, {**CHAT, "timestamp": 1700000010.0})
    asked, _ = read(path, RequestFormat.OPENAI)
    assert asked.timed
    assert [each.at for each in asked.conversations] == [0.0, 0.5]
    assert b"timestamp" not in (asked.conversations[0].turns[0].raw or b"")


def test_answers_are_cut_to_the_longest_wanted(tmp_path: Path) -> None:
    asked, _ = read(written(tmp_path, CHAT, {"prompt": "x"}), RequestFormat.OPENAI, max_tokens=5)
    assert [json.loads(each.turns[0].raw or b"")["max_tokens"] for each in asked.conversations] == [5, 5]


def test_sharegpt_conversations_become_turns_with_recorded_lengths(tmp_path: Path) -> None:
    said = [("human", "how?"), ("gpt", "like this " * 8), ("human", "and then?"), ("gpt", "done")]
    entry = {"id": "a", "conversations": [{"from": who, "value": text} for who, text in said]}
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([entry, {"id": "b", "conversations": [{"from": "human", "value": "alone"}]}]))
    assert sniff(path) is RequestFormat.SHAREGPT
    asked, broken = read(path, RequestFormat.SHAREGPT)
    (conversation,) = asked.conversations
    assert [(turn.text, turn.max_tokens) for turn in conversation.turns] == [
        ((Words("how?"),), 20),
        ((Words("and then?"),), 1),
    ]
    assert broken == [f"{path}, entry 2: has no question with an answer"]


def test_broken_lines_are_named_and_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, CHAT, "{", "[1]", {"model": "x"}, CHAT)
    asked, broken = read(path, RequestFormat.OPENAI)
    assert len(asked.conversations) == 2
    assert [complaint.split(": ")[0] for complaint in broken] == [f"{path}, line {n}" for n in (2, 3, 4)]


def test_a_file_without_any_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no request"):
        read(written(tmp_path, {"model": "x"}), RequestFormat.OPENAI)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "nowhere", RequestFormat.OPENAI)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (json.dumps(CHAT), RequestFormat.OPENAI),
        (json.dumps({"prompt": "x"}), RequestFormat.OPENAI),
        (json.dumps({"conversations": []}), RequestFormat.SHAREGPT),
        (json.dumps({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}), None),
        (json.dumps({"time": "2026-01-01T00:00:00Z", "prompt_tokens": 1, "output_tokens": 2}), None),
    ],
)
def test_the_format_follows_from_the_first_line(line: str, kind: RequestFormat | None, tmp_path: Path) -> None:
    assert sniff(written(tmp_path, line)) is kind


async def test_a_body_is_sent_to_its_endpoint_with_the_runs_model_and_a_stream(tmp_path: Path) -> None:
    async def answer(request: Json, answer: FakeAnswer) -> None:
        await answer.start()
        await answer.send(chunk("x") + usage(1, 1) + DONE)

    bodies = [{**CHAT, "temperature": 0.7, "stream": False}, {"prompt": "once", "max_tokens": 3}]
    asked, _ = read(written(tmp_path, *bodies), RequestFormat.OPENAI)
    async with fake_server(answer) as server, Client(Target(server.url, model="ours")) as client:
        run = await drive(Plan("own", asked.conversations), client, Pace())
    chat, completion = sorted(server.requests, key=lambda request: "prompt" in request)
    assert run.failed == 0
    assert chat == {
        **CHAT,
        "model": "ours",
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert (completion["prompt"], completion["model"]) == ("once", "ours")
