"""``POST /run/{function}/{task_address}``: the hot path.

Runs in the front. A plain ASGI endpoint: FastAPI's dependency machinery would cost more than all
of this together.

1. Read the body, no more than OGPU_MAX_BODY_BYTES of it.
2. Check the address, and the body with the input model; the bytes go on, the object is dropped.
3. The same task is active already: join it.
4. Otherwise refuse what cannot be kept (not accepting, queue full, no disk), or record and queue
   it.
5. With ``Prefer: wait=S`` answer 200 and the task if it ends within S seconds, on disk or not: the
   client has it. Else 202, when its row is on the disk.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import JournalError
from ..handler import Handler
from ..journal import Journal
from ..logger import logger
from ..pool.supervisor import Supervisor
from ..task import Task
from .problem import (
    BODY_TOO_LARGE,
    INPUT_CONFLICT,
    JOURNAL_UNAVAILABLE,
    NOT_ACCEPTING,
    QUEUE_FULL,
    UNKNOWN_FUNCTION,
    VALIDATOR_FAILED,
)
from .tasks import task_json

_ADDRESS = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PREFER_WAIT = re.compile(rb'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9})"?', re.IGNORECASE)
SLOW_VALIDATION_S = 0.1

Answer = Response | tuple[int, bytes]


class _DisconnectedError(Exception):
    """The client went away before its request was complete; nobody needs an answer."""


class _BodyTooLargeError(Exception):
    """The body has more bytes than are allowed."""


class Waiters:
    """Requests that wait for the end of a task (a listener of the journal)."""

    def __init__(self) -> None:
        self._futures: dict[int, list[asyncio.Future[None]]] = {}

    def on_transition(self, task: Task) -> None:
        if task.state.is_terminal:
            self.wake(task)

    def wake(self, task: Task) -> None:
        """Let the requests go on that wait for a task."""
        for future in self._futures.pop(task.number, ()):
            _wake(future)

    def release(self) -> None:
        """Let every request go on now: the service ends before their tasks do."""
        for futures in self._futures.values():
            for future in futures:
                _wake(future)

    async def wait(self, task: Task, timeout_s: float) -> bool:
        """Wait for a task's end, for so long at most; return whether it has ended."""
        if task.state.is_terminal or timeout_s <= 0:
            return task.state.is_terminal
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        futures = self._futures.setdefault(task.number, [])
        futures.append(future)
        timer = loop.call_later(timeout_s, _wake, future)
        try:
            await future
        finally:
            timer.cancel()
            futures.remove(future)
            if not futures:
                self._futures.pop(task.number, None)
        return task.state.is_terminal


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except _DisconnectedError:
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
        try:
            body = await _read_body(scope, receive, self._max_body_bytes)
        except _BodyTooLargeError:
            return BODY_TOO_LARGE.response(
                f"At most {self._max_body_bytes} bytes are accepted (OGPU_MAX_BODY_BYTES)."
            )
        refusal = _check_address(address) or _check_input(handler, body)
        if refusal is not None:
            return refusal
        try:
            return await self._take(handler, address, body, _preferred_wait_s(scope))
        except JournalError as error:
            return self._unavailable(str(error))

    async def _take(self, handler: Handler, address: str, body: bytes, wait_s: float) -> Answer:
        task = await self._accept(handler, address, body)
        if isinstance(task, Response):
            return task
        if wait_s and await self._waiters.wait(task, wait_s):
            return 200, task_json(task)
        await self._journal.stored(task)
        return 202, b'{"task_address":"%b","status":"accepted"}' % address.encode()

    async def _accept(self, handler: Handler, address: str, body: bytes) -> Task | Response:
        """Join the active task of that name, or record and queue a new one."""
        name = handler.name
        task = self._journal.find_active(name, address)
        if task is None and self._journal.may_be_undelivered(name, address):
            found = await self._journal.find(address, name)
            # While the disk was asked, another request may have begun a new task of that name.
            task = self._journal.find_active(name, address) or next(iter(found), None)
        if task is not None and task.is_active:
            return await self._join(handler, task, body)
        refusal = self._check_capacity()
        if refusal is not None:
            return refusal
        task = self._journal.accept(name, address, body, self._timeout_s)
        self._supervisor.submit(task)
        return task

    async def _join(self, handler: Handler, task: Task, body: bytes) -> Task | Response:
        known = task.input
        if known is None:
            known = (await self._journal.inputs([task.number], 0)).get(task.number)
        if known is not None and _same_input(handler, known, body):
            return task
        state = task.state.value
        if task.state.is_terminal:
            state += ", and its callback is not delivered yet,"
        return INPUT_CONFLICT.response(
            f"`{task.address}` is {state} with another input; use another address, or wait for its "
            "end."
        )

    def _check_capacity(self) -> Response | None:
        if self._journal.trouble is not None:
            return self._unavailable(self._journal.trouble)
        if not self._supervisor.accepting:
            return NOT_ACCEPTING.response(
                f"The service is {self._supervisor.state.value}; try again later, or elsewhere.",
                retry_after_s=self._supervisor.retry_after_s,
            )
        if self._supervisor.queue_is_full:
            return QUEUE_FULL.response(
                "As many tasks are waiting as OGPU_QUEUE_SIZE allows; try again later.",
                retry_after_s=self._supervisor.retry_after_s,
            )
        return None

    def _unavailable(self, why: str) -> Response:
        return JOURNAL_UNAVAILABLE.response(
            f"The task was not accepted: {why}. Try again later, or elsewhere.",
            retry_after_s=self._supervisor.retry_after_s,
        )


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    for name, value in scope["headers"]:
        # (A number of 5,000 digits is refused by int(), and too large in any case.)
        if name == b"content-length" and (len(value) > 18 or int(value) > limit):
            raise _BodyTooLargeError
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _BodyTooLargeError
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _preferred_wait_s(scope: Scope) -> float:
    """Read ``Prefer: wait=S`` (RFC 7240, 4.3); 0 where there is none."""
    for name, value in scope["headers"]:
        if name == b"prefer" and (match := _PREFER_WAIT.search(value)):
            return float(match[1])
    return 0.0


