"""Put Mosec into a virtual environment of its own, once; it is no dependency of this project."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

MOSEC_VERSION = "0.9.8"
_INSTALL_LIMIT_S = 300


class InstallError(Exception):
    """Mosec cannot be had here; the reason is the last line of what pip said."""


def default_cache() -> Path:
    """Return the folder in which the environment is kept for the next run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ogpu-service-benchmarks"


def mosec_python(cache: Path) -> Path:
    """Return the interpreter of an environment with Mosec and this environment's pydantic.

    Raises:
        InstallError: it could not be made.
    """
    tag = f"{sys.version_info.major}.{sys.version_info.minor}"
    pydantic = version("pydantic")
    folder = cache / f"mosec-{MOSEC_VERSION}-pydantic-{pydantic}-python-{tag}"
    python = folder / "bin" / "python"
    installed = folder / "installed"  # written last: an install that was cut short is made again
    if installed.exists():
        return python
    print(f"Installing mosec {MOSEC_VERSION} into {folder}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    wanted = (f"mosec=={MOSEC_VERSION}", f"pydantic=={pydantic}")
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-input", *wanted])
    _run([str(python), "-c", "import mosec, pydantic"])
    installed.touch()
    return python


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines()
        raise InstallError(lines[-1] if lines else str(error)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(str(error)) from error
