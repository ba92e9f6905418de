"""Look for what makes a fork unsafe in a process that has imported the source.

Runs in the front, once, at start(), before the template is made; and in a template that has
imported the source itself, or run its @prepare. A hazard means that workers are spawned as fresh
interpreters instead. In the order in which they are looked for:

1. An open GPU device: a GPU context does not survive a fork.
2. A Python thread besides the main one: it may hold any lock at the moment of the fork, for ever.
3. TensorFlow: its authors do not promise that it survives a fork.
4. Threads of native code that are there after a fork: a forked child would be without them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
from pathlib import Path

from ..processes import kill_child, thread_count

_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/render")
_FORK_LIMIT_S = 5.0
# Arrow's allocator, which `import pyarrow` starts, and `import pandas` with it: jemalloc has hooks
# for a fork, and begins this thread anew in the child (its background_thread.c).
_JEMALLOC = "jemalloc_bg_thd"
# What hung in a forked child when the parent had computed while it was imported (tried with the
# versions in docs/internals.md): a part of the library's path, and the name for the log. Which of
# them a thread belongs to cannot be told, nor whether an unknown library does better. So any thread
# counts: a wrong spawn costs an import for each new worker, a wrong fork every task.
_KNOWN_TO_HANG = {
    "libgomp": "OpenMP (libgomp)",  # pytorch#17199; scikit-learn, faiss, LightGBM, XGBoost, Numba
    "jaxlib": "JAX",  # it warns of it itself, once it has a device: jax#18852, jax#20734
    "onnxruntime": "ONNX Runtime",  # onnxruntime#31961; its import leaves a thread for telemetry
    "openvino": "OpenVINO",  # a second model, compiled in the child
    "polars": "Polars",  # docs.pola.rs, user guide, "Multiprocessing"
}


def fork_hazard(*, is_prepared: bool = False) -> str | None:
    """Return why a fork would not be safe, in words for the log, or None."""
    when = "while it was imported or prepared" if is_prepared else "while it was imported"
    device = open_gpu_device()
    if device is not None:
        return f"the source opened {device} {when} (a GPU context cannot fork)"
    return _python_thread(when) or _tensorflow() or _native_threads(when)


def open_gpu_device() -> str | None:
    """Return the path of a GPU's device file that this process has opened, or None."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if target.startswith(_GPU_DEVICES):
            return target
    return None


def _python_thread(when: str) -> str | None:
    others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    if others:
        return f"the source started threads {when} ({', '.join(others)})"
    return None


def _tensorflow() -> str | None:
    # "Not designed to be fork()-safe" (tensorflow#2448, #8220). Measured with 2.21: forked children
    # compute after a bare import, and hang in their first operation after one in the parent. Keras
    # loads it for its own backend alone. A source that wants none of it sets the module to None.
    if sys.modules.get("tensorflow") is None:
        return None
    return "TensorFlow is loaded, and its runtime does not survive a fork"


def _native_threads(when: str) -> str | None:
    if thread_count() == 1:
        return None
    # Importing NumPy starts OpenBLAS's threads, which are harmless: OpenBLAS joins them before
    # each fork and starts them again when it needs them. So fork once, and see who is left.
    # (Measured with numpy 2.4 and torch 2.13: 2 threads after the imports, 1 after a fork, and
    # 2 after a fork when a matrix product came first. The fork took 5 ms.)
    if not _fork_ends():
        return f"a forked child did not end within {_FORK_LIMIT_S:g} s"
    left = _names_of_threads()
    threads = len(left) - 1 - left.count(_JEMALLOC)
    if threads <= 0:
        return None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    loaded = [name for part, name in _KNOWN_TO_HANG.items() if part in maps]
    return (
        f"native code of the source that ran {when} has left "
        f"{'a thread' if threads == 1 else f'{threads} threads'}, which a fork would not copy"
        + (f" (loaded: {', '.join(loaded)})" if loaded else "")
    )


def _fork_ends() -> bool:
    """Fork a child that ends at once; False: it hangs in what libraries do at a fork."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12 and of JAX: that is what we find out here
        child = os.fork()
    if child == 0:
        os._exit(0)
    limit = time.monotonic() + _FORK_LIMIT_S
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > limit:
                kill_child(child)
                os.waitpid(child, 0)
                return False
            time.sleep(0.0005)
    except ChildProcessError:  # the source ignores SIGCHLD
        pass
    return True


def _names_of_threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.append((task / "comm").read_text(encoding="utf-8", errors="replace").strip())
    return names
