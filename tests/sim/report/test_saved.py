from __future__ import annotations

import json
from pathlib import Path

import pytest

from picker.errors import ConfigError
from picker.sim.report.saved import load
from sim.rows import row


def saved(folder: Path, name: str, **payload: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"version": "1", "command": "picker simulate", **payload}), encoding="utf-8")
    return path


def test_files_are_joined_and_each_command_is_named_once(tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"{seed}.json", runs=[row("a", seed)]) for seed in (1, 2)]
    found = load(paths)
    assert [run["seed"] for run in found.runs] == [1, 2]
    assert (found.commands, found.versions) == (("picker simulate",), ("1",))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("policy,ttft", "is not JSON"),
        ("[]", "holds no runs"),
        ('{"runs": []}', "holds no runs"),
        ('{"runs": [1]}', "run 1 is no object"),
        ('{"runs": [{"policy": "a"}]}', "run 1 lacks scenario, load"),
        (json.dumps({"runs": [row("a"), row("a", seed="two")]}), "run 2 has a seed"),  # type: ignore[arg-type]
        (json.dumps({"runs": [row("a", load="much")]}), "run 1 has a load"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "runs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"runs\.json: {complaint}"):
        load([path])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: No such file"):
        load([tmp_path / "absent.json"])
