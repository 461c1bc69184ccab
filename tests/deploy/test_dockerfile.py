"""The Dockerfile: what can be said of it without building it."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from deploy.rendered import KUBERNETES, ROOT, deployment, overlay, picker
from picker import __version__
from picker.__main__ import COMMANDS

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "LABEL", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, rest) of each, its continued lines as one."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in whole.splitlines())]


def stages() -> list[list[tuple[str, str]]]:
    made: list[list[tuple[str, str]]] = []
    for name, rest in instructions(TEXT):
        if name == "FROM":
            made.append([])
        made[-1].append((name, rest))
    return made


def values(name: str, stage: int = -1) -> list[str]:
    return [rest for each, rest in stages()[stage] if each == name]


def test_every_instruction_is_one() -> None:
    assert {name for name, _ in instructions(TEXT)} <= KNOWN


def test_it_has_two_stages_from_one_image_of_a_version() -> None:
    images = [values("FROM", stage)[0].split()[0] for stage in range(len(stages()))]
    assert len(images) == 2
    assert len(set(images)) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", images[0])  # no registry's host, no moving tag


def test_the_python_is_one_that_picker_is_for() -> None:
    major, minor = map(int, values("FROM")[0].partition(":")[2].split(".")[:2])
    assert (major, minor) >= tuple(map(int, PROJECT["project"]["requires-python"].removeprefix(">=").split(".")))
    assert f"Programming Language :: Python :: {major}.{minor}" in PROJECT["project"]["classifiers"]


def test_it_runs_as_the_user_that_the_pods_run_as() -> None:
    (user,) = values("USER")
    context = deployment(overlay("istio"))["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert [name for name, _ in stages()[-1]].index("USER") > [name for name, _ in stages()[-1]].index("COPY")


def test_nothing_is_built_or_fetched_in_the_stage_that_is_shipped() -> None:
    assert values("RUN") == []
    assert values("COPY") == ["--from=build /picker /picker"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    copied = [source for rest in values("COPY", 0) for source in rest.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source)


@pytest.mark.parametrize(
    "path", [".git", ".venv", "tests", "deploy/helm", "bench/results", "src/picker/__pycache__", "docs"]
)
def test_nothing_else_is_sent_to_the_builder(path: str) -> None:
    assert ignored(path)


def ignored(path: str) -> bool:
    """As docker reads .dockerignore: the last pattern that matches the path, or a folder of it, counts."""
    answer = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = Path(path).parts
        tails = parts if pattern.startswith("**/") else ()
        candidates = ["/".join(parts[: end + 1]) for end in range(len(parts))] + list(tails)
        if any(_matches(each, pattern.removeprefix("**/")) for each in candidates):
            answer = not line.startswith("!")
    return answer


def _matches(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)


def test_what_the_wheel_is_made_of_is_copied() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    copied = {source for rest in values("COPY", 0) for source in rest.split()[:-1]}
    needed = {*wheel["packages"], *wheel["force-include"], PROJECT["project"]["readme"]}
    needed |= set(PROJECT["project"]["license-files"])
    assert all(any(path == each or path.startswith(f"{each}/") for each in copied) for path in needed)


def test_everything_that_is_installed_is_of_a_version() -> None:
    installed = [each for rest in values("RUN", 0) for each in rest.split("&&") if "pip install" in each]
    assert len(installed) == 2
    assert all("--constraint constraints.txt" in each for each in installed)
    assert "deploy/constraints.txt ./" in values("COPY", 0)
    assert any("pip wheel --no-deps --no-build-isolation" in rest for rest in values("RUN", 0))


def test_bytecode_is_looked_for_where_it_was_written() -> None:
    written, looked_for = (re.search(r"PYTHONPYCACHEPREFIX=(\S+)", " ".join(values("ENV", stage))) for stage in (0, -1))
    assert written is not None
    assert looked_for is not None
    assert written[1] == looked_for[1]
    assert written[1].startswith("/picker/")


def test_the_ports_that_pods_open_are_exposed() -> None:
    opened = {port["containerPort"] for port in picker(overlay("istio"))["ports"]}
    assert opened <= set(map(int, values("EXPOSE")[0].split()))


def test_the_extras_exist() -> None:
    (extras,) = [rest.partition("=")[2] for rest in values("ARG", 0)]
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("extras", ["exact,redis", "exact", ""])
def test_any_extras_and_none_can_be_asked_for(extras: str) -> None:
    (asked,) = re.findall(r'"(\S+\[\$\{EXTRAS\}\][^"]*\))"', " ".join(values("RUN", 0)))
    requirement = Requirement(asked.replace("${EXTRAS}", extras).replace("$(ls /wheels/*.whl)", "/wheels/picker.whl"))
    assert requirement.name == PROJECT["project"]["name"]
    assert requirement.extras == {each for each in extras.split(",") if each}
    assert requirement.url == "file:///wheels/picker.whl"


def test_the_version_is_pickers_everywhere() -> None:
    (labels,) = values("LABEL")
    found = dict(re.findall(r'([\w.]+)="([^"]*)"', labels))
    assert found["org.opencontainers.image.version"] == __version__ == PROJECT["project"]["version"]
    assert found["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]
    assert f"newTag: {__version__}" in (KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8")


def test_it_starts_picker() -> None:
    (entry,), (command,) = values("ENTRYPOINT"), values("CMD")
    assert json.loads(entry) == [next(iter(PROJECT["project"]["scripts"]))]
    assert json.loads(command)[0] in COMMANDS


def test_its_health_check_asks_for_what_is_served() -> None:
    (check,) = values("HEALTHCHECK")
    assert "http://127.0.0.1:9090/healthz" in check
    program = json.loads(check.partition("CMD ")[2])
    compile(program[2], "healthcheck", "exec")
