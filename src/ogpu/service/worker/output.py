"""A worker's stdout and stderr: one pipe to the front, whoever writes, from the first line on.

Runs in a worker. Descriptors 1 and 2 are the pipe, so what C code and subprocesses print goes the
same way as Python's output. Both are line buffered (a pipe is block buffered otherwise, and the
lines before a kill would be lost); PYTHONUNBUFFERED is not needed.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import sys
import termios

_IOLBF = 1  # <stdio.h>, glibc and musl


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
