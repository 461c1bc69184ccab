"""The live line of a run: on stderr, and only when that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from picker.load.schedule import Progress

OnProgress = Callable[[Progress], None]


@contextmanager
def live_line(label: str, console: Console | None = None) -> Iterator[OnProgress | None]:
    """What to give `drive` as `on_progress`; None where nobody watches. console: instead of stderr."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    # Refreshed by the run itself: rich's own thread would wake up beside the event loop that measures.
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  in flight {task.fields[in_flight]}"),
        TextColumn("[red]failed {task.fields[failed]}", style="red"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=0, in_flight=0, failed=0)

        def show(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.planned,
                completed=progress.done,
                in_flight=progress.in_flight,
                failed=progress.failed,
                refresh=True,
            )

        yield show
