"""What all tests rely on, whoever starts them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A run of the suite says the same of the same code on a fast machine and on a slow one: properties draw the examples
# of the last run, and no example is held to a time. `--hypothesis-profile=search` draws others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", settings.get_profile("search"), derandomize=True)
settings.load_profile("steady")


def pytest_configure() -> None:
    """Have Ctrl-C work: a shell that starts a job in the background leaves the job deaf to it, and all it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that is run within a test sets up logging for the whole process."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