def _check_address(address: str) -> Response | None:
    if _ADDRESS.fullmatch(address) and address not in (".", ".."):
        return None
    return _unprocessable(
        [
            {
                "type": "string_pattern_mismatch",
                "loc": ["path", "task_address"],
                "msg": "A task_address has 1 to 128 characters of A-Z a-z 0-9 . _ : -, "
                "and is not '.' or '..'",
                "input": address,
            }
        ]
    )


def _check_input(handler: Handler, body: bytes) -> Response | None:
    """Validate with the input model: the one piece of the source that runs in the front."""
    started = time.perf_counter()
    try:
        handler.input_model.model_validate_json(body)
    except ValidationError as error:
        return _unprocessable(_errors_of(error, body))
    except Exception:  # noqa: BLE001 - a user's validator may raise anything
        logger.exception("A validator of `%s` raised what is no ValueError", handler.name)
        return VALIDATOR_FAILED.response(
            f"The input model of `{handler.name}` could not judge this input; this is a defect "
            "of the source, which its log describes."
        )
    finally:
        took_s = time.perf_counter() - started
        if took_s > SLOW_VALIDATION_S:
            logger.warning(
                "The event loop was blocked for %.2f s by the input model of `%s` (%d bytes)",
                took_s,
                handler.name,
                len(body),
            )
    return None


def _errors_of(error: ValidationError, body: bytes) -> list[dict[str, Any]]:
    """Return pydantic's errors in the shape of FastAPI's 422."""
    if not body:
        return [{"type": "missing", "loc": ["body"], "msg": "Field required", "input": None}]
    errors: list[dict[str, Any]] = []
    for found in error.errors(include_url=False):
        entry: dict[str, Any] = {**found, "loc": ["body", *found["loc"]]}
        if found["type"] == "json_invalid":
            entry["input"] = {}
        errors.append(entry)
    return errors


def _unprocessable(errors: list[dict[str, Any]]) -> Response:
    body = to_json({"detail": errors}, fallback=str, inf_nan_mode="null")
    return Response(body, 422, media_type="application/json")


def _same_input(handler: Handler, known: bytes, given: bytes) -> bool:
    """Compare as the handler would: white space and the order of keys do not count."""
    if known == given:
        return True
    validate = handler.input_model.model_validate_json
    return bool(validate(known) == validate(given))
