"""Look for what makes a fork unsafe in a process that has imported the source.

Runs in the front, once, at start(), before the template is made. A hazard means that workers are
spawned as fresh interpreters instead. In the order in which they are looked for:

1. An open GPU device: a GPU context does not survive a fork.
2. A Python thread besides the main one: it may hold any lock at the moment of the fork, for ever.
3. TensorFlow, or gRPC with threads: they say of themselves that they do not survive a fork.
4. libgomp with live threads: a forked child hangs in its first parallel region (pytorch#17199).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

from ..processes import thread_count

_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/render")


def fork_hazard() -> str | None:
    """Return why a fork would not be safe, in words for the log, or None."""
    return _open_gpu_device() or _python_thread() or _library_runtime() or _openmp_threads()


def _open_gpu_device() -> str | None:
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if target.startswith(_GPU_DEVICES):
            return f"the source opened {target} while it was imported (a GPU context cannot fork)"
    return None


def _python_thread() -> str | None:
    others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    if others:
        return f"the source started threads while it was imported ({', '.join(others)})"
    return None


def _library_runtime() -> str | None:
    if "tensorflow" in sys.modules:
        return "TensorFlow is loaded, and its runtime does not survive a fork"
    if "grpc" in sys.modules and thread_count() > 1:
        return "gRPC is loaded and has threads"
    return None


def _openmp_threads() -> str | None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    if "libgomp" not in maps or thread_count() == 1:
        return None
    # Importing NumPy starts OpenBLAS's threads, which are harmless: OpenBLAS joins them before
    # each fork and starts them again when it needs them. So fork once, and see who is left.
    # (Measured with numpy 2.4 and torch 2.13: 2 threads after the imports, 1 after a fork, and
    # 2 after a fork when a matrix product came first. The fork took 5 ms.)
    child = os.fork()
    if child == 0:
        os._exit(0)
    with contextlib.suppress(ChildProcessError):  # the source ignores SIGCHLD
        os.waitpid(child, 0)
    if thread_count() == 1:
        return None
    return "the source ran numeric code while it was imported, and OpenMP (libgomp) has threads"
