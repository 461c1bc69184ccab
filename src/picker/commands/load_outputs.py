"""Files that a load run leaves: the run itself, a page, a benchmark report. What cannot be written takes nothing along.

Whatever can be known to fail is refused before the load begins; what fails afterwards, such as a full disk, is told in
a line, and everything else is still written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
import yaml

from picker.bench import machine
from picker.errors import ConfigError
from picker.load import report, saved
from picker.load.benchmark_report import benchmark_report
from picker.load.measured import Measured, Origin, measured
from picker.load.schedule import Run
from picker.load.slo import Slo, goodput

F = TypeVar("F", bound=Callable[..., Any])

_REPORT_SUFFIXES = (".json", ".yaml", ".yml")
_HIDDEN = "..."


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files to write, None for none. slo: what the figures are held against."""

    save: Path | None = None
    html: Path | None = None
    report: Path | None = None
    slo: Slo | None = None


def output_options(command: F) -> F:
    """The flags of `outputs`."""
    options = (
        click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep the run, for `compare`."),
        *page_options(),
        click.option(
            "--report",
            "report_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write llm-d-benchmark's report v0.2.1 (.json or .yaml).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def page_options() -> tuple[Callable[[F], F], ...]:
    """The flags of whoever writes a page."""
    return (
        click.option(
            "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with plots, in one file."
        ),
        click.option("--slo", metavar="LIMITS", help="Objectives, such as ttft=0.5,tpot=50ms,e2e=10: adds goodput."),
    )


def outputs(
    *, save: Path | None = None, html: Path | None = None, report_file: Path | None = None, slo: str | None = None
) -> Outputs:
    """What the flags ask for. Raises ConfigError for what cannot be written in any case."""
    for flag, path in (("save", save), ("html", html), ("report", report_file)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{flag} {path}: there is no folder {path.absolute().parent}")
    if report_file is not None and report_file.suffix not in _REPORT_SUFFIXES:
        raise ConfigError(f"--report {report_file}: the name must end in {', '.join(_REPORT_SUFFIXES)}")
    if html is not None:
        _check_plots()
    return Outputs(save, html, report_file, Slo.parse(slo) if slo is not None else None)


def _check_plots() -> None:
    for name in ("jinja2", "matplotlib"):
        if find_spec(name) is None:
            raise ConfigError(f"--html needs {name}: pip install matplotlib jinja2")


def measured_now(run: Run, *, url: str, model: str | None, shape: Mapping[str, Any], notes: Sequence[str]) -> Measured:
    """A run that has just ended, with what it was. shape: the flags that decided what was sent."""
    began = datetime.now(UTC) - timedelta(seconds=time.monotonic() - run.started_at)
    told = {name: _plain(value) for name, value in sorted(shape.items()) if value is not None and name != "seed"}
    origin = Origin(
        command=command_line(sys.argv),
        url=without_password(url),
        model=model,
        started=began.isoformat(timespec="milliseconds"),
        machine=machine.describe(),
        seed=shape.get("seed"),
        shape=told,
    )
    return measured(run, origin, notes)


def _plain(value: object) -> object:
    if isinstance(value, (bool, int, float, str)):
        return value
    return value.name if isinstance(value, Path) else str(value)


def command_line(arguments: Sequence[str]) -> str:
    """The command as it was typed, without keys and passwords."""
    words, hide = ["picker"], False
    for word in arguments[1:]:
        flag, equals, _ = word.partition("=")
        key = flag == "--api-key"
        words.append(_HIDDEN if hide else f"{flag}={_HIDDEN}" if key and equals else without_password(word))
        hide = key and not equals
    return shlex.join(words)


def without_password(url: str) -> str:
    """The URL without its user information; any other word as it is."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    if not parts.scheme or "@" not in parts.netloc:
        return url
    return parts._replace(netloc=f"{_HIDDEN}@{parts.netloc.rpartition('@')[2]}").geturl()


def figures(run: Measured, slo: Slo | None) -> report.Row:
    """The row of `--json`; with objectives, their goodput beside it."""
    found = goodput(run.requests, slo, run.duration) if slo is not None else None
    if slo is None or found is None:
        return dict(run.figures)
    return {**run.figures, "goodput": {"slo_s": dict(slo.objectives()), **dataclasses.asdict(found)}}


# --- writing -------------------------------------------------------------------------------------------------


def write(wanted: Outputs, run: Measured) -> bool:
    """Write each file. False when one could not be, which is told on stderr."""
    todo: list[tuple[str, Path | None, Callable[[], str]]] = [
        ("--save", wanted.save, lambda: saved.dump(run)),
        ("--report", wanted.report, lambda: _report(run, wanted.report)),
        ("--html", wanted.html, lambda: _page(run, wanted.slo)),
    ]
    written = [put(flag, path, text) for flag, path, text in todo if path is not None]
    return all(written)


def put(flag: str, path: Path, text: Callable[[], str]) -> bool:
    """Write one file whole or not at all. False when it could not be written, which is told on stderr."""
    return attempt(f"{flag} {path}", lambda: _replace(path, text().encode()))


def attempt(what: str, act: Callable[[], object]) -> bool:
    """False when the system refused, which is told on stderr."""
    try:
        act()
    except OSError as error:
        click.echo(f"picker: {what}: not written: {error.strerror or error}", err=True)
        return False
    return True


def _replace(path: Path, data: bytes) -> None:
    """An older file stays as it was until the new one is complete; devices and pipes are written to."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _report(run: Measured, path: Path | None) -> str:
    found = benchmark_report(run)
    if path is not None and path.suffix == ".json":
        return json.dumps(found, indent=2, allow_nan=False) + "\n"
    return str(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


def _page(run: Measured, slo: Slo | None) -> str:
    from picker.load.run_page import render  # the extra `report`

    return render(run, slo)
