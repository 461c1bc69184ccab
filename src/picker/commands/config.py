"""`picker config`: the effective configuration, its schema, whether a file is valid, and other projects' files."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from picker import config as configuration
from picker.deciders import build_saturation, build_scheduler
from picker.discovery import build_endpoint
from picker.errors import ConfigError
from picker.imports import IMPORTERS, import_text, import_words
from picker.imports.report import Imported


@click.group()
def command() -> None:
    """Show, describe, validate or import the configuration."""


@command.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
def show(file: Path | None, as_json: bool) -> None:
    """The effective configuration: FILE over the defaults, secrets masked."""
    values = configuration.to_values(configuration.load_config(file))
    click.echo(json.dumps(values) if as_json else yaml.safe_dump(values, sort_keys=False).rstrip())


@command.command()
def schema() -> None:
    """The JSON schema of the configuration file."""
    click.echo(json.dumps(configuration.schema(), indent=2))


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def validate(file: Path, as_json: bool) -> None:
    """Check FILE as `picker proxy` and `picker epp` would on start; exit status 2 when it cannot be used."""
    config = configuration.load_config(file)
    build_scheduler(config)
    build_saturation(config)
    endpoints = [build_endpoint(spec) for spec in config.endpoints]
    if as_json:
        click.echo(json.dumps({"valid": True, "file": str(file), "endpoints": len(endpoints), "policy": config.policy}))
    else:
        click.echo(f"{file}: valid; {len(endpoints)} endpoints, policy {config.policy}")


@command.command("import")
@click.argument("source", nargs=-1, required=True, metavar="FILE | -- COMMAND...")
@click.option("--from", "project", type=click.Choice(list(IMPORTERS)), help="Whose it is.  [told by its content]")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the configuration there.")
@click.option("--strict", is_flag=True, help="Exit status 1 when anything has no counterpart.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: the configuration and the report.")
def import_(source: tuple[str, ...], project: str | None, output: Path | None, strict: bool, as_json: bool) -> None:
    """Read another project's configuration or command line as picker's, and say what became of each part.

    FILE: an EndpointPickerConfig, a config.yaml of LiteLLM, or a script that starts vllm-router, sglang-router, smg or
    production-stack's router. A command line goes behind a double dash:

      picker config import --from vllm-router -- --worker-urls http://a:8000 --policy cache_aware

    The configuration goes to stdout, or to --output, the report to stderr. `picker epp --config FILE` reads an
    EndpointPickerConfig as it is, too.
    """
    name, imported = _imported(source, project)
    config = configuration.from_values(imported.values)
    build_scheduler(config)
    build_saturation(config)
    for spec in config.endpoints:
        build_endpoint(spec)
    text = yaml.safe_dump(dict(imported.values), sort_keys=False)
    if output is not None:
        output.write_text(f"# Imported from {name} ({imported.project}).\n{text}", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(_as_json(imported)))
    else:
        if output is None:
            click.echo(text.rstrip())
        _print_report(imported)
    if strict and imported.counts()["missing"]:
        raise click.exceptions.Exit(1)


def _imported(source: tuple[str, ...], project: str | None) -> tuple[str, Imported]:
    """What it is called, and what it says."""
    if len(source) > 1 or source[0].startswith("-"):
        return "a command line", import_words(source, project)
    file = Path(source[0])
    try:
        return file.name, import_text(file.read_text(encoding="utf-8"), project)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _as_json(imported: Imported) -> dict[str, object]:
    report = [{"where": line.where, "fate": line.fate.value, "says": line.says} for line in imported.lines]
    return {
        "from": imported.project,
        "config": dict(imported.values),
        "report": report,
        "counts": imported.counts(),
    }


def _print_report(imported: Imported) -> None:
    """On stderr: stdout may be the configuration."""
    for line in imported.lines:
        click.echo(f"{line.fate.value:<9} {line.where}: {line.says}", err=True)
    counts = ", ".join(f"{count} {fate}" for fate, count in imported.counts().items())
    click.echo(f"{len(imported.lines)} parts: {counts}", err=True)
