"""What a durable write costs where the servers keep their state: a figure depends on it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_WRITES = 200
_BYTES = 4096


def describe_disk() -> dict[str, Any]:
    """Return the filesystem of the temporary folder, and how long an fdatasync takes there."""
    with tempfile.TemporaryFile() as file:
        took_us = [_write_us(file.fileno()) for _ in range(_WRITES)]
    return {
        "filesystem": _filesystem(Path(tempfile.gettempdir())),
        "fdatasync_us": round(statistics.median(took_us)),
    }


def folder_bytes(folder: Path) -> int:
    """Return how much is in a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # its owner is at work
            total += path.stat().st_size if path.is_file() else 0
    return total


def _write_us(descriptor: int) -> float:
    started = time.perf_counter()
    os.write(descriptor, bytes(_BYTES))
    os.fdatasync(descriptor)
    return (time.perf_counter() - started) * 1e6


def _filesystem(folder: Path) -> str:
    """Return the type of the innermost mount that the folder is below (proc_mounts(5))."""
    mounts = (
        line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    )
    above = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]))[1]
