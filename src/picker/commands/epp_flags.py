"""Flags of the endpoint picker that `picker epp` takes so that charts need no change, and what each is worth here.

Those with a counterpart become configuration; the others are accepted with one line that says why nothing follows. A
value that asks for what picker does anyway is accepted without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from picker.errors import ConfigError
from picker.imports.epp_schema import seconds

F = TypeVar("F", bound=Callable[..., Any])

_SWITCH, _TEXT = "switch", "text"


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. why: what to say when it is given; fine: values (in lower case) about which nothing is to be said.

    key: the configuration it becomes. many: it may be repeated. help: its line in the command's help; "": it has none.
    """

    name: str
    takes: str = _TEXT
    why: str = ""
    fine: tuple[str, ...] = ()
    key: str = ""
    many: bool = False
    help: str = ""

    @property
    def parameter(self) -> str:
        return "epp_" + self.name.strip("-").replace("-", "_")


_OF_METRICS = "metrics are named by the engine; use the names of vLLM, SGLang or TensorRT-LLM"

FLAGS = (
    # have a counterpart
    Flag("--pool-name", key="epp.pool_name", help="InferencePool of Kubernetes to serve."),
    Flag("--pool-namespace", key="epp.pool_namespace", help="Where it is.  [$NAMESPACE, then the pod's]"),
    Flag("--pool-group", key="kubernetes.group"),
    Flag("--endpoint-selector", key="kubernetes.selector"),
    Flag("--endpoint-target-ports", key="kubernetes.target_ports", many=True),
    Flag("--ha-enable-leader-election", _SWITCH, key="kubernetes.leader_election.enabled"),
    Flag("--refresh-metrics-interval", key="scrape.interval_s"),
    Flag("--drain-timeout", key="drain_timeout_s"),
    Flag(
        "--tls-min-version",
        key="epp.tls_min_version",
        why="TLS 1.2 is the least",
        fine=("", "versiontls12", "versiontls13", "1.2", "1.3"),
    ),
    # do what picker does anyway
    Flag("--allow-experimental-plugins", _SWITCH, fine=("true", "false")),
    Flag("--enable-cert-reload", _SWITCH, "certificates are always followed as they change", fine=("true",)),
    Flag("--refresh-prometheus-metrics-interval", fine=("0", "0s"), why="metrics are computed when they are scraped"),
    Flag("--grpc-max-send-msg-size", why="what is sent is cut into pieces of 62,000 bytes"),
    # have none
    Flag("--disable-endpoint-subset-filter", _SWITCH, "a subset hint always counts", fine=("false",)),
    Flag("--emit-endpoint-scores", _SWITCH, "scores are in /debug/decisions, not in metadata", fine=("false",)),
    Flag("--metrics-staleness-threshold", why="old values are shown with their age, not dropped"),
    Flag("--health-checking", _SWITCH, "health is served on --grpc-health-port only", fine=("false",)),
    Flag("--enable-pprof", _SWITCH, "there are no Go profiles to serve", fine=("false",)),
    Flag("--metrics-endpoint-auth", _SWITCH, "metrics are served without Kubernetes tokens", fine=("false",)),
    Flag("--metrics-client-ca-file", why="metrics are served without TLS"),
    Flag("--metrics-cert-dir", why="metrics are served without TLS"),
    Flag("--enable-grpc-stream-metrics", _SWITCH, "open streams are picker_extproc_streams", fine=("false",)),
    Flag("--tls-cipher-suites", why="Python's own choice of cipher suites is offered", many=True),
    Flag("--tracing", _SWITCH, "no traces are sent", fine=("false",)),
    Flag("--total-queued-requests-metric", why=_OF_METRICS),
    Flag("--total-running-requests-metric", why=_OF_METRICS),
    Flag("--kv-cache-usage-percentage-metric", why=_OF_METRICS),
    Flag("--lora-info-metric", why=_OF_METRICS),
    Flag("--cache-info-metric", why=_OF_METRICS),
    Flag(
        "--model-server-metrics-scheme",
        why="metrics are scraped by the scheme of the endpoint's address",
        fine=("http",),
    ),
    Flag("--model-server-metrics-path", why="metrics are scraped from /metrics", fine=("/metrics",)),
    Flag("--model-server-metrics-port", why="metrics are scraped from the port that serves requests", fine=("0",)),
    Flag("--model-server-metrics-https-insecure-skip-verify", _SWITCH, "the system's certificates decide"),
    Flag("--zap-encoder", why="log lines are text", fine=("console",)),
    Flag("--zap-devel", _SWITCH, "log lines look the same to everybody", fine=("false",)),
    Flag("--zap-stacktrace-level", why="tracebacks are logged with what was not expected"),
    Flag("--zap-time-encoding", why="log lines have their own time format"),
)

