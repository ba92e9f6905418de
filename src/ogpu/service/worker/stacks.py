"""What a worker's threads were doing when it was killed, or when it crashed.

Runs in a worker (``arm``) and in the template (``make_file``). The text goes to a file in memory of
a fixed size, of which the front has a descriptor, too: nobody waits for a reader, and a handler
that writes to it by mistake can make it no larger.

``faulthandler`` writes from the signal handler itself, in C, so that it needs neither the GIL nor a
thread that still runs Python. It dumps on DUMP_SIGNAL and then calls the handler of before, which
is the system's: the process ends. So the front learns from the worker's pidfd that the text is
whole.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal

from .. import wire

# Out of the way of sources that close, or write to, every descriptor up to a thousand.
_LEAST_DESCRIPTOR = 2000


def make_file() -> int:
    """Make the file; return its descriptor (memfd_create(2), fcntl(2) on seals)."""
    descriptor = os.memfd_create("ogpu-stacks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, wire.STACKS_BYTES)
    seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def arm(descriptor: int) -> int:
    """Write stacks to this file from now on: when the front asks for them, and at a crash.

    Returns the file's descriptor from now on.
    """
    moved = descriptor
    with contextlib.suppress(OSError):  # where RLIMIT_NOFILE is lower it stays where it is
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LEAST_DESCRIPTOR)
        os.close(descriptor)
    signal.signal(wire.DUMP_SIGNAL, signal.SIG_DFL)
    faulthandler.register(wire.DUMP_SIGNAL, file=moved, all_threads=True, chain=True)
    faulthandler.enable(file=moved, all_threads=True)
    os.register_at_fork(after_in_child=_disarm)
    return moved


def _disarm() -> None:
    """Keep what becomes of a child that a handler forks from being taken for the worker's end."""
    faulthandler.disable()
    faulthandler.unregister(wire.DUMP_SIGNAL)
