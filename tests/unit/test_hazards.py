"""When a fork is not safe: threads that only the kernel knows of, and those that do no harm.

Each case is a process of its own, as threads of native code cannot be ended. What PyTorch,
TensorFlow and others do is in tests/compat; here a thread of libc's own stands for theirs.
"""

from __future__ import annotations

import subprocess
import sys

NATIVE_THREAD = """
import ctypes, pathlib, sys, time, os
libc = ctypes.CDLL(None)
libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None)
tasks = pathlib.Path("/proc/self/task")
while len(list(tasks.iterdir())) < 2:
    time.sleep(0.001)
(thread,) = (task for task in tasks.iterdir() if task.name != str(os.getpid()))
"""
ASK = """
from ogpu.service.worker import hazards
print(hazards.fork_hazard())
"""


def hazard(source: str, ask: str = ASK) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source + ask],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_a_plain_source_may_fork() -> None:
    assert hazard("") == "None"


def test_a_thread_of_native_code_is_a_hazard() -> None:
    """No list of Python's has it; and the fork by which it is found warns of nothing."""
    expected = (
        "native code of the source that ran while it was imported has left a thread, which a fork "
        "would not copy"
    )
    assert hazard(NATIVE_THREAD) == expected


def test_a_thread_that_is_begun_anew_after_a_fork_is_none() -> None:
    """`import pyarrow` leaves one of that name (and `import pandas`, where that is installed)."""
    assert hazard(NATIVE_THREAD + "(thread / 'comm').write_text('jemalloc_bg_thd')\n") == "None"


def test_tensorflow_that_was_ruled_out_is_none() -> None:
    """`sys.modules["tensorflow"] = None` keeps others from importing it."""
    assert hazard("import sys; sys.modules['tensorflow'] = None\n") == "None"


def test_a_fork_that_hangs_is_a_hazard() -> None:
    """What a library does in a forked child may never end; the check does, and says so."""
    hook = "os.register_at_fork(after_in_child=libc.pause)\n"
    ask = ASK.replace("print", "hazards._FORK_LIMIT_S = 0.1\nprint")
    assert hazard(NATIVE_THREAD + hook, ask) == "a forked child did not end within 0.1 s"


def test_a_source_that_ignores_its_children() -> None:
    """With SIGCHLD ignored there is nothing to wait for (waitpid(2)); the answer is the same."""
    ignoring = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    assert hazard(NATIVE_THREAD + ignoring).startswith("native code")
