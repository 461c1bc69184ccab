from __future__ import annotations

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_no_script_has_the_name_of_a_package_that_another_imports() -> None:
    """A script's folder comes first on its path: `validate.py` there would stand in for what Envoy's protos import."""
    taken = set(packages_distributions()) | sys.stdlib_module_names
    assert not {script.stem for script in BENCH.glob("*.py")} & taken
