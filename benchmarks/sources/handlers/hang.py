"""A handler that hangs in the way that its text names, and answers any other text with itself.

What hangs is told to the harness by a file (BENCHMARK_MARK): who hangs, since when, and, should the
handler be interrupted, when that was. BENCHMARK_IMPORT=torch imports that at module level, as most
deployed sources do: each worker is then some hundred MB. BENCHMARK_TIMEOUT_S is its timeout.
"""

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

if name := os.environ.get("BENCHMARK_IMPORT"):
    importlib.import_module(name)  # only its weight is wanted

QUICK = False
TIMEOUT_S = float(os.environ["BENCHMARK_TIMEOUT_S"])
_LONG_S = 100_000


class Text(BaseModel):
    text: str


Input = Output = Text


def load() -> None:
    """Load nothing."""


def handle(data: Text) -> Text:
    if data.text in KINDS:
        with _marked() as mark:
            KINDS[data.text](mark)
    return data


def _sleep(_: Path) -> None:
    time.sleep(_LONG_S)


def _regex(_: Path) -> None:
    """Backtrack through 2**64 ways with the GIL held; `re` looks for signals now and then."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def _c_call(_: Path) -> None:
    """Wait in C with the GIL held; no signal ends the call (pthread_mutex_lock(3p))."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(128)  # zeros are PTHREAD_MUTEX_INITIALIZER
    while True:
        libc.pthread_mutex_lock(mutex)  # the second time it waits for itself


def _grandchild(mark: Path) -> None:
    """Wait for a process of its own, as sources do that call ffmpeg or a trainer."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LONG_S})"])
    _write(mark.with_suffix(".child"), {"pid": child.pid})
    child.wait()


KINDS = {"sleep": _sleep, "regex": _regex, "c_call": _c_call, "grandchild": _grandchild}


@contextmanager
def _marked() -> Iterator[Path]:
    mark = Path(os.environ["BENCHMARK_MARK"])
    who = {"pid": os.getpid(), "thread": threading.get_native_id(), "at": time.time()}
    _write(mark, who)
    try:
        yield mark
    finally:
        _write(mark.with_suffix(".ended"), {"at": time.time()})


def _write(path: Path, content: dict[str, float]) -> None:
    """Write it so that whoever sees the file sees all of it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content), encoding="ascii")
    new.replace(path)
