"""What a worker prints, line by line, on the front's log, with the slot and the task beside it.

Runs in the front. The pipe is read whenever there is something in it, so a worker is never held up
for long; what is kept is the end of it, for the record of a failure. A worker that prints faster
than MAX_LINES_PER_S loses lines, and the log says how many: the front has others to serve.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable

from .. import wire
from ..logger import logger
from ..task import Task

OnLine = Callable[[Task, str], None]

_READ_BYTES = 64 * 1024
MAX_LINE_BYTES = 128 * 1024  # a longer line comes out in pieces
MAX_KEPT_LINE_CHARS = 8 * 1024
MAX_LINES_PER_S = 1000
KEPT_LINES = 50


class WorkerOutput:
    """Reads one worker's output pipe; owns the descriptor."""

    def __init__(self, output_fd: int, slot: int, on_line: OnLine) -> None:
        self._fd = output_fd
        self._slot = slot
        self._on_line = on_line
        self._partial = b""
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._window_started_s = 0.0
        self._window_lines = 0
        self._dropped_lines = 0
        self._loop = asyncio.get_running_loop()
        self._task: Task | None = None
        os.set_blocking(output_fd, False)
        self._loop.add_reader(output_fd, self._read_once)

    def begin_task(self, task: Task) -> None:
        """Attribute what comes from now on to a task."""
        self._kept.clear()
        self._task = task

    def end_task(self, *, read_first: bool) -> None:
        """Let what comes from now on be nobody's.

        The answer came by another way than the output, so some of that may not have been read;
        the worker knows, and asking the pipe each time would cost a task more than its log line.
        """
        if read_first:
            self.drain()
        self._task = None

    def tail(self) -> str | None:
        """Return the last lines since the task began."""
        return "\n".join(self._kept) or None

    def drain(self) -> None:
        """Read all that is in the pipe now: a pipe holds 64 KiB, or 1 MiB where it was enlarged."""
        for _ in range(16):
            if not self._read_once():
                return

    def close(self) -> None:
        """Read the rest and give the descriptor back."""
        if self._fd < 0:
            return
        self.drain()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._partial:
            self._take(self._partial)
            self._partial = b""
        self._tell_dropped()

    def _read_once(self) -> bool:
        """Read at most one buffer; return whether there may be more."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:  # every writer has closed it; the reader would be called for ever
            self._loop.remove_reader(self._fd)
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._partial) > MAX_LINE_BYTES:
            self._take(self._partial)
            self._partial = b""
        return len(data) == _READ_BYTES

    def _take(self, line: bytes) -> None:
        if not self._may_log():
            return
        text = line.decode("utf-8", "backslashreplace").rstrip("\r")
        level, message = wire.decode_log(text) or (logging.INFO, text)
        for part in message.splitlines() or [""]:
            self._kept.append(part[:MAX_KEPT_LINE_CHARS])
            if self._task is not None:
                self._on_line(self._task, part[:MAX_KEPT_LINE_CHARS])
        self._log(level, message)

    def _log(self, level: int, message: str) -> None:
        address = None if self._task is None else self._task.address
        place = {"slot": self._slot, "task_address": address}
        logger.log(level, "%s", message, extra=place)

    def _may_log(self) -> bool:
        now = self._loop.time()
        if now - self._window_started_s >= 1.0:
            self._tell_dropped()
            self._window_started_s = now
            self._window_lines = 0
        self._window_lines += 1
        if self._window_lines <= MAX_LINES_PER_S:
            return True
        self._dropped_lines += 1
        return False

    def _tell_dropped(self) -> None:
        if self._dropped_lines:
            self._log(
                logging.WARNING,
                f"{self._dropped_lines} lines of output were dropped "
                f"(more than {MAX_LINES_PER_S} in a second)",
            )
            self._dropped_lines = 0