# How verbose the endpoint picker is from this -v or --zap-log-level on, and what that is here.
_DEBUG_FROM = 4
_LEVELS = {"debug": "debug", "info": "info", "error": "error", "warn": "warning", "panic": "error"}


def epp_flags(command: F) -> F:
    """Let a command take all of `FLAGS`; its help lists those that have a line for it."""
    for flag in reversed(FLAGS):
        optional: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if flag.takes == _SWITCH else {}
        shown: dict[str, Any] = {"help": flag.help, "metavar": "NAME"} if flag.help else {"hidden": True}
        option = click.option(flag.name, flag.parameter, multiple=flag.many, **shown, **optional)
        command = option(command)
    for names, parameter in ((("-v", "--v"), "epp_v"), (("--zap-log-level",), "epp_zap_log_level")):
        command = click.option(*names, parameter, hidden=True)(command)
    return command


def given_flags(parameters: dict[str, Any]) -> dict[str, str]:
    """Take the endpoint picker's flags out of a command's parameters: name -> value of those that were given."""
    given = {}
    for flag in FLAGS:
        value = parameters.pop(flag.parameter)
        if value not in (None, ()):
            text = value if isinstance(value, str) else ",".join(value)
            given[flag.name] = _boolean(flag.name, text) if flag.takes == _SWITCH else text
    return given


def _boolean(name: str, text: str) -> str:
    """As Go reads it."""
    for word in ("true", "false"):
        if text.lower() in (word, word[0], "1" if word == "true" else "0"):
            return word
    raise ConfigError(f"{name}: {text!r} is neither true nor false")


def configured(given: Mapping[str, str], pools: Sequence[str] = ()) -> dict[str, Any]:
    """What they become: dotted key of the configuration -> value; raises ConfigError for a value that is none.

    pools: further ones; in metrics the first of all stands for the pool.
    """
    changes: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.key and flag.name in given:
            value = given[flag.name]
            changes[flag.key] = _value(flag, value)
    if named := list(dict.fromkeys(filter(None, (changes.get("epp.pool_name"), *pools)))):
        changes |= {"epp.pool_name": named[0], "kubernetes.pools": named}
    if "epp.pool_namespace" in changes:
        changes["kubernetes.namespace"] = changes["epp.pool_namespace"]
    return changes


def _value(flag: Flag, text: str) -> Any:
    if flag.name == "--tls-min-version":
        return _tls_version(flag.name, text)
    if flag.takes == _SWITCH:
        return text == "true"
    if flag.name == "--endpoint-target-ports":
        return [_port(flag.name, each.strip()) for each in text.split(",")]
    return seconds(text, flag.name) if flag.key.endswith("_s") else text


def _port(name: str, text: str) -> int:
    if not (text.isdecimal() and len(text) < 6):
        raise ConfigError(f"{name}: {text!r} is not a port")
    return int(text)


def _tls_version(name: str, text: str) -> str:
    """As Kubernetes writes it (VersionTLS13), or by its number; older ones than ours become ours."""
    number = text.lower().removeprefix("versiontls").replace(".", "")
    if number not in ("", "10", "11", "12", "13"):
        raise ConfigError(f"{name}: {text!r} is not VersionTLS12 or VersionTLS13")
    return "1.3" if number == "13" else "1.2"


def warnings(given: Mapping[str, str]) -> Iterator[str]:
    """A line for each that asks for something which does not happen."""
    for flag in FLAGS:
        if flag.why and flag.name in given and given[flag.name].lower() not in flag.fine:
            yield f"{flag.name}: {flag.why}" if flag.key else f"{flag.name} has no effect: {flag.why}"


def log_level(parameters: dict[str, Any]) -> str | None:
    """Take -v and --zap-log-level out of a command's parameters: our log level, None where neither was given."""
    verbosity, zap = parameters.pop("epp_v"), parameters.pop("epp_zap_log_level")
    if verbosity is None and zap is None:
        return None
    asked: str = zap if verbosity is None else verbosity.removeprefix("=")
    if asked.isdecimal():
        return "debug" if int(asked) >= _DEBUG_FROM else "info"
    if asked.lower() not in _LEVELS:
        raise ConfigError(f"log level: {asked!r} is neither a number nor one of {', '.join(_LEVELS)}")
    return _LEVELS[asked.lower()]
