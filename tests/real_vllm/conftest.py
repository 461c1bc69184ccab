"""Two real vLLM servers for a whole test run, whole again and empty at the start of every test that asks for them.

They start when the first such test does. Where vLLM is not installed these tests are skipped with a reason that says
how to get it; PICKER_REAL_VLLM=0 skips them where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from real_vllm import install
from real_vllm.pod import Pod, new_pod
from real_vllm.script import RESET
from real_vllm.tiny_model import write_model

Pair = tuple[Pod, Pod]

_SIZES = (32, 32)
_TIMEOUT = 400  # seconds: the first test waits for both servers, on a machine that may do other things


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_vllm: two real vLLM servers on the CPU; `make test-vllm` installs them")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_vllm)
            item.add_marker(pytest.mark.timeout(_TIMEOUT))


@pytest.fixture(scope="session")
def venv() -> Path:
    if reason := install.why_skipped():
        pytest.skip(reason)
    return install.home()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory that both servers and picker read."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pair(venv: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both servers as an earlier test left them; see `pods`."""
    folder = tmp_path_factory.mktemp("vllm")
    pair = (new_pod(venv, model, folder, "a"), new_pod(venv, model, folder, "b"))
    try:
        yield pair
    finally:
        for pod in pair:
            pod.stop()


@pytest.fixture
def pods(request: pytest.FixtureRequest, pair: Pair) -> Pair:
    """Both servers, answering, with empty caches. Indirect parameter: their block sizes in tokens."""
    for pod, block_size in zip(pair, getattr(request, "param", _SIZES), strict=True):
        if pod.block_size != block_size or pod.process is None or pod.process.poll() is not None:
            pod.stop()
            pod.block_size = block_size
            pod.start()
    for pod in pair:
        pod.wait()
        httpx.post(f"{pod.url}{RESET}").raise_for_status()
    return pair


@pytest.fixture
def pod(pods: Pair) -> Pod:
    """One of them."""
    return pods[0]


@pytest.fixture
def client(pod: Pod) -> Iterator[httpx.Client]:
    """Talks to `pod` itself."""
    with httpx.Client(base_url=pod.url, timeout=60.0) as client:
        yield client
