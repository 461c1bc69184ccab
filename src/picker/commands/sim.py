"""`picker sim`: simulated vLLM pods over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from picker.commands.numbers import AT_LEAST_ONE, PORT, POSITIVE, SEED
from picker.commands.options import run, start_logging
from picker.errors import ConfigError
from picker.sim import pod
from picker.sim.engine import Policy
from picker.sim.engine_hashes import HashAlgorithm
from picker.sim.latency import profiles
from picker.sim.lateness import Lateness
from picker.sim.pod_options import EventOptions, PodOptions

_ALGORITHMS = [algorithm.value for algorithm in HashAlgorithm]


@click.command()
@click.option("--count", type=AT_LEAST_ONE, default=1, show_default=True, help="How many pods.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT, default=8000, show_default=True, help="Port of the first; the others follow. 0: free ones."
)
@click.option("--model", default="simulated", show_default=True, metavar="NAME", help="Served model name.")
@click.option("--lora", "loras", multiple=True, metavar="NAME", help="A LoRA adapter; repeat for each.")
@click.option("--profile", default="llama-3.1-8b-h100", show_default=True, metavar="NAME", help="Costs; see --list.")
@click.option(
    "--time-scale", type=POSITIVE, default=1.0, show_default=True, metavar="X", help="X times as fast as real time."
)
@click.option("--kv-tokens", type=AT_LEAST_ONE, metavar="N", help="KV cache instead of the profile's.")
@click.option("--block-size", type=AT_LEAST_ONE, metavar="N", help="Tokens per KV block instead of the profile's.")
@click.option("--max-num-seqs", type=AT_LEAST_ONE, metavar="N", help="Sequences in a batch instead of the profile's.")
@click.option("--max-model-len", type=AT_LEAST_ONE, metavar="N", help="Context instead of the profile's.")
@click.option("--max-queued", type=click.IntRange(0), metavar="N", help="Unfinished requests before 503.  [no limit]")
@click.option(
    "--stream-interval",
    type=AT_LEAST_ONE,
    default=1,
    show_default=True,
    metavar="N",
    help="Tokens in an event of a stream.",
)
@click.option("--scheduling-policy", type=click.Choice([policy.value for policy in Policy]), default="fcfs")
@click.option("--no-noise", is_flag=True, help="Exact step times.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--data-parallel-size",
    "ranks",
    type=AT_LEAST_ONE,
    default=1,
    show_default=True,
    metavar="N",
    help="Engines in a pod.",
)
@click.option("--kv-events", is_flag=True, help="Publish KV events over ZeroMQ, as vLLM does.")
@click.option(
    "--kv-events-port",
    type=PORT,
    default=0,
    show_default=True,
    help="First port for events; replays next. 0: free ones.",
)
@click.option("--kv-events-topic", default="", metavar="TEXT", help="Their topic; may name {address} and {model}.")
@click.option(
    "--kv-events-buffer",
    type=AT_LEAST_ONE,
    default=10_000,
    show_default=True,
    metavar="N",
    help="Batches kept for replays.",
)
@click.option("--prefix-caching-hash-algo", "algorithm", type=click.Choice(_ALGORITHMS), default=_ALGORITHMS[0])
@click.option("--enable-scale-out", "scale_out", is_flag=True, help="Serve the render routes.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="DIR", help="A model's files: tokenize as it does."
)
@click.option("--list", "list_profiles", is_flag=True, help="List the profiles and end.")
@click.option("--log-level", default="info", show_default=True)
def command(
    count: int,
    host: str,
    port: int,
    model: str,
    loras: tuple[str, ...],
    profile: str,
    time_scale: float,
    kv_tokens: int | None,
    block_size: int | None,
    max_num_seqs: int | None,
    max_model_len: int | None,
    max_queued: int | None,
    stream_interval: int,
    scheduling_policy: str,
    no_noise: bool,
    seed: int,
    ranks: int,
    kv_events: bool,
    kv_events_port: int,
    kv_events_topic: str,
    kv_events_buffer: int,
    algorithm: str,
    scale_out: bool,
    tokenizer: Path | None,
    list_profiles: bool,
    log_level: str,
) -> None:
    """Simulated vLLM pods: OpenAI API, /metrics, prefix caching, continuous batching; no GPU, no model.

    Example: picker sim --count 4 --port 8001 --model demo
    """
    if list_profiles:
        for name, entry in profiles().items():
            click.echo(f"{name:28} {entry.kv_tokens:>9,} KV tokens  {entry.source}")
        return
    start_logging(log_level)
    if port and port + count > 65_536:
        raise ConfigError(f"--count {count} from --port {port}: ports go up to 65535")
    events = EventOptions(
        port=kv_events_port,
        topic=kv_events_topic,
        buffer_steps=kv_events_buffer,
        algorithm=HashAlgorithm(algorithm),
    )
    options = PodOptions(
        count=count,
        host=host,
        port=port,
        model=model,
        loras=loras,
        profile=profile,
        kv_tokens=kv_tokens,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        time_scale=time_scale,
        policy=Policy(scheduling_policy),
        max_queued=max_queued,
        noise=not no_noise,
        seed=seed,
        ranks=ranks,
        events=events if kv_events else None,
        scale_out=scale_out,
        tokenizer=tokenizer,
        stream_interval=stream_interval,
    )
    run(_serve(options))


async def _serve(options: PodOptions) -> None:
    late = await pod.run(options, on_ready=_announce)
    if late.distorted:
        click.echo(_excuse(late, options.time_scale), err=True)


def _excuse(late: Lateness, time_scale: float) -> str:
    return (
        f"the pods were too slow for what was asked of them: answers left up to {late.max_s:.2f} s late (P99 "
        f"{late.p99_s * 1000:.0f} ms, in time of the pods), so what was measured is this machine as well; "
        f"use a --time-scale below {time_scale:g}, fewer pods or less load"
    )


def _announce(urls: list[str]) -> None:
    for url in urls:
        click.echo(f"simulated pod on {url}", err=True)
