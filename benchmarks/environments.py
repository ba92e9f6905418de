"""Put what is measured beside the service into a virtual environment of its own, once.

None of it is a dependency of this project.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_INSTALL_LIMIT_S = 900  # torch is large


class InstallError(Exception):
    """The peer cannot be had here; the reason is the last line of what pip said."""


def default_cache() -> Path:
    """Return the folder in which environments are kept for the next run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ogpu-service-benchmarks"


def peer_python(cache: Path, name: str, requirements: Sequence[str], imports: str) -> Path:
    """Return the interpreter of an environment with ``requirements``; make it where it is missing.

    Args:
        cache: the folder in which environments are kept.
        name: what its folder's name begins with; other requirements are another folder.
        requirements: as pip takes them.
        imports: what must be importable then, as ``import`` takes it.

    Raises:
        InstallError: it could not be made.
    """
    version = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
    folder = cache / f"{name}-{version}-{digest}"
    python = folder / "bin" / "python"
    installed = (
        folder / "installed"
    )  # what is in it; written last: an install that was cut short is made again
    if installed.exists():
        return python
    print(f"Installing {' '.join(requirements)} into {folder}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-input", *requirements])
    _run([str(python), "-I", "-c", f"import {imports}"])
    installed.write_text(_run([str(python), "-m", "pip", "freeze"]), encoding="utf-8")
    return python


def packages(python: Path) -> list[str]:
    """Return what the environment of an interpreter was made with, as pip writes it."""
    return (python.parents[1] / "installed").read_text(encoding="utf-8").splitlines()


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines()
        raise InstallError(lines[-1] if lines else str(error)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(str(error)) from error
