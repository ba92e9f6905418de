"""A worker's stdout and stderr: one pipe to the front, whoever writes, from the first line on.

Runs in a worker. Descriptors 1 and 2 are the pipe, so what C code and subprocesses print goes the
same way as Python's output. Both are line buffered (a pipe is block buffered otherwise, and the
lines before a kill would be lost); PYTHONUNBUFFERED is not needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import os
import sys
import termios

_IOLBF = 1  # <stdio.h>, glibc and musl
_LEAST_KEPT = 100  # out of the way of those who close the first few


def take_over(output_fd: int) -> None:
    """Make a pipe the process's stdout and stderr, and an empty stdin; closes ``output_fd``."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    for descriptor in {empty, output_fd} - {0, 1, 2}:
        os.close(descriptor)


def buffer_by_line() -> None:
    """Let complete lines leave at once: Python's streams and C's stdout."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _IOLBF, 0)


class StandardDescriptors:
    """Keeps 1 and 2 open from one task to the next.

    A handler may close them; the next file that anybody opens would have their numbers then, and
    the next task's output would go there.
    """

    def __init__(self) -> None:
        self._kept: dict[int, int] = {}
        for number in (1, 2):
            with contextlib.suppress(OSError):  # closed already: the source has its reasons
                self._kept[number] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _LEAST_KEPT)

    def close(self) -> None:
        """Give the copies back."""
        for kept in self._kept.values():
            os.close(kept)

    def restore(self) -> None:
        """Open again what has been closed. What was put in their place is left there."""
        for number, kept in self._kept.items():
            try:
                os.get_inheritable(number)  # asks whether it is open, in half the time of fstat
            except OSError:
                with contextlib.suppress(OSError):  # that one is closed as well
                    os.dup2(kept, number)


def flush() -> None:
    """Send what is left of a line; a handler may have closed or replaced the streams."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S112 - a handler may have put anything in their place
            continue  # nothing can be shown, and no task depends on it


def is_pending() -> bool:
    """Tell whether something printed here may not have been read by the front yet."""
    try:
        return any(fcntl.ioctl(1, termios.FIONREAD, b"\0\0\0\0"))
    except OSError:  # a handler closed it, or put something else there
        return True
