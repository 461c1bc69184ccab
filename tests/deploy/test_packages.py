"""Wheel and sdist: the one has all that picker needs where it runs, the other all that the wheel is made of."""

from __future__ import annotations

import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from deploy.rendered import ROOT
from picker import __version__

SOURCES = ROOT / "src" / "picker"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(pattern: str) -> set[str]:
    found = (path.relative_to(SOURCES) for path in SOURCES.rglob(pattern))
    return {f"picker/{path.as_posix()}" for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(built) as file:
        return set(file.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    builder = SdistBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path_factory.mktemp("sdist")), versions=["standard"])
    with tarfile.open(built) as file:
        return {Path(name).relative_to(f"picker_gateway-{__version__}").as_posix() for name in file.getnames()}


def test_the_wheel_has_what_picker_reads_where_it_runs(wheel: set[str]) -> None:
    expected = sources("*.py") | sources("*.toml") | sources("*.jinja") | {"picker/py.typed"}
    scenarios = {f"picker/sim/scenarios/{path.name}" for path in (ROOT / "bench" / "scenarios").iterdir()}
    assert len(scenarios) > 10
    assert expected | scenarios <= wheel


def test_the_wheel_has_nothing_else(wheel: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel} == {"picker", f"picker_gateway-{__version__}.dist-info"}
    kinds = {Path(name).suffix for name in wheel if name.startswith("picker/")}
    assert kinds == {".py", ".pyi", ".toml", ".jinja", ".typed"}
    assert not any(part == "tests" or part.startswith("test_") for name in wheel for part in Path(name).parts)


def test_the_sdist_has_what_the_wheel_is_made_of(sdist: set[str]) -> None:
    needed = {f"src/{name}" for name in sources("*.py") | sources("*.toml") | sources("*.jinja") | {"picker/py.typed"}}
    needed |= {f"bench/scenarios/{path.name}" for path in (ROOT / "bench" / "scenarios").iterdir()}
    assert needed | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= sdist


def test_the_sdist_has_no_tests_and_no_results(sdist: set[str]) -> None:
    assert {name.partition("/")[0] for name in sdist} <= {
        *("src", "bench", "proto", "pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore")
    }
    assert all(name.startswith("bench/scenarios/") for name in sdist if name.startswith("bench/"))
