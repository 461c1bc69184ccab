"""Virtual time against real HTTP: a scenario in `picker simulate`, and the same one sent to simulated pods by
`picker load` through `picker proxy`. Prints both rows and their ratio; exits 1 when mean TTFT or hit ratio are further
apart than 10 %.

    python bench/agreement.py --scenario S3 --load 0.5 --pods 2 --time-scale 4 --limit 400
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
import urllib.request
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from picker.children import supervised
from picker.sim.scenario import Scenario, scenario

_WITHIN = 0.10
_JUDGED = ("ttft_mean_s", "hit_ratio")
_SHOWN = ("requests", "failed", *_JUDGED, "ttft_p50_s", "ttft_p95_s", "tpot_mean_s", "e2e_mean_s", "e2e_p95_s")
_POD = re.compile(r"pod on (http://[\w.:\[\]-]+)")
_PROXY = re.compile(r"proxy on (http://[\w.:\[\]-]+)/v1")
_POLICIES = {"picker": "picker", "round-robin": "round-robin", "least-request": "least-request", "random": "random"}


async def _said(name: str, *arguments: str) -> dict[str, Any]:
    """Run picker to its end; its JSON."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", *arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    for line in err.decode().splitlines():
        click.echo(f"{name}: {line}", err=True)
    if not out:
        raise click.ClickException(f"picker {shlex.join(arguments)} said nothing (status {process.returncode})")
    figures: dict[str, Any] = json.loads(out)
    return figures


async def compare(chosen: Scenario, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of `picker simulate`, and that of `picker load`."""
    shape = _flags(options, "scenario", "load", "pods", "limit", "seed")
    async with supervised() as children:
        simulated = await _said("simulate", "simulate", *shape, "--policy", options["policy"], "--jobs", "1", "--json")
        pods = await children.start_picker("pods", "sim", *_pod_flags(chosen, options))
        urls = await children.announced(pods, _POD, timeout=60.0, count=chosen.pods.count)
        endpoints = [word for url in urls for word in ("--endpoint", url)]
        scrape = str(chosen.scrape_interval / options["time_scale"])
        proxy = await children.start_picker(
            *("proxy", "proxy", *endpoints, "--port", "0", "--admin-port", "0"),
            *("--policy", _POLICIES[options["policy"]], "--scrape-interval", scrape, "--log-level", "warning"),
        )
        (url,) = await children.announced(proxy, _PROXY, timeout=60.0)
        scale = ("--time-scale", str(options["time_scale"]), "--no-calibrate", "--json")
        measured = await _said("load", "load", url, *shape, *scale)
        measured["pods_late"] = json.loads(await asyncio.to_thread(_read, f"{urls[0]}/_sim/clock"))
    return simulated["runs"][0], measured


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10.0) as answer:
        data: bytes = answer.read()
    return data


def _flags(options: dict[str, Any], *names: str) -> list[str]:
    return [word for name in names if options[name] is not None for word in (f"--{name}", str(options[name]))]


def _pod_flags(chosen: Scenario, options: dict[str, Any]) -> list[str]:
    profile = chosen.pods.published
    flags = [
        "--count",
        chosen.pods.count,
        "--port",
        0,
        "--model",
        chosen.pods.profile,
        "--profile",
        chosen.pods.profile,
    ]
    flags += ["--kv-tokens", profile.kv_tokens, "--block-size", profile.block_size]
    flags += ["--max-num-seqs", profile.max_num_seqs, "--time-scale", options["time_scale"]]
    flags += ["--stream-interval", options["stream_interval"]] if options["stream_interval"] else []
    flags += [word for name in chosen.adapters for word in ("--lora", name)]
    return [str(flag) for flag in flags]


def _table(simulated: dict[str, Any], measured: dict[str, Any]) -> Table:
    table = Table(title="virtual time against real HTTP", title_justify="left")
    for heading in ("", "simulate", "load", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in _SHOWN:
        a, b = simulated.get(name), measured.get(name)
        ratio = f"{b / a:.3f}" if a and b is not None else "-"
        table.add_row(name, *("-" if value is None else f"{value:,.4g}" for value in (a, b)), ratio)
    return table


def apart(simulated: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """The judged figures that differ by more than allowed."""
    return [
        name
        for name in _JUDGED
        if measured[name] is None or abs(measured[name] - simulated[name]) > _WITHIN * (simulated[name] or 0.0)
    ]


@click.command()
@click.option("--scenario", "scenario_name", default="S3", show_default=True)
@click.option("--load", type=float, default=0.5, show_default=True)
@click.option("--pods", type=int, default=2, show_default=True)
@click.option("--policy", type=click.Choice(list(_POLICIES)), default="picker", show_default=True)
@click.option("--time-scale", type=float, default=4.0, show_default=True)
@click.option("--stream-interval", type=int, help="Tokens in an event: fewer events, less CPU.")
@click.option("--limit", type=int, help="Only the first requests.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep both rows there.")
def command(scenario_name: str, json_file: Path | None, **options: Any) -> None:
    """Run both and print what they say."""
    chosen = scenario(scenario_name).with_pods(count=options["pods"])
    simulated, measured = asyncio.run(compare(chosen, {**options, "scenario": scenario_name}))
    if json_file is not None:
        json_file.write_text(json.dumps({"simulate": simulated, "load": measured}, indent=1) + "\n")
    Console().print(_table(simulated, measured))
    click.echo(f"requests sent late (P99): {measured['schedule_delay_p99_s'] * 1e3:.1f} ms of the pods", err=True)
    click.echo(f"pods: {json.dumps(measured['pods_late'])}", err=True)
    differ = apart(simulated, measured)
    if not measured["on_schedule"]:
        click.echo("the load was not on schedule: this machine is too slow for this comparison", err=True)
    if differ:
        raise click.ClickException(f"further apart than {_WITHIN:.0%}: {', '.join(differ)}")


if __name__ == "__main__":
    command()
