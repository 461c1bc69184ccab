"""The other gateways that a benchmark can be run through, if they are installed: how to find and start them.

They are looked for in an environment of their own (`make bench-peers` makes it), on the path, and beside picker. Their
requirements are no concern of picker's, and two of them install an executable of one name.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = "PICKER_PEERS"
"""Environment variable with the folder of the peers' virtual environment; else `.venv-peers`, beside picker's own."""
_FOLDER = ".venv-peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """name: as rows call it, and its executable's. package: what it imports. verb: its word for starting."""

    name: str
    package: str
    verb: tuple[str, ...] = ()

    def command(self) -> list[str] | None:
        """What starts it, before any flag; None where it is not installed."""
        python = environment() / "bin" / "python"
        if python.exists() and any(environment().glob(f"lib/python*/site-packages/{self.package}/launch_router.py")):
            return [str(python), "-m", f"{self.package}.launch_router"]
        script = shutil.which(self.name)
        if script is not None and self._owns(Path(script)):
            return [script, *self.verb]
        if importlib.util.find_spec(self.package) is not None:
            return [sys.executable, "-m", f"{self.package}.launch_router"]
        return None

    def _owns(self, script: Path) -> bool:
        """sglang-router also installs itself under the name of its successor, smg."""
        with script.open("rb") as file:
            begin = file.read(1024)
        return not begin.startswith(b"#!") or f"from {self.package}.".encode() in begin


PEERS = (
    Peer("sglang-router", "sglang_router", ("launch",)),
    Peer("vllm-router", "vllm_router"),
    Peer("smg", "smg", ("launch",)),
)


def environment() -> Path:
    """The folder of the peers' virtual environment, whether there is one or not."""
    told = os.environ.get(ENVIRONMENT)
    if told is not None:
        return Path(told)
    beside = Path(sys.prefix).with_name(_FOLDER)
    return beside if beside.is_dir() else Path(_FOLDER).absolute()


def installed() -> dict[str, list[str]]:
    """The commands of the peers found here, by name."""
    return {peer.name: command for peer in PEERS if (command := peer.command()) is not None}


def flags(urls: Sequence[str], *, port: int, metrics_port: int) -> list[str]:
    """The flags that all of them understand: the policy that sends a prompt where its beginning is cached."""
    return [
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
        *("--policy", "cache_aware", "--log-level", "error", "--worker-urls", *urls),
    ]
