from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.bus import Bus


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    made = Bus(tmp_path / "bus")
    yield made
    made.listener.close()
