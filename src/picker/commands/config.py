"""`picker config`: the effective configuration, its schema, whether a file is valid, and other projects' files."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import yaml

from picker import config as configuration
from picker.config import Config, ReplicasConfig
from picker.deciders import build_saturation, build_scheduler
from picker.discovery import build_endpoint
from picker.errors import ConfigError
from picker.frontends.keys import load_keys
from picker.imports import IMPORTERS, import_text, import_words
from picker.imports.report import Imported
from picker.replicas.service import SECRET, parse_peer, read_secret
from picker.sources.file import load_endpoints, read_key
from picker.sources.static import require_unique_names

# What the start reads of files that a configuration names; with what, where that takes no other key.
_READERS: dict[str, Callable[[Path], object]] = {
    "endpoints_file": load_endpoints,
    "keys.file": load_keys,
    "admin.keys_file": load_keys,
    "admin.token_file": read_key,
    "upstream.api_key_file": read_key,
}
_FILES = (
    *(*_READERS, "replicas.secret_file", "kubernetes.kubeconfig", "proxy.envoy_binary"),
    *("connections.tls_cert", "connections.tls_key", "connections.tls_client_ca", "admin.tls_cert", "admin.tls_key"),
    *("upstream.ca", "upstream.cert", "upstream.key", "epp.cert_path", "epp.client_ca_path"),
    *("api.cert_path", "api.client_ca_path"),
)


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
    """Check FILE as `picker proxy` and `picker epp` would on start; exit status 2 when it cannot be used.

    What the start needs beside FILE and is not found on this machine (files that it names, the secret of replicas) is
    told as a note.
    """
    config = configuration.load_config(file)
    check_parts(config)
    notes, count = list(missing(config)), len(config.endpoints)
    if as_json:
        said = {"valid": True, "file": str(file), "endpoints": count, "policy": config.policy, "notes": notes}
        click.echo(json.dumps(said))
        return
    click.echo(f"{file}: valid; {count} endpoints, policy {config.policy}")
    for note in notes:
        click.echo(f"  {note}")


def check_parts(config: Config) -> None:
    """Make what the start makes of a configuration, without touching anything. Raises ConfigError as it would."""
    build_scheduler(config)
    build_saturation(config)
    require_unique_names([build_endpoint(spec) for spec in config.endpoints])
    _check_replicas(config.replicas)
    for key, read in _READERS.items():
        path = _path(config, key)
        if path is not None and path.exists():
            read(path)


def _check_replicas(config: ReplicasConfig) -> None:
    """Of a secret that is not in the file, and not here either, only the start can know."""
    if not config.wanted:
        return
    for peer in config.peers:
        parse_peer(peer, config.port)
    here = config.secret_file is not None and Path(config.secret_file).exists()
    if config.secret is not None or here or (config.secret_file is None and SECRET in os.environ):
        read_secret(config)


def missing(config: Config) -> Iterator[str]:
    """What the start needs and is not in the file, nor on this machine; a sentence for each."""
    if not (config.endpoints or config.endpoints_file or config.kubernetes.wanted):
        yield "no endpoints: they have to come by flags (--endpoint, --endpoints-file, or --pool-name of picker epp)"
    replicas = config.replicas
    if replicas.wanted and replicas.secret is None and replicas.secret_file is None and SECRET not in os.environ:
        yield f"replicas: their secret has to come by {SECRET}, which is not set here"
    for key in _FILES:
        path = _path(config, key)
        if path is not None and not path.exists():
            yield f"{key}: {path} is not on this machine"


def _path(config: Config, key: str) -> Path | None:
    name = operator.attrgetter(key)(config)
    return None if name is None else Path(name)


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
        _write(output, f"# Imported from {name} ({imported.project}).\n{text}")
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
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {file}: it is not UTF-8 text") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from None


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
