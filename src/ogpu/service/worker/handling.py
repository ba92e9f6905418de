"""One task: its input validated, its handler called, its result serialised.

Runs in a worker. Whatever goes wrong on the way, SystemExit included, fails the task and nothing
else; where it goes on too long, TaskTimeout may be raised in it (``interrupt.py``).
"""

from __future__ import annotations

import asyncio
import inspect
import zlib
from collections.abc import Awaitable, Callable

from pydantic import BaseModel, ValidationError

from .. import wire
from ..errors import FailureReason
from ..handler import Handler
from . import output
from .failure import failed, let_go, message_of
from .interrupt import Interrupt


class _InvalidInputError(Exception):
    """The input fitted the model when the task was accepted, and does not fit it now."""


class _InvalidOutputError(Exception):
    """The handler returned something that is not a usable result."""


class Handling:
    """Runs the source's functions. ``loop`` is for those that are async, where there are any."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None, interrupt: Interrupt, max_result_bytes: int
    ) -> None:
        self._loop = loop
        self._interrupt = interrupt
        self._max_result_bytes = max_result_bytes

    def run(
        self, handler: Handler, order: wire.Run, input_json: bytes
    ) -> tuple[wire.Done | wire.Failed, bytes]:
        """Run a task; return what is to be said of it, and its output."""
        try:
            result_json = self._result_of(handler, order, input_json)
        except _InvalidInputError as error:
            reason = FailureReason.EXCEPTION.value
            answer = wire.Failed(order.run, reason, str(error), "ValidationError", None)
            let_go(error)
        except _InvalidOutputError as error:
            answer = failed(order, FailureReason.INVALID_OUTPUT, error, with_traceback=False)
            let_go(error)
        except BaseException as error:  # noqa: BLE001 - any of them ends this task, and only it
            answer = failed(order, FailureReason.EXCEPTION, error)
            let_go(error)
        else:
            output.flush()
            done = wire.Done(order.run, output.is_pending(), zlib.crc32(result_json))
            return done, result_json
        output.flush()
        return answer, b""

    def call(self, function: Callable[..., object], *arguments: BaseModel) -> object:
        """Call a function of the source, and wait for what it awaits."""
        result = function(*arguments)
        if self._loop is not None and inspect.isawaitable(result):
            return self._interrupt.run(self._loop, _awaited(result))
        return result

    def _result_of(self, handler: Handler, order: wire.Run, input_json: bytes) -> bytes:
        self._interrupt.open(order)
        try:
            result = self.call(handler.function, _read_input(handler, input_json))
            return self._serialise(handler, result)
        finally:
            self._interrupt.close()

    def _serialise(self, handler: Handler, result: object) -> bytes:
        name, wanted = handler.name, handler.output_model.__name__
        if not isinstance(result, handler.output_model):
            given = "None" if result is None else f"a {type(result).__name__}"
            raise _InvalidOutputError(f"`{name}` returned {given}; {wanted} was declared")
        try:
            serialised = result.model_dump_json().encode()
        except Exception as error:
            raise _InvalidOutputError(
                f"the result of `{name}` cannot be written as JSON: {message_of(error)}"
            ) from error
        if len(serialised) > self._max_result_bytes:
            raise _InvalidOutputError(
                f"the result of `{name}` has {len(serialised)} bytes; "
                f"OGPU_MAX_RESULT_BYTES allows {self._max_result_bytes}"
            )
        return serialised


def _read_input(handler: Handler, input_json: bytes) -> BaseModel:
    """Validate again: the front, which did so already, may have been one of an older source."""
    try:
        return handler.input_model.model_validate_json(input_json)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        what = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        raise _InvalidInputError(
            f"the input does not fit the input model of `{handler.name}` any more: {what}"
        ) from None


async def _awaited(result: Awaitable[object]) -> object:
    return await result
