"""`picker check`: is this endpoint picker, gateway or set of files what the endpoint-picker protocol asks for?"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from picker.check import registry, report, session
from picker.check.cluster import Asked as Clustered
from picker.check.gateway import Target
from picker.check.knowledge import Asked
from picker.check.session import Plan
from picker.check.verdict import Outcome, Tier, Verdict
from picker.commands.options import Size, first_error, start_logging
from picker.envoy import Topology
from picker.errors import ConfigError

_WIDTH = 140
_STYLES = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.SKIP: "yellow", Outcome.ERROR: "bold magenta"}
_TOPOLOGIES = {
    "override_host": (Topology.OVERRIDE_HOST,),
    "original_dst": (Topology.ORIGINAL_DST,),
    "both": tuple(Topology),
}


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--files", multiple=True, type=click.Path(exists=True, path_type=Path), help="Files or folders (T0).")
@click.option("--epp", metavar="HOST:PORT", help="The endpoint picker to check (T1).")
@click.option("--self", "own", is_flag=True, help="Start picker's own with endpoints of the checker's, and check it.")
@click.option("--envoy", "with_envoy", is_flag=True, help="A real Envoy around the picker as well (T2).")
@click.option(
    "--endpoint", "endpoints", multiple=True, metavar="IP:PORT", help="Of the picker's pool; repeat for each."
)
@click.option(
    "--engine", "engines", multiple=True, metavar="URL", help="An engine: do its KV events tell the truth (T3)?"
)
@click.option("--admin", metavar="URL", help="A picker's admin port: does it complain of its sources (T3)?")
@click.option("--kubernetes", is_flag=True, help="The pool in a cluster and all around it (T4); with --pool.")
@click.option("--pool", metavar="NAME", help="Of the InferencePool.")
@click.option("--namespace", metavar="NAME", help="Where it is.  [that of the context]")
@click.option("--kubeconfig", metavar="FILE", help="How to reach Kubernetes.  [the pod's service account]")
@click.option("--context", metavar="NAME", help="Of it.")
@click.option("--service-account", metavar="NAME", help="Picker's: its rights count, not one's own.")
@click.option("--gateway", metavar="URL", help="Where requests enter.  [as the Gateway's status says]")
@click.option("--kv-events", metavar="URL", help="Where engines publish, if not told: tcp://{host}:5557.")
@click.option("--kv-replay", metavar="URL", help="Where they replay events, likewise.")
@click.option(
    "--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What picker is given."
)
@click.option("--model", default="check", show_default=True, help="The model that requests name.")
@click.option("--tls/--insecure", default=False, help="How the picker serves.  [default: insecure]")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Who signs its certificate.")
@click.option("--server-name", metavar="NAME", help="The name in its certificate.")
@click.option("--health", metavar="HOST:PORT", help="Its health service, where that is another port.")
@click.option("--overload", type=click.IntRange(1), metavar="N", help="Requests at once of which it must shed some.")
@click.option("--max-body", type=Size(), metavar="SIZE", help="The largest request body that it must take.")
@click.option("--log", "logs", multiple=True, type=click.Path(exists=True, path_type=Path), help="Its log; no prompts.")
@click.option("--bound", type=float, default=1.0, show_default=True, metavar="S", help="A decision may take so long.")
@click.option("--settle", type=float, default=15.0, show_default=True, metavar="S", help="It notices changes so soon.")
@click.option("--topology", type=click.Choice(list(_TOPOLOGIES)), help="Of Envoy.  [override_host; --self: both]")
@click.option("--envoy-binary", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE")
@click.option("--tier", "tiers", multiple=True, type=click.Choice([tier.value for tier in Tier]), help="Only these.")
@click.option("--only", multiple=True, metavar="ID", help="Only this check, or family of checks (EPP-3).")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the prompts.")
@click.option("--list", "listing", is_flag=True, help="Name all checks and run none.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for results.json, junit.xml, report.md."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    paths: tuple[Path, ...],
    files: tuple[Path, ...],
    epp: str | None,
    own: bool,
    with_envoy: bool,
    endpoints: tuple[str, ...],
    engines: tuple[str, ...],
    admin: str | None,
    kubernetes: bool,
    pool: str | None,
    namespace: str | None,
    kubeconfig: str | None,
    context: str | None,
    service_account: str | None,
    gateway: str | None,
    kv_events: str | None,
    kv_replay: str | None,
    tokenizer: Path | None,
    model: str,
    tls: bool,
    ca: Path | None,
    server_name: str | None,
    health: str | None,
    overload: int | None,
    max_body: int | None,
    logs: tuple[Path, ...],
    bound: float,
    settle: float,
    topology: str | None,
    envoy_binary: Path | None,
    tiers: tuple[str, ...],
    only: tuple[str, ...],
    seed: int,
    listing: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Check files (T0), a picker by gRPC (T1) and with a real Envoy (T2), sources (T3), and a cluster (T4).

    Exit status 0 when all checks that could be run passed, 1 when one did not, 2 on wrong usage.

    \b
    picker check --self
    picker check --epp 127.0.0.1:9002 --endpoint 127.0.0.1:8001 --endpoint 127.0.0.1:8002
    picker check --epp 127.0.0.1:9002 --endpoint 127.0.0.1:8001 --endpoint 127.0.0.1:8002 --envoy
    picker check --files envoy.yaml manifests/ picker.yaml
    picker check --engine http://127.0.0.1:8001 --tokenizer model/ --admin http://127.0.0.1:9090
    picker check --kubernetes --pool vllm --namespace llm --service-account picker --output evidence/
    """
    if listing:
        _list(as_json=as_json)
        return
    papers = (*files, *paths)
    sources = Asked(
        tuple(_url("--engine", url) for url in engines),
        None if admin is None else _url("--admin", admin),
        events=kv_events,
        replay=kv_replay,
        tokenizer=tokenizer,
    )
    if kubernetes != (pool is not None):
        raise click.UsageError("--kubernetes checks one pool: name it with --pool")
    clustered = (
        None
        if pool is None
        else Clustered(
            pool, namespace, kubeconfig, context, service_account, gateway, None if model == "check" else model
        )
    )
    _refuse_nonsense(papers, epp=epp, own=own, with_envoy=with_envoy, sources=sources, only=only, cluster=kubernetes)
    start_logging("error")
    plan = Plan(
        tiers=_tiers(
            tiers,
            files=bool(papers),
            epp=epp is not None,
            own=own,
            with_envoy=with_envoy,
            sources=bool(sources),
            cluster=kubernetes,
        ),
        picker=None if epp is None else Target(_address("--epp", epp), tls=tls, ca=ca, name=server_name),
        health=None if health is None else _address("--health", health),
        endpoints=tuple(_address("--endpoint", one) for one in endpoints),
        files=papers,
        only=only,
        topologies=_TOPOLOGIES[topology or ("both" if own else "override_host")],
        binary=envoy_binary,
        model=model,
        seed=seed,
        bound=bound,
        settle=settle,
        overload=overload,
        max_body=max_body,
        logs=logs,
        sources=sources,
        cluster=clustered,
        evidence=output,
    )
    plan = session.need_envoy(plan, asked=with_envoy or Tier.T2.value in tiers)
    named = (*(str(path) for path in papers), *sources.engines, *([] if sources.admin is None else [sources.admin]))
    named = (*named, *([] if pool is None else [f"pool {pool}"]))
    subject = "picker" if own else epp or ", ".join(named)
    ctx.exit(_conclude(_run(plan), subject, seed=seed, output=output, as_json=as_json))


