"""deploy/constraints.txt: all that the image is made of has a version there, one that pyproject.toml allows."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.rendered import ROOT

TEXT = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
SHIPPED = sorted(set(EXTRAS) - {"dev"})
PYTHON = "3.12"
MARKERS = {"python_version": PYTHON, "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
MARKERS |= {"implementation_name": "cpython", "platform_python_implementation": "CPython", "platform_machine": "x86_64"}

LINES = [line.partition("#")[0].strip() for line in TEXT.splitlines()]
PINNED = {name: version for name, _, version in (line.partition("==") for line in LINES if line)}


def allowed(requirement: Requirement) -> bool:
    version = PINNED.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def needed(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate(MARKERS | {"extra": extra})


def asked_for() -> list[str]:
    project: list[str] = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    return project + [each for extra in SHIPPED for each in EXTRAS[extra]]


def installed(name: str) -> list[Requirement]:
    """What a library needs in turn, if it is the same here as in the image."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Requirement(each) for each in found.requires or []] if found.version == PINNED[name] else []


def in_turn() -> Iterator[tuple[str, Requirement]]:
    """(whose, what) of all that the libraries need, as far as it can be known here."""
    ahead, seen = [Requirement(each) for each in asked_for()], set[tuple[str, str]]()
    while ahead:
        asked = ahead.pop()
        name = canonicalize_name(asked.name)
        for extra in ("", *asked.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                found = [each for each in installed(name) if needed(each, extra)]
                yield from ((name, each) for each in found)
                ahead += found


def test_every_line_is_one_version_of_one_library() -> None:
    lines = [line for line in LINES if line]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert len(PINNED) == len(lines)
    assert list(PINNED) == sorted(PINNED)


@pytest.mark.parametrize("requirement", asked_for())
def test_what_picker_asks_for_has_a_version_that_it_allows(requirement: str) -> None:
    assert allowed(Requirement(requirement))


def test_what_libraries_ask_for_has_a_version_that_they_allow() -> None:
    asked = list(in_turn())
    assert len(asked) > 20
    assert [(whose, str(each)) for whose, each in asked if not allowed(each)] == []


def test_it_is_made_for_everything_that_may_be_in_the_image() -> None:
    (command,) = re.findall(r"^# +(echo .*?)\n\n", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"--extra (\w+)", command) == SHIPPED
    assert f"--python-version {PYTHON}" in command
    assert all(each in command for each in PROJECT["build-system"]["requires"])
    assert f"FROM python:{PYTHON}." in (ROOT / "Dockerfile").read_text(encoding="utf-8")
