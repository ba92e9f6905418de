"""The calls about tasks: get, list, cancel, logs, callback again.

Runs in the front. FastAPI reads the parameters and their documentation off the signatures; what is
asked without any is called without it (``TaskCalls.plain``).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from ..journal import Journal
from ..pool.supervisor import Supervisor
from ..task import Task, TaskState
from .problem import ALREADY_ENDED, AMBIGUOUS_TASK, NO_RECEIVER, NOT_ENDED, UNKNOWN_TASK
from .task_json import task_json, task_response

if TYPE_CHECKING:
    from ..outbox.outbox import Outbox

MAX_PAGE = 1000
# A page with more than this in it ends early; `next_cursor` leads to the rest.
_MOST_PAGE_BYTES = 8 * 1024 * 1024

_PLAIN = re.compile(r"/tasks/([A-Za-z0-9._:-]+)(/logs|/callback)?")
FunctionQuery = Annotated[
    str | None, Field(description="which task, where several functions have one of this address")
]


class TaskFinder:
    """Finds the one task that a call means."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def find(self, address: str, function: str | None) -> Task | Response:
        """Return the task, or the answer where there is none, or more than one."""
        found = await self._journal.find(address, function)
        if not found:
            return UNKNOWN_TASK.response(
                f"No task `{address}` is known here; it may be too old, or was never accepted."
            )
        if len(found) > 1:
            names = ", ".join(sorted(task.function for task in found))
            return AMBIGUOUS_TASK.response(f"Add ?function= with one of: {names}.")
        return found[0]


class TaskCalls:
    """The calls below ``/tasks``, but for the events."""

    def __init__(
        self,
        finder: TaskFinder,
        journal: Journal,
        supervisor: Supervisor,
        outbox: Outbox | None,
    ) -> None:
        self._finder = finder
        self._journal = journal
        self._supervisor = supervisor
        self._outbox = outbox
        self._plain = {
            ("GET", None): self.get,
            ("DELETE", None): self.cancel,
            ("GET", "/logs"): self.logs,
            ("POST", "/callback"): self.callback,
        }

    def plain(self, method: str, path: str) -> Awaitable[Response] | None:
        """Return the call that a path without a query means; None: FastAPI will know."""
        if (method, path) == ("GET", "/tasks"):
            return self.page()
        match = _PLAIN.fullmatch(path)
        call = None if match is None else self._plain.get((method, match[2]))
        return None if match is None or call is None else call(match[1])

    async def get(self, task_address: str, function: FunctionQuery = None) -> Response:
        """Return the task: its state, and its result or its error."""
        task = await self._finder.find(task_address, function)
        return task if isinstance(task, Response) else task_response(task)

    async def page(
        self,
        state: TaskState | None = None,
        limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50,
        cursor: Annotated[
            str | None,
            Field(pattern="^[0-9]{1,18}$", description="`next_cursor` of the page before"),
        ] = None,
    ) -> Response:
        """Return tasks, newest first; a large page ends early, and `next_cursor` leads on."""
        tasks, has_more = await self._journal.page(
            state, None if cursor is None else int(cursor), limit, _MOST_PAGE_BYTES
        )
        next_cursor = b'"%d"' % tasks[-1].number if has_more else b"null"
        listed = b",".join(map(task_json, tasks))
        body = b'{"tasks":[%b],"next_cursor":%b}' % (listed, next_cursor)
        return Response(body, media_type="application/json")

    async def cancel(self, task_address: str, function: FunctionQuery = None) -> Response:
        """End a task: a queued one is dropped, a running one's worker is killed."""
        task = await self._finder.find(task_address, function)
        if isinstance(task, Response):
            return task
        if task.state.is_terminal:
            return ALREADY_ENDED.response(
                f"`{task_address}` is {task.state.value}; there is nothing left to cancel."
            )
        await self._supervisor.cancel(task)
        if task.state is not TaskState.CANCELLED:  # its deadline was a moment sooner
            return ALREADY_ENDED.response(f"`{task_address}` is {task.state.value} by now.")
        await self._journal.stored(task)
        return task_response(task)

    async def logs(self, task_address: str, function: FunctionQuery = None) -> Response:
        """Return the last lines that the task has printed, as plain text."""
        task = await self._finder.find(task_address, function)
        if isinstance(task, Response):
            return task
        return PlainTextResponse(self._supervisor.output_of(task) or "")

    async def callback(self, task_address: str, function: FunctionQuery = None) -> Response:
        """Send the callback of a task that has ended once more, whatever came of it before."""
        task = await self._finder.find(task_address, function)
        if isinstance(task, Response):
            return task
        if not task.state.is_terminal:
            return NOT_ENDED.response(
                f"`{task_address}` is {task.state.value}; its callback follows its end."
            )
        if self._outbox is None or not self._journal.can_deliver(task):
            return NO_RECEIVER.response(
                "Results go to CALLBACK_URL, and failures to OGPU_FAILURE_CALLBACK_URL; the one "
                "that this task needs is not set."
            )
        self._outbox.send_again(task)
        (sent,) = await self._journal.find(task_address, task.function)
        return task_response(sent, 202)
