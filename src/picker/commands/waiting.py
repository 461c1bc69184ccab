"""What somebody who waits is told on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """Gives what is to be called with how far it is. Where nobody watches, the first call alone is told."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _once(f"{what}: this takes a while")
        return
    with console.status(what) as status:
        yield lambda words: status.update(f"{what}: {words}")


def _once(line: str) -> Callable[[str], None]:
    lines = [line]

    def tell(words: str) -> None:
        while lines:
            click.echo(lines.pop(), err=True)

    return tell
