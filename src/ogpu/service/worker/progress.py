"""Progress of the running tasks, on its way to the front: ten times a second at most.

Runs in a worker. A report that comes too soon after the last one is kept, and the newest that was
kept follows when its time has come, so that the last word before a long silence is not lost.
"""

from __future__ import annotations

import os
import threading
import time

from .. import wire
from .channel import Channel

MIN_INTERVAL_S = 0.1


class ProgressReporter:
    """Reports for one task, or batch, after the other."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._runs: set[int] = set()
        self._sent_s = 0.0
        self._kept: dict[int, wire.Progressed] = {}
        self._timer: threading.Timer | None = None

    def begin(self, runs: set[int]) -> None:
        """Report for other tasks."""
        self._runs = runs
        self._sent_s = 0.0

    def end(self) -> None:
        """Send what was kept, before the task's end is told; then nothing more."""
        with self._lock:
            self._runs = set()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._kept:
                self._send_kept()

    def report(self, run: int, fraction: float, message: str | None) -> None:
        """Send a report of a run now, or keep it for a moment; drop it where that is over."""
        if os.getpid() != self._pid:  # a child that the handler forked has the parent's channel
            return
        with self._lock:
            if run not in self._runs:
                return
            self._kept[run] = wire.Progressed(run, fraction, _cleaned(message))
            if self._timer is None:
                self._send_or_wait()

    def _on_timer(self) -> None:
        with self._lock:
            self._timer = None
            if self._kept:
                self._send_or_wait()

    def _send_or_wait(self) -> None:
        wait_s = self._sent_s + MIN_INTERVAL_S - time.monotonic()
        if wait_s <= 0:
            self._send_kept()
            return
        self._timer = threading.Timer(wait_s, self._on_timer)
        self._timer.daemon = True
        self._timer.start()

    def _send_kept(self) -> None:
        for report in self._kept.values():
            self._channel.send_or_drop(report)
        self._kept.clear()
        self._sent_s = time.monotonic()


def _cleaned(message: str | None) -> str | None:
    if message is None:
        return None
    return message[: wire.MAX_PROGRESS_CHARS].encode("utf-8", "backslashreplace").decode()
