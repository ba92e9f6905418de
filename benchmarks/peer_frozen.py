"""The frozen thread-based module that this service replaces, in an environment of its own."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from .harness import SOURCES, Server, free_port, serving
from .peers import peer_python

FROZEN_VERSION = "0.2.3"
# The same web server and models as here, so that the difference is the module's own. What it
# sends callbacks with, and uvicorn's loop and parser, are what its own requirements bring.
_SAME = ("fastapi", "uvicorn", "pydantic")
_TOLD = ("ogpu", "requests", "urllib3", "h11")
_LIMIT_S = 60


def frozen_python(cache: Path) -> Path:
    """Return the interpreter of an environment with the frozen module.

    Raises:
        InstallError: it could not be made.
    """
    same = {name: version(name) for name in _SAME}
    return peer_python(
        cache,
        "-".join([f"ogpu-{FROZEN_VERSION}", *(f"{name}-{found}" for name, found in same.items())]),
        [f"ogpu[service]=={FROZEN_VERSION}", *(f"{n}=={found}" for n, found in same.items())],
        "ogpu.service",
    )


def frozen_versions(python: Path) -> dict[str, str]:
    """Return the versions in that environment which differ from ours, or which we do not have."""
    script = (
        "import importlib.metadata, json, sys; "
        "print(json.dumps({n: importlib.metadata.version(n) for n in sys.argv[1:]}))"
    )
    command = [str(python), "-I", "-c", script, *_TOLD]
    told = subprocess.check_output(command, text=True, timeout=_LIMIT_S)
    return dict(json.loads(told))


@contextmanager
def serving_frozen(python: Path, source: str, callback_url: str) -> Iterator[Server]:
    """Run a source on the frozen module; it is ready when this is entered."""
    port = free_port()
    # -I: whatever PYTHONPATH and this folder have, `ogpu` is the frozen module.
    command: list[str | Path] = [python, "-I", SOURCES / "frozen.py", SOURCES / source, str(port)]
    with serving(command, port, {"CALLBACK_URL": callback_url}) as server:
        server.wait_for(_is_up)
        yield server


def _is_up(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/openapi.json")  # it has no readiness of its own
    return connection.getresponse().status == 200
