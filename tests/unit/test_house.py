"""The arrows between the rooms of the house (design §9)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ogpu.service

HOUSE = Path(ogpu.service.__file__).parent
LEAVES = {
    "task", "wire", "config", "errors", "logger", "processes", "role", "backoff", "handler",
    "cgroups",
}  # fmt: skip
FRONT_LEAVES = LEAVES | {"ending", "events", "metrics"}
ALLOWED = {
    "http": {"http", "pool", "journal", "outbox"} | FRONT_LEAVES,
    "pool": {"pool", "devices", "journal"} | FRONT_LEAVES,
    "devices": {"devices", "config", "errors", "logger", "cgroups"},
    "outbox": {"outbox", "journal"} | FRONT_LEAVES,
    "journal": {"journal", "task", "ending", "errors", "logger", "metrics"},
    "worker": {"worker", "wire", "handler", "errors", "logger", "processes", "role", "context"},
}


def imported_rooms(file: Path) -> set[str]:
    """Return the rooms of the house that a file imports from, at any level of its code."""
    depth = len(file.relative_to(HOUSE).parts)
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = file.relative_to(HOUSE).parts[: depth - node.level]
            path = (*inside, *(node.module.split(".") if node.module else ()))
            rooms |= {path[0]} if path else {alias.name for alias in node.names}
    return rooms


def test_arrows_point_one_way() -> None:
    """http → pool → leaves, worker → wire and handler; neither side imports the other."""
    for room, allowed in ALLOWED.items():
        for file in (HOUSE / room).glob("*.py"):
            assert imported_rooms(file) <= allowed, file


def test_no_file_is_too_long() -> None:
    for file in HOUSE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file


def test_importing_the_package_loads_no_web_code() -> None:
    """What a source imports is what the template forks: the front's libraries come after it."""
    code = (
        "import sys, ogpu.service, ogpu.service.worker.template; fronts = {'fastapi', 'uvicorn', "
        "'httptools', 'uvloop', 'starlette', 'sqlite3', 'prometheus_client'}; "
        "print(sorted(fronts & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_start_of_the_front_loads_no_fastapi() -> None:
    """It is imported for the first request that needs it (http/app.py)."""
    code = (
        "import sys, ogpu.service.front; print('uvicorn' in sys.modules, 'fastapi' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True False"


def test_torch_is_asked_to_look_for_gpus_without_a_context() -> None:
    code = "import os, ogpu.service; print(os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_the_namespace_is_shared() -> None:
    """`src/ogpu` has no __init__.py: the rest of the SDK may live beside this package."""
    assert not (HOUSE.parent / "__init__.py").exists() or "site-packages" in str(HOUSE)


def test_the_command_line_tells_which_module_is_in_place() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ogpu.service", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"ogpu-service {ogpu.service.__version__} ({HOUSE})"
