"""``POST /run/{function}/{task_address}``: the hot path.

Runs in the front. A request that arrived whole is taken by ``begin``, without a coroutine (see
``shortcut.py``); others, and those for which the disk must be asked, by a plain ASGI endpoint:
FastAPI's dependency machinery would cost more than all of this together.

1. Read the body, no more than OGPU_MAX_BODY_BYTES of it.
2. Check the address, and the body with the input model; the bytes go on, the object is dropped.
3. The same task is active already: join it.
4. Otherwise refuse what cannot be kept (not accepting, queue full, no disk), or queue it.
5. With ``Prefer: wait=S`` answer 200 and the task if it ends within S seconds, on disk or not: the
   client has it. Else 202, when its row is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import JournalError
from ..handler import Handler
from ..journal import Journal
from ..pool.supervisor import Supervisor
from ..task import Task
from .inputs import (
    BodyTooLargeError,
    DisconnectedError,
    check_address,
    check_input,
    header_value,
    preferred_wait_s,
    read_body,
    same_input,
)
from .problem import (
    BODY_TOO_LARGE,
    INPUT_CONFLICT,
    JOURNAL_UNAVAILABLE,
    NOT_ACCEPTING,
    QUEUE_FULL,
    UNKNOWN_FUNCTION,
)
from .protocol import Answer
from .task_json import task_json, task_parts
from .waiters import Waiters, Waiting
from .whole import WholeRequest

Reply = Callable[[Answer], None]


def accepted(address: str) -> Answer:
    """Return the answer to a task whose row is on the disk."""
    return 202, b'{"task_address":"%b","status":"accepted"}' % address.encode()


class RunCall:
    """One request whose task is queued, and whose answer is to come."""

    __slots__ = ("_journal", "_refuse", "_reply", "_task", "_waiters", "_waiting")

    def __init__(
        self,
        task: Task,
        journal: Journal,
        waiters: Waiters,
        reply: Reply,
        refuse: Callable[[str], Answer],
    ) -> None:
        self._task = task
        self._journal = journal
        self._waiters = waiters
        self._reply: Reply | None = reply
        self._refuse = refuse
        self._waiting: Waiting | None = None

    def begin(self, wait_s: float) -> None:
        """Wait for the end of the task, or for its row only."""
        if wait_s:
            self._waiting = self._waiters.call(self._task, wait_s, self._on_waited)
        else:
            self._journal.when_stored(self._task, self._on_stored)

    def leave(self) -> None:
        """Give no answer: the client has gone. The task goes on."""
        self._reply = None
        if self._waiting is not None:
            self._waiters.drop(self._waiting)
            self._waiting = None

    def _on_waited(self) -> None:
        self._waiting = None  # each refers to the other, and the task would be kept with its result
        if self._task.state.is_terminal:
            self._end((200, task_parts(self._task)))
        else:
            self._journal.when_stored(self._task, self._on_stored)

    def _on_stored(self, error: JournalError | None) -> None:
        self._end(accepted(self._task.address) if error is None else self._refuse(str(error)))

    def _end(self, answer: Answer) -> None:
        reply, self._reply = self._reply, None
        if reply is not None:
            reply(answer)


class RunEndpoint:
    """The ASGI endpoint of one handler; with None, of every function that does not exist."""

    def __init__(
        self,
        handler: Handler | None,
        timeout_s: float | None,
        max_body_bytes: int,
        journal: Journal,
        supervisor: Supervisor,
        waiters: Waiters,
    ) -> None:
        self._handler = handler
        self._timeout_s = timeout_s
        self._max_body_bytes = max_body_bytes
        self._journal = journal
        self._supervisor = supervisor
        self._waiters = waiters

    def has_room_for(self, body_bytes: int) -> bool:
        """Tell whether a body may be that long."""
        return body_bytes <= self._max_body_bytes

    def begin(self, address: str, request: WholeRequest, reply: Reply) -> Answer | RunCall | None:
        """Take a request that arrived whole; None: it is one for the ASGI endpoint.

        Returns:
            The answer, or the call that will give it to ``reply``, later, unless it is left.
        """
        handler, body = self._handler, request.body
        if handler is None or not self.has_room_for(len(body)):
            return None
        known = self._journal.find_active(handler.name, address)
        if known is not None or self._journal.may_be_undelivered(handler.name, address):
            return None
        refusal = check_address(address) or check_input(handler, body) or self._check_capacity()
        if refusal is not None:
            return refusal
        task = self._journal.accept(handler.name, address, body, self._timeout_s)
        self._supervisor.submit(task)
        call = RunCall(task, self._journal, self._waiters, reply, self._unavailable)
        call.begin(preferred_wait_s(request.headers.get(b"prefer", b"")))
        return call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except DisconnectedError:
            return
        if isinstance(answer, Response):
            await answer(scope, receive, send)
            return
        status, body = answer
        start: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
            ],
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        _, _, function, address = scope["path"].rsplit("/", 3)
        handler = self._handler
        if handler is None:
            return UNKNOWN_FUNCTION.response(
                f"This source exposes no function `{function}`; see /docs."
            )
        body = await self._read(handler, address, scope, receive)
        if isinstance(body, Response):
            return body
        try:
            task = await self._accept(handler, address, body)
            del body  # the journal's now, while this may wait for hours
            if isinstance(task, Response):
                return task
            wait_s = preferred_wait_s(header_value(scope, b"prefer"))
            if wait_s and await self._waiters.wait(task, wait_s, receive):
                return 200, task_json(task)
            await self._journal.stored(task)
        except JournalError as error:
            return self._unavailable(str(error))
        return accepted(address)

    async def _read(
        self, handler: Handler, address: str, scope: Scope, receive: Receive
    ) -> bytes | Response:
        """Read the body, and judge it and the address."""
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
        except BodyTooLargeError:
            return BODY_TOO_LARGE.response(
                f"At most {self._max_body_bytes} bytes are accepted (OGPU_MAX_BODY_BYTES)."
            )
        return check_address(address) or check_input(handler, body) or body

    async def _accept(self, handler: Handler, address: str, body: bytes) -> Task | Response:
        """Join the active task of that name, or record and queue a new one."""
        name = handler.name
        while True:
            task = await self._find_active(name, address)
            if task is None:
                break
            known = await self._input_of(task)
            if known is not None:
                return task if same_input(handler, known, body) else _conflict(task)
            # It was delivered meanwhile, or is over and delivered once more: a POST is a new run,
            # unless another request has begun one by now.
            if self._journal.find_active(name, address) is None:
                break
        # Nothing is awaited from the last look to here, so that there is one task of a name.
        refusal = self._check_capacity()
        if refusal is not None:
            return refusal
        task = self._journal.accept(name, address, body, self._timeout_s)
        self._supervisor.submit(task)
        return task

    async def _find_active(self, function: str, address: str) -> Task | None:
        task = self._journal.find_active(function, address)
        if task is None and self._journal.may_be_undelivered(function, address):
            found = await self._journal.find(address, function)
            # While the disk was asked, another request may have begun a new task of that name.
            task = self._journal.find_active(function, address) or next(iter(found), None)
        return task if task is not None and task.is_active else None

    async def _input_of(self, task: Task) -> bytes | None:
        if task.input is not None:
            return task.input
        return (await self._journal.inputs([task.number], 0)).get(task.number)

    def _check_capacity(self) -> Response | None:
        trouble = self._journal.trouble
        if trouble is not None:
            return self._unavailable(trouble)
        if self._supervisor.has_room:
            return None
        if not self._supervisor.accepting:
            return NOT_ACCEPTING.response(
                f"The service is {self._supervisor.state.value}; try again later, or elsewhere.",
                retry_after_s=self._supervisor.retry_after_s,
            )
        return QUEUE_FULL.response(
            "As many tasks are waiting as OGPU_QUEUE_SIZE allows; try again later.",
            retry_after_s=self._supervisor.retry_after_s,
        )

    def _unavailable(self, why: str) -> Response:
        return JOURNAL_UNAVAILABLE.response(
            f"The task was not accepted: {why}. Try again later, or elsewhere.",
            retry_after_s=self._supervisor.retry_after_s,
        )


def _conflict(task: Task) -> Response:
    state = task.state.value
    if task.state.is_terminal:
        state += ", and its callback is not delivered yet,"
    return INPUT_CONFLICT.response(
        f"`{task.address}` is {state} with another input; use another address, or wait for its end."
    )
