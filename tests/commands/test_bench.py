from __future__ import annotations

import pytest

from picker.bench import machine
from picker.commands.bench import show


@pytest.mark.parametrize(("commit", "shown"), [(None, False), ("abc1234", True)])
def test_the_machine_is_named_and_the_commit_where_there_is_one(
    commit: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "describe", lambda: {"cpu": "some processor", "commit": commit})
    show("pick", [{"endpoints": 10}], as_json=False)
    told = capsys.readouterr().out
    assert "cpu some processor" in told
    assert ("commit" in told) is shown
