"""The live line of a run: on stderr, and only when that is a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from picker.load.schedule import Progress

OnProgress = Callable[[Progress], None]

# Seconds that the rate is taken over: short enough to see a server stall, long enough not to flicker.
_WINDOW = 5.0


@contextmanager
def live_line(
    label: str, console: Console | None = None, *, seconds: float | None = None
) -> Iterator[OnProgress | None]:
    """What to give `drive` as `on_progress`; None where nobody watches. console: instead of stderr.

    seconds: how long the plan sends, by the clock; without it what remains is guessed from what is done.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    # Refreshed by the run itself: rich's own thread would wake up beside the event loop that measures.
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[words]}"),
        TextColumn("{task.fields[failed]}"),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=0, words="", failed="")
        speed = _Speed()

        def show(progress: Progress) -> None:
            failed = f"failed {progress.failed}"
            bar.update(
                task,
                total=progress.planned,
                completed=progress.done,
                words=words(progress, speed.after(progress), seconds),
                failed=f"[red]{failed}[/]" if progress.failed else failed,
                refresh=True,
            )

        yield show


class _Speed:
    """Requests answered a second, over the last few."""

    def __init__(self) -> None:
        self._seen = deque([(0.0, 0)])  # elapsed, done

    def after(self, progress: Progress) -> float | None:
        self._seen.append((progress.elapsed, progress.done))
        while progress.elapsed - self._seen[1][0] >= _WINDOW:
            self._seen.popleft()
        before, done = self._seen[0]
        passed = progress.elapsed - before
        return (progress.done - done) / passed if passed > 0 else None


def words(progress: Progress, rate: float | None, seconds: float | None) -> str:
    """Rate, requests in flight, first tokens and time, for the line."""
    parts = [f"{rate:.1f}/s"] if rate is not None else []
    parts.append(f"in flight {progress.in_flight}")
    ttft = progress.ttft
    if ttft is not None:
        parts.append(f"TTFT {ttft:.2f} s" if ttft >= 1 else f"TTFT {ttft * 1000:.0f} ms")
    left = remaining(progress, seconds)
    parts.append(_clock(progress.elapsed) + (f" of {_clock(progress.elapsed + left)}" if left is not None else ""))
    return "  ".join(parts)


def remaining(progress: Progress, seconds: float | None) -> float | None:
    """Seconds until the last request is sent, or answered where nobody knows when that is."""
    if seconds is not None:
        return max(0.0, seconds - progress.elapsed)
    if not progress.done:
        return None
    return progress.elapsed * max(0, progress.planned - progress.done) / progress.done


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
