"""Throw-away certificates for a picker that is started only to be checked. Needs the `openssl` program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from picker.errors import ConfigError


def available() -> bool:
    return shutil.which("openssl") is not None


def write(folder: Path, *, address: str = "127.0.0.1", days: int = 2) -> Path:
    """Write tls.crt and tls.key, a certificate that signs itself for `address` and `localhost`; its path.

    Raises ConfigError when openssl is missing or fails.
    """
    if not available():
        raise ConfigError("TLS cannot be checked without the `openssl` program")
    folder.mkdir(parents=True, exist_ok=True)
    certificate = folder / "tls.crt"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", str(days), "-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{address},DNS:localhost"),
        *("-keyout", str(folder / "tls.key"), "-out", str(certificate)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise ConfigError(f"openssl failed: {done.stderr.strip().splitlines()[-1]}")
    return certificate
