"""What all tests rely on, whoever starts them."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Have Ctrl-C work: a shell that starts a job in the background leaves the job deaf to it, and all it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