def _conclude(done: session.Run, subject: str, *, seed: int, output: Path | None, as_json: bool) -> int:
    """Say and write what came of it; the exit status."""
    written = report.document(done.verdicts, subject=subject, envoy=sorted(done.envoy), seed=seed)
    if output is not None:
        report.write(output, done.verdicts, written)
    if as_json:
        click.echo(json.dumps(written))
    else:
        _print(done.verdicts, written)
    counts = report.counted(done.verdicts)
    return 0 if counts[Outcome.PASS] and not counts[Outcome.FAIL] + counts[Outcome.ERROR] else 1


def _refuse_nonsense(
    papers: Sequence[Path],
    *,
    epp: str | None,
    own: bool,
    with_envoy: bool,
    sources: Asked,
    only: Sequence[str],
    cluster: bool,
) -> None:
    if epp is not None and own:
        raise click.UsageError("--epp and --self are two pickers; check one at a time")
    if not (papers or epp or own or sources or cluster):
        raise click.UsageError(
            "nothing to check: give --epp HOST:PORT, --self, --files FILE, --engine URL, --admin URL or --kubernetes"
        )
    if with_envoy and not (epp or own):
        raise click.UsageError("--envoy goes around a picker: give --epp HOST:PORT or --self")
    known = [check.id.lower() for check in registry.ALL]
    for word in only:
        if not any(name == word.lower() or name.startswith((f"{word.lower()}.", f"{word.lower()}-")) for name in known):
            raise click.UsageError(f"--only {word}: there is no such check; --list names them all")


