from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from picker.load.interrupts import interrupts_held


def test_what_is_started_is_deaf_and_here_nothing_is_lost() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012 - what follows the signal is the test
        child = subprocess.Popen([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 2); print('alive')"])
        signal.raise_signal(signal.SIGINT)
        status = child.wait()
    assert status == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
