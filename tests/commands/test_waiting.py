from __future__ import annotations

import pytest

from picker.commands.waiting import telling


def test_where_nobody_watches_the_beginning_is_told_and_only_when_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with telling("finding a rate"):
        pass
    assert capsys.readouterr().err == ""
    with telling("finding a rate") as tell:
        tell("trying 1")
        tell("trying 2")
    assert capsys.readouterr().err == "finding a rate: this takes a while\n"
