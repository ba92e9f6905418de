"""The suite on each interpreter found here: ``nox -s tests``; a part of it: ``nox -s smoke``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox

MINORS = (10, 11, 12, 13)
SMOKE = ("tests/unit", "tests/compat/test_sources.py", "tests/integration/test_outcomes.py")


def interpreters() -> list[str]:
    """Return a CPython of each minor version: from PATH, or from pyenv's folder."""
    found = []
    for minor in MINORS:
        on_path = shutil.which(f"python3.{minor}")
        in_pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        # A pyenv shim is on PATH even where its version is not selected, and then does not run.
        if in_pyenv:
            found.append(str(in_pyenv[-1]))
        elif on_path:
            found.append(on_path)
    return found


def is_default(interpreter: str) -> bool:
    return f"3.{sys.version_info.minor}." in interpreter or interpreter.endswith(
        f"python3.{sys.version_info.minor}"
    )


@nox.session(python=interpreters())
def tests(session: nox.Session) -> None:
    """Run the whole suite."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=[path for path in interpreters() if not is_default(path)])
def smoke(session: nox.Session) -> None:
    """Run the parts that depend most on the interpreter."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-q", "-n", "2", *(session.posargs or SMOKE))
