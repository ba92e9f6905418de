"""``GET /tasks/{task_address}/events``: what happens to a task, as server-sent events.

Runs in the front. A watcher who comes late first gets what has happened, as far as it is known.

    event: state      data: {"state", "attempt", "at"}     the last one is terminal
    event: progress   data: {"fraction", "message"}
    event: log        data: {"line"}
    event: dropped    data: {"lines"}                      the watcher was too slow for so many
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from fastapi.sse import format_sse_event
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from ..errors import JournalError
from ..events import Event, Stream, TaskEvents, log_event, progress_event, state_event
from ..journal import Journal
from ..pool.supervisor import Supervisor
from ..task import Task, TaskState
from .tasks import FunctionQuery, TaskFinder

# Proxies close what is silent for a minute; and a client that is gone is noticed by it.
_KEEP_ALIVE_S = 15.0
_KEEP_ALIVE = format_sse_event(comment="still here")


class EventCalls:
    """The one call that streams."""

    def __init__(
        self, finder: TaskFinder, journal: Journal, supervisor: Supervisor, events: TaskEvents
    ) -> None:
        self._finder = finder
        self._journal = journal
        self._supervisor = supervisor
        self._events = events

    async def watch(self, task_address: str, function: FunctionQuery = None) -> Response:
        """Stream what happens to the task, what has happened first, until it has ended."""
        task = await self._finder.find(task_address, function)
        if isinstance(task, Response):
            return task
        # From here to the stream's opening nothing is awaited, so that nothing falls in between.
        history = list(self._history(task))
        stream = None if task.state.is_terminal else self._events.watch(task)
        return StreamingResponse(
            self._tell(task, history, stream),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    def _history(self, task: Task) -> Iterator[Event]:
        yield state_event(TaskState.QUEUED, 1, task.accepted_at)
        if task.started_at is not None:
            yield state_event(TaskState.RUNNING, task.attempt, task.started_at)
        elif task.attempt > 1 and not task.state.is_terminal:
            yield state_event(TaskState.QUEUED, task.attempt, None)
        for line in (self._supervisor.output_of(task) or "").splitlines():
            yield log_event(line)
        if task.progress is not None:
            yield progress_event(task.progress)
        if task.state.is_terminal:
            yield state_event(task.state, task.attempt, task.finished_at)

    async def _tell(
        self, task: Task, history: list[Event], stream: Stream | None
    ) -> AsyncIterator[bytes]:
        try:
            for event in history:
                yield _as_sse(event)
            while stream is not None and not stream.is_closed:
                next_event = await stream.next(_KEEP_ALIVE_S)
                if next_event is None:
                    yield _KEEP_ALIVE
                    continue
                is_last = next_event.data.get("state") in _TERMINAL
                if is_last:  # an end that is told is on the disk
                    await self._journal.stored(task)
                yield _as_sse(next_event)
                if is_last:
                    return
        except JournalError:
            return  # the end cannot be recorded now; whoever asks again will hear of it
        finally:
            if stream is not None:
                self._events.unwatch(task, stream)


_TERMINAL = frozenset(state.value for state in TaskState if state.is_terminal)


def _as_sse(event: Event) -> bytes:
    return format_sse_event(event=event.kind.value, data_str=to_json(event.data).decode())