def _tiers(
    asked: Sequence[str], *, files: bool, epp: bool, own: bool, with_envoy: bool, sources: bool, cluster: bool
) -> frozenset[Tier]:
    """What is possible with what was given; of that what was asked for."""
    possible = {Tier.T0: files or own, Tier.T1: epp or own, Tier.T2: own or with_envoy, Tier.T3: sources}
    possible[Tier.T4] = cluster
    wanted = {Tier(word) for word in asked} or {tier for tier, can in possible.items() if can}
    for tier in wanted:
        if not possible[tier]:
            needs = {Tier.T0: "--files", Tier.T1: "--epp or --self", Tier.T2: "--envoy with --epp, or --self"}
            needs |= {Tier.T3: "--engine or --admin", Tier.T4: "--kubernetes"}
            raise click.UsageError(f"--tier {tier.value} needs {needs[tier]}")
    return frozenset(wanted)


def _address(option: str, text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{option}: {text!r} is not host:port")
    return text


def _url(option: str, text: str) -> str:
    """With a scheme; plain host:port is http."""
    url = text if "://" in text else f"http://{text}"
    _address(option, url.rstrip("/"))
    return url


def _run(plan: Plan) -> session.Run:
    """With progress on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with console.status("starting") as status:

        def tell(verdict: Verdict) -> None:
            status.update(_plain(f"{verdict.name}: {verdict.outcome.value}"))
            if verdict.outcome in (Outcome.FAIL, Outcome.ERROR) and console.is_terminal:
                console.print(
                    f"[{_STYLES[verdict.outcome]}]{verdict.outcome.value}[/] {_plain(verdict.name)}", highlight=False
                )

        try:
            return asyncio.run(session.run(plan, tell))
        except BaseExceptionGroup as group:
            raise first_error(group) from group


def _list(*, as_json: bool) -> None:
    checks = registry.ALL
    if as_json:
        rows = [
            {"id": one.id, "tier": one.tier.value, "level": one.level.value, "requirement": one.requirement}
            | {"source": one.source, "variants": list(one.variants)}
            for one in checks
        ]
        click.echo(json.dumps({"checks": rows}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("tier", "id", "level", "requirement"):
        table.add_column(heading)
    for one in checks:
        table.add_row(one.tier.value, one.id, one.level.value, one.requirement)
    _console().print(table)


def _print(verdicts: Sequence[Verdict], run: report.Json) -> None:
    console = _console()
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "verdict", "requirement"):
        table.add_column(heading, no_wrap=heading != "requirement")
    for one in verdicts:
        said = one.requirement if one.outcome is Outcome.PASS or not one.why else f"{one.requirement}\n  {one.why}"
        table.add_row(_plain(one.name), f"[{_STYLES[one.outcome]}]{one.outcome.value}[/]", _plain(said))
    console.print(table)
    console.print(f"{run['subject']}: {report.summary(verdicts)}", highlight=False, markup=False)


def _plain(text: str) -> str:
    """Without what rich would take for markup."""
    return text.replace("[", "\\[")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
