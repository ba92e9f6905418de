"""What a worker prints: its pipe is read, its lines are logged, and their end is kept.

Runs in the front.

1. The pipe is read when there is something in it, one buffer in each step of the event loop.
2. Lines are logged within limits (``line_log.py``).
3. What exceeds them is searched for its end only, so that a buffer costs the same however many
   lines are in it; and there is a pause after each buffer, so that those who print without end
   wait for the front, and nobody else does.
4. The end of all that was printed, logged or not, is kept for the record of a failure.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import ClassVar

from .line_log import MAX_LINE_CHARS, LineLog, OnLine, Tasks, decode_line

_READ_BYTES = 64 * 1024  # what a pipe holds
MAX_LINE_BYTES = 128 * 1024  # a longer line comes out in pieces
KEPT_LINES = 50
KEPT_BYTES = 64 * 1024  # fewer lines where they are long, but always the last one
# One buffer a millisecond is up to 64 MB/s, for 5 % of a core; without a pause a worker that floods
# had 230 MB/s, the front no time left, and its neighbour 700 instead of 1,800 tasks/s.
_PAUSE_S = 0.001
# Only a privileged process can enlarge a pipe beyond this (pipe-max-size is 1 MiB as a rule).
_MAX_DRAIN_BYTES = 16 * 1024 * 1024


class WorkerOutput:
    """Reads one worker's output pipe; owns the descriptor."""

    # All that flood the front together get one buffer read a pause, however many they are.
    _paused: ClassVar[set[WorkerOutput]] = set()

    def __init__(
        self, output_fd: int, slot: int, on_line: OnLine, before_reading: Callable[[], None]
    ) -> None:
        self._fd = output_fd
        self._before_reading = before_reading
        self._log = LineLog(slot, on_line)
        self._tasks: Tasks = ()
        self._partial = b""
        self._kept: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._pause: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        os.set_blocking(output_fd, False)
        self._loop.add_reader(output_fd, self._on_readable)

    def begin_tasks(self, tasks: Tasks) -> None:
        """Attribute what comes from now on to a task, or to all those of a batch."""
        self._end_line()
        self._kept.clear()
        self._tasks = tasks

    def end_tasks(self, *, read_first: bool) -> None:
        """Let what comes from now on be nobody's.

        The answer came by another way than the output, so some of that may not have been read;
        the worker knows, and asking the pipe each time would cost a task more than its log line.
        """
        if read_first:
            self.drain()
        self._end_line()
        self._tasks = ()

    def tail(self) -> str | None:
        """Return the last lines since the task began."""
        if not self._kept and not self._partial:
            return None
        lines = [*self._kept, self._partial] if self._partial else self._kept
        parts: deque[str] = deque(maxlen=KEPT_LINES)
        for line in lines:
            parts.extend(decode_line(line)[1].splitlines() or [""])
        return "\n".join(part[:MAX_LINE_CHARS] for part in parts) or None

    def drain(self) -> None:
        """Read all that is in the pipe now, and not what somebody goes on to write meanwhile."""
        if self._fd < 0:
            return
        there = fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4))
        left = min(int.from_bytes(there, sys.byteorder), _MAX_DRAIN_BYTES)
        while left > 0:
            read = self._read_once()
            if not read:  # somebody else reads from it, too
                return
            left -= read

    def close(self) -> None:
        """Read the rest and give the descriptor back."""
        if self._fd < 0:
            return
        self.drain()
        self._end_line()
        self._log.close()
        self._stop_reading()
        os.close(self._fd)
        self._fd = -1

    # --- reading

    def _on_readable(self) -> None:
        # A worker that has gone on to another task by itself said so before that could print.
        self._before_reading()
        if self._read_once() and self._log.is_exhausted:
            self._stop_reading()
            self._paused.add(self)
            self._pause = self._loop.call_later(_PAUSE_S * len(self._paused), self._read_on)

    def _read_on(self) -> None:
        self._stop_pausing()
        self._loop.add_reader(self._fd, self._on_readable)

    def _read_once(self) -> int:
        """Read one buffer at most; return how many bytes that was."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        if data:
            self._take(data)
        else:  # every writer has closed it, and the reader would be called for ever
            self._stop_reading()
        return len(data)

    def _stop_reading(self) -> None:
        self._loop.remove_reader(self._fd)
        self._stop_pausing()

    def _stop_pausing(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            self._paused.discard(self)

    # --- lines

    def _take(self, data: bytes) -> None:
        data = self._partial + data
        if len(data) - data.rfind(b"\n") > MAX_LINE_BYTES:
            data += b"\n"
        self._log.take(data, self._tasks)
        # What is before the last KEPT_LINES, if there is more, is one piece here, and pushed out.
        *lines, self._partial = data.rsplit(b"\n", KEPT_LINES + 1)
        self._kept.extend(lines)
        while len(self._kept) > 1 and sum(map(len, self._kept)) > KEPT_BYTES:
            self._kept.popleft()

    def _end_line(self) -> None:
        """Let what was begun be a line, though its end was not printed."""
        if self._partial:
            self._take(b"\n")
