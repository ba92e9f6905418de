"""A worker's lines on the front's log, as many a second as the front has time for.

Runs in the front. Lines are logged, and told to those who watch the task, until the allowance of a
second is used up; its other lines are only counted, and the log says how many they were.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from .. import wire
from ..logger import relay
from ..task import Task

OnLine = Callable[[Task, str], None]
Tasks = tuple[Task, ...]  # whose output it is: one, those of a batch, or none

MAX_LINE_CHARS = 8 * 1024  # of a line that is told, or kept; the log has it whole
# The allowance of a second. Each of both takes about 2 % of a core, if it is used up.
MAX_LINES_PER_S = 1000
MAX_CHARS_PER_S = MAX_LINES_PER_S * MAX_LINE_CHARS


class LineLog:
    """Logs one worker's lines."""

    def __init__(self, slot: int, on_line: OnLine) -> None:
        self._slot = slot
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        self._second: asyncio.TimerHandle | None = None  # begins with a line, not with the clock
        self._lines_left, self._chars_left = MAX_LINES_PER_S, MAX_CHARS_PER_S
        self._dropped_lines = 0
        self._dropped_of: Tasks = ()

    @property
    def is_exhausted(self) -> bool:
        """True when nothing more may be logged in this second."""
        return self._lines_left <= 0 or self._chars_left <= 0

    def take(self, data: bytes, tasks: Tasks) -> None:
        """Log the complete lines of ``data``, or count them."""
        if self._second is None:
            self._second = self._loop.call_later(1.0, self._end_second)
        begin = 0
        while not self.is_exhausted:
            end = data.find(b"\n", begin)
            if end < 0:
                return
            self._take_line(data[begin:end], tasks)
            begin = end + 1
        self._drop(data.count(b"\n", begin), tasks)

    def close(self) -> None:
        """Say what is left to be said."""
        if self._second is not None:
            self._second.cancel()
            self._end_second()

    def _take_line(self, line: bytes, tasks: Tasks) -> None:
        level, text = decode_line(line)
        parts = text.splitlines() or [""]
        if len(parts) > self._lines_left:
            self._drop(len(parts) - self._lines_left, tasks)
            parts = parts[: self._lines_left]
            text = "\n".join(parts)
        self._lines_left -= len(parts)
        self._chars_left -= len(text)
        for task in tasks:
            for part in parts:
                self._on_line(task, part[:MAX_LINE_CHARS])
        self._log(level, text, tasks)

    def _drop(self, lines: int, tasks: Tasks) -> None:
        if lines:
            self._dropped_lines += lines
            self._dropped_of = tasks

    def _end_second(self) -> None:
        self._second = None
        self._lines_left, self._chars_left = MAX_LINES_PER_S, MAX_CHARS_PER_S
        if self._dropped_lines:
            self._log(
                logging.WARNING,
                f"{self._dropped_lines} lines of output were dropped (more than {MAX_LINES_PER_S} "
                f"lines or {MAX_CHARS_PER_S // 1000_000} MB in a second)",
                self._dropped_of,
            )
        self._dropped_lines, self._dropped_of = 0, ()

    def _log(self, level: int, text: str, tasks: Tasks) -> None:
        address = tasks[0].address if tasks else None
        if len(tasks) > 1:
            address = f"{address} +{len(tasks) - 1}"
        relay(level, text, self._slot, address)


def decode_line(line: bytes) -> tuple[int, str]:
    """Return the level and the text of a line, which may be a log record. Any bytes will do."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        # What "backslashreplace" makes of it, which takes 10 ms for 64 KiB; this way it takes 1.
        escaped = line.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace")
        text = escaped.replace(rb"\udc", rb"\x").decode()
    text = text.rstrip("\r")
    try:
        record = wire.decode_log(text)
    except RecursionError:  # a worker may write a hundred thousand brackets
        record = None
    if record is None:
        return logging.INFO, text
    level, message = record
    # The logger keeps every level that it has ever seen, and a record may hold half a surrogate.
    level = min(max(level, logging.NOTSET), logging.CRITICAL)
    return level, message.encode("utf-8", "backslashreplace").decode()
