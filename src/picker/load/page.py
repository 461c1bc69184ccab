"""A page of HTML in one file that asks for nothing: its parts, and how they become text.

What stands on it is decided by `run_page` and `compare_page`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from picker.load.measured import Measured
from picker.load.plots import PALETTE

# Of a load's shape, what stands beside it already.
_TOLD = ("workload", "seed")


@dataclass(frozen=True, slots=True)
class Cell:
    """look: `win`, `loss`, `words` (text that may wrap), or nothing."""

    text: str
    look: str = ""


Row = tuple[str, tuple[Cell, ...]]


def row(heading: str, *cells: Cell) -> Row:
    return heading, cells


@dataclass(frozen=True, slots=True)
class Table:
    """headings: of every column, the rows' own headings among them."""

    headings: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """plots: SVG."""

    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """lines: (what, text) of where the figures come from. notes: what a reader must know first. end: last words."""

    title: str
    lines: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    end: str = ""


def html(page: Page) -> str:
    """The page's text."""
    environment = Environment(
        loader=PackageLoader("picker.load", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        page=page, light=PALETTE.properties(dark=False), dark=PALETTE.properties(dark=True)
    )


def origins(runs: Sequence[tuple[str, Measured]]) -> list[tuple[str, str]]:
    """Where several named runs come from; what is the same of all is told once."""
    each = [dict(origin_lines(run)) for _, run in runs]
    found: list[tuple[str, str]] = []
    for what in dict.fromkeys(what for lines in each for what in lines):
        texts = [lines.get(what, "") for lines in each]
        if len(set(texts)) == 1:
            found.append((what, texts[0]))
        else:
            found += [(f"{what} of {name}", text) for (name, _), text in zip(runs, texts, strict=True) if text]
    return found


def origin_lines(measured: Measured) -> list[tuple[str, str]]:
    """Where one run comes from: (what, text)."""
    origin, machine = measured.origin, measured.origin.machine
    lines = [
        ("command", origin.command),
        ("server", f"{origin.url}, model {origin.model}" if origin.model else origin.url),
        ("load", _load(measured)),
        ("started", origin.started),
        ("machine", ", ".join(f"{part}" for part in _machine(machine))),
        ("picker", str(machine.get("picker", "")) + (f", commit {c}" if (c := machine.get("commit")) else "")),
    ]
    return [(what, text) for what, text in lines if text]


def _load(measured: Measured) -> str:
    shape = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in measured.origin.shape.items()
        if name not in _TOLD and value is not None
    )
    parts = (measured.workload, shape, f"seed {measured.origin.seed}" if measured.origin.seed is not None else "")
    return ", ".join(filter(None, parts))


def _machine(machine: object) -> list[str]:
    if not isinstance(machine, dict) or not machine:
        return []
    known = [str(machine[name]) for name in ("cpu", "system") if machine.get(name)]
    cores, python = machine.get("cores"), machine.get("python")
    return [*known, *([f"{cores} cores"] if cores else []), *([f"Python {python}"] if python else [])]
