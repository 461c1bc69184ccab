"""`picker config`: the effective configuration, its schema, and whether a file is valid."""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from picker import config as configuration
from picker.app import build_endpoint, build_scheduler


@click.group()
def command() -> None:
    """Show, describe or validate the configuration."""


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
    endpoints = [build_endpoint(spec) for spec in config.endpoints]
    if as_json:
        click.echo(json.dumps({"valid": True, "file": str(file), "endpoints": len(endpoints), "policy": config.policy}))
    else:
        click.echo(f"{file}: valid; {len(endpoints)} endpoints, policy {config.policy}")
