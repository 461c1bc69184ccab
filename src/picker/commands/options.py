"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from picker.config import EXACT_BY, POLICIES, AdminConfig, Config, load_config, override
from picker.errors import ConfigError
from picker.frontends.keys import named_key
from picker.sources.file import read_key

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

ADMIN_VARIABLE = "PICKER_ADMIN_KEY"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Size(click.ParamType[int]):
    """Bytes, with an optional unit: 1048576, 512MiB, 2G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(value), re.IGNORECASE)
        unit = found and _UNITS.get(found[2].lower())
        if not found or unit is None:
            self.fail(f"{value!r} is not a size; write for example 512MiB", param, ctx)
        return int(float(found[1]) * unit)


def routing_options(command: F) -> F:
    """What every picker that routes needs: endpoints, policy, memory."""
    options = (
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML configuration file."),
        click.option("--endpoint", "endpoints", multiple=True, metavar="URL", help="A vLLM server; repeat for each."),
        click.option("--endpoints-file", metavar="FILE", help="YAML list of endpoints, watched for changes."),
        click.option("--policy", type=click.Choice(POLICIES), metavar="NAME", help=f"One of {', '.join(POLICIES)}."),
        click.option("--index-budget", type=Size(), metavar="SIZE", help="Memory for prefix knowledge.  [512MiB]"),
        click.option("--tokenizer", metavar="DIR", help="The model's tokenizer, to follow KV events exactly."),
        click.option("--exact-by", type=click.Choice(EXACT_BY), help="How prompts are matched with them.  [auto]"),
        click.option("--kv-events", metavar="URL", help="Where engines publish, if not told: tcp://{host}:5557."),
        click.option("--kv-replay", metavar="URL", help="Where they replay events, likewise."),
        click.option("--exact-snapshot", metavar="FILE", help="Save what they tell there, and begin with it."),
        click.option("--scrape-interval", type=float, metavar="S", help="Seconds between metric scrapes.  [1]"),
        click.option("--max-inflight", type=int, metavar="N", help="Requests per endpoint before others queue here."),
        click.option("--api-port", type=int, metavar="N", help="Serve picker's own gRPC API there, too.  [off]"),
        click.option("--api-host", metavar="ADDR", help="Address of it.  [127.0.0.1]"),
        click.option("--api-cert-path", metavar="DIR", help="Serve it by TLS: folder with tls.crt and tls.key."),
        click.option("--seed", type=int, help="Make random choices repeatable."),
        click.option("--log-level", default="info", show_default=True, help="debug, info, warning or error."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def routing_config(
    more: Mapping[str, Any],
    *,
    load: Callable[[Path | None], Config] = load_config,
    config_file: Path | None,
    endpoints: tuple[str, ...],
    endpoints_file: str | None,
    policy: str | None,
    index_budget: int | None,
    scrape_interval: float | None,
    tokenizer: str | None,
    exact_by: str | None,
    kv_events: str | None,
    kv_replay: str | None,
    exact_snapshot: str | None,
    max_inflight: int | None,
    api_port: int | None,
    api_host: str | None,
    api_cert_path: str | None,
    seed: int | None,
    log_level: str,
) -> Config:
    """The configuration that the file and the shared flags describe. more: dotted keys of further flags.

    load: reads the file, for commands that understand other projects' files, too.
    """
    start_logging(log_level)
    config = override(
        load(config_file),
        {
            "endpoints": list(endpoints) or None,
            "endpoints_file": endpoints_file,
            "policy": policy,
            "index.budget_bytes": index_budget,
            "exact.tokenizer": tokenizer,
            "exact.by": exact_by,
            "exact.events": kv_events,
            "exact.replay": kv_replay,
            "exact.snapshot": exact_snapshot,
            "scrape.interval_s": scrape_interval,
            "queue.max_inflight": max_inflight,
            "api.port": api_port,
            "api.host": api_host,
            "api.cert_path": api_cert_path,
            "seed": seed,
            **more,
        },
    )
    token = admin_token(config.admin)
    return msgspec.structs.replace(config, admin=msgspec.structs.replace(config.admin, token=token))


def admin_token(config: AdminConfig) -> str | None:
    """What the admin API asks for: of the configuration, its file, or the environment.

    Raises ConfigError for a file that does not do.
    """
    if config.token_file is not None:
        return read_key(Path(config.token_file))
    if (given := config.token or secret_variable(ADMIN_VARIABLE)) is not None:
        named_key("admin", given)
    return given


def secret_variable(name: str) -> str | None:
    """A secret of the environment; None where the variable is not set.

    Raises ConfigError for one that is set and empty, as `${KEY}` of a compose file makes it where KEY is not set: taken
    for none it would open a door that somebody meant to be closed.
    """
    given = os.environ.get(name)
    if given is not None and not given.strip():
        raise ConfigError(f"{name}: it is set and empty, which keeps nobody out; unset it, or give a key")
    return given


def require_own_ports(config: Config, flags: Mapping[str, str]) -> None:
    """Raise ConfigError where two doors of one process would have the same port.

    flags: key of each port ("admin.port") -> its flag. A door that is not opened is to be left out, or has no port.
    """
    found: list[tuple[str, str, int]] = []
    for key in flags:
        section, _, _ = key.partition(".")
        host, port = getattr(config, section).host, operator.attrgetter(key)(config)
        for other, there, number in found:
            if port and port == number and _meet(host, there):
                raise ConfigError(
                    f"{other} and {key} are both {port}; each needs a port of its own: see {flags[other]}, {flags[key]}"
                )
        if port is not None:
            found.append((key, host, port))


def _meet(one: str, other: str) -> bool:
    """Whether sockets on two addresses of this machine are in each other's way on one port."""
    hosts = {"127.0.0.1" if each.lower() in ("localhost", "::1") else each.lower() for each in (one, other)}
    return len(hosts) == 1 or not hosts.isdisjoint(("0.0.0.0", "::"))


def start_logging(level: str) -> None:
    """Log lines on stderr; stdout belongs to results."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"--log-level: {level!r} is not one of debug, info, warning, error")
    logging.basicConfig(
        level=number, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel(max(number, logging.WARNING))


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it is installed; of errors that came together the first one is raised."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def first_error(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error that is not itself a group."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
