"""What this process is. start() serves in the front only; elsewhere it returns at once.

A source says ``start()`` at its end, guarded or not, and is imported again by spawned workers and
by the children that a handler starts with ``multiprocessing``.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from enum import Enum


class Role(str, Enum):
    """The part that a process plays."""

    FRONT = "front"
    WORKER = "worker"


_role = Role.FRONT


def set_role(role: Role) -> None:
    """Say what this process is from now on."""
    global _role  # noqa: PLW0603 - a fact about the process, like its pid
    _role = role


def may_serve() -> bool:
    """Return whether start() is to serve here: not in a worker, nor while it is imported again.

    ``_inheriting`` is set while a spawned child imports its parent's main module, by the standard
    ``multiprocessing`` and by ``multiprocess``, its fork with dill.
    """
    if _role is not Role.FRONT:
        return False
    processes = [multiprocessing.process]
    if "multiprocess.process" in sys.modules:
        processes.append(sys.modules["multiprocess.process"])
    return not any(getattr(p.current_process(), "_inheriting", False) for p in processes)
