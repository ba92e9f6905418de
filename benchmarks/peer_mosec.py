"""Mosec, in an environment of its own."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from .peers import peer_python

MOSEC_VERSION = "0.9.8"


def mosec_python(cache: Path) -> Path:
    """Return the interpreter of an environment with Mosec and this environment's pydantic.

    Raises:
        InstallError: it could not be made.
    """
    pydantic = version("pydantic")
    return peer_python(
        cache,
        f"mosec-{MOSEC_VERSION}-pydantic-{pydantic}",
        (f"mosec=={MOSEC_VERSION}", f"pydantic=={pydantic}"),
        "mosec, pydantic",
    )
