from __future__ import annotations

import io

from rich.console import Console

from picker.load.live import live_line
from picker.load.schedule import Progress


def test_a_terminal_sees_how_far_the_run_is() -> None:
    screen = io.StringIO()
    with live_line("shared-prefix", Console(file=screen, force_terminal=True, width=100)) as show:
        assert show is not None
        show(Progress(planned=120, sent=50, done=40, failed=3, elapsed=2.0))
    for words in ("shared-prefix", "40/120", "in flight 10", "failed 3"):
        assert words in screen.getvalue()


def test_without_a_terminal_there_is_nothing_to_show() -> None:
    screen = io.StringIO()
    with live_line("shared-prefix", Console(file=screen)) as show:
        assert show is None
    assert screen.getvalue() == ""
