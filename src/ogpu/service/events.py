"""What happens to tasks, for whoever watches one: states, progress, lines of output.

Runs in the front. Each watcher has a stream of its own, which is bounded: one that reads too slowly
loses lines, and is told how many; a state is never lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum

from .task import Progress, Task, TaskState

MAX_WAITING = 1000


class EventKind(str, Enum):
    """What an event tells; its data are named beside it."""

    STATE = "state"  # state, attempt, at
    PROGRESS = "progress"  # fraction, message
    LOG = "log"  # line
    DROPPED = "dropped"  # lines


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened to a task."""

    kind: EventKind
    data: dict[str, object]


def state_event(state: TaskState, attempt: int, at: datetime | None) -> Event:
    """Return the event of a transition."""
    return Event(EventKind.STATE, {"state": state.value, "attempt": attempt, "at": at})


def progress_event(progress: Progress) -> Event:
    """Return the event of a task's word about itself."""
    data: dict[str, object] = {"fraction": progress.fraction, "message": progress.message}
    return Event(EventKind.PROGRESS, data)


def log_event(line: str) -> Event:
    """Return the event of a line of output."""
    return Event(EventKind.LOG, {"line": line})


class Stream:
    """The events of one task, for one watcher."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._changed = asyncio.Event()
        self.is_closed = False

    def put(self, event: Event) -> None:
        """Add an event; drop a line, or a progress, where too many wait."""
        if event.kind is not EventKind.STATE and len(self._events) >= MAX_WAITING:
            self._dropped += 1
            return
        if self._dropped:
            self._events.append(Event(EventKind.DROPPED, {"lines": self._dropped}))
            self._dropped = 0
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """Let the watcher go: the service ends."""
        self.is_closed = True
        self._changed.set()

    async def next(self, timeout_s: float) -> Event | None:
        """Wait for the next event; None: there was none in that time, or the stream is closed."""
        if not self._events and not self.is_closed:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except asyncio.TimeoutError:
                return None
        return self._events.popleft() if self._events else None


class TaskEvents:
    """Passes events on to those who watch."""

    def __init__(self) -> None:
        self._streams: dict[int, list[Stream]] = {}

    def watch(self, task: Task) -> Stream:
        """Open a stream of what happens to a task from now on; ``unwatch`` ends it."""
        stream = Stream()
        self._streams.setdefault(task.number, []).append(stream)
        return stream

    def unwatch(self, task: Task, stream: Stream) -> None:
        """Give a stream back."""
        streams = self._streams[task.number]
        streams.remove(stream)
        if not streams:
            del self._streams[task.number]

    def on_transition(self, task: Task) -> None:
        """Take notice of a new state (a listener of the journal)."""
        if task.number in self._streams:  # nobody watches, nearly always
            at = task.finished_at or task.started_at or datetime.now(timezone.utc)
            self._put(task, state_event(task.state, task.attempt, at))

    def on_progress(self, task: Task) -> None:
        """Take notice of what a task says of itself."""
        if task.number in self._streams and task.progress is not None:
            self._put(task, progress_event(task.progress))

    def on_line(self, task: Task, line: str) -> None:
        """Take notice of a line of output."""
        if task.number in self._streams:
            self._put(task, log_event(line))

    def close(self) -> None:
        """Let every watcher go."""
        for streams in self._streams.values():
            for stream in streams:
                stream.close()

    def _put(self, task: Task, event: Event) -> None:
        for stream in self._streams[task.number]:
            stream.put(event)
