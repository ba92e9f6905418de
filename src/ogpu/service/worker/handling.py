"""One task, or one batch: inputs validated, the handler called, results serialised.

Runs in a worker. Whatever goes wrong on the way, SystemExit included, fails the task and nothing
else; where it goes on too long, TaskTimeout may be raised in it (``interrupt.py``).

A handler with batching gets a list. What concerns one item (an input that does not fit any more, an
exception instance among the results, a result that cannot be written) fails that task alone; what
concerns all of them (an exception that was raised, a list of another length) fails each of them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from .. import wire
from ..errors import FailureReason
from ..handler import Handler
from . import output
from .failure import failed, let_go, message_of
from .interrupt import Interrupt

Order = tuple[wire.Run, bytes | BaseModel]  # with the input: a warm-up's is no JSON
Answer = tuple[wire.Done | wire.Failed, bytes]  # with the result
_End = bytes | wire.Failed  # what a task came to: its result, or why there is none


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

    def run(self, handler: Handler, orders: list[Order]) -> list[Answer]:
        """Run a task, or a batch; return what is to be said of each, with its result."""
        if handler.batching is None:
            ends = [self._run_one(handler, *order) for order in orders]
        else:
            ends = self._run_batch(handler, orders)
        output.flush()  # before it is looked whether anything was printed
        has_output = output.is_pending()
        return [
            _answer(order, end, has_output) for (order, _), end in zip(orders, ends, strict=True)
        ]

    def call(self, function: Callable[..., object], *arguments: object) -> object:
        """Call a function of the source, and wait for what it awaits."""
        result = function(*arguments)
        if self._loop is not None and inspect.isawaitable(result):
            return self._interrupt.run(self._loop, _awaited(result))
        return result

    def _run_one(self, handler: Handler, order: wire.Run, given: bytes | BaseModel) -> _End:
        try:
            self._interrupt.open(order)
            try:
                result = self.call(handler.function, _read_input(handler, given))
                return self._serialise(handler, result)
            finally:
                self._interrupt.close()
        except BaseException as error:  # noqa: BLE001 - any of them ends this task, and only it
            return _failed(order, error)

    # --- batches

    def _run_batch(self, handler: Handler, orders: list[Order]) -> list[_End]:
        ends: dict[int, _End] = {}
        inputs: list[BaseModel] = []
        fitting: list[wire.Run] = []
        try:
            self._interrupt.open(orders[0][0])
            try:
                for order, given in orders:
                    try:
                        inputs.append(_read_input(handler, given))
                        fitting.append(order)
                    except Exception as error:  # noqa: BLE001 - a validator may raise anything
                        ends[order.run] = _failed(order, error)
                if fitting:
                    results = _items_of(handler, self.call(handler.function, inputs), len(fitting))
                    ends |= {
                        order.run: self._end_of(handler, order, result)
                        for order, result in zip(fitting, results, strict=True)
                    }
            finally:
                self._interrupt.close()
        except BaseException as error:  # noqa: BLE001 - any of them ends the batch, and only it
            # Put into words once: a deep recursion takes 20 ms for that.
            failure = _failed(orders[0][0], error)
            rest = [order.run for order, _ in orders if order.run not in ends]
            ends |= {run: replace(failure, run=run) for run in rest}
        return [ends[order.run] for order, _ in orders]

    def _end_of(self, handler: Handler, order: wire.Run, result: object) -> _End:
        if isinstance(result, BaseException):
            return _failed(order, result)
        try:
            return self._serialise(handler, result)
        except _InvalidOutputError as error:
            return _failed(order, error)

    # --- results

    def _serialise(self, handler: Handler, result: object) -> bytes:
        model = handler.output_model
        if not isinstance(result, model) and not isinstance(result, _origin(model)):
            raise _InvalidOutputError(
                f"`{handler.name}` returned {_told(result)}; {model.__name__} was declared"
            )
        try:
            serialised = _as_json(result)
        except Exception as error:
            raise _InvalidOutputError(
                f"the result of `{handler.name}` cannot be written as JSON: {message_of(error)}"
            ) from error
        if len(serialised) > self._max_result_bytes:
            raise _InvalidOutputError(
                f"the result of `{handler.name}` has {len(serialised)} bytes; "
                f"OGPU_MAX_RESULT_BYTES allows {self._max_result_bytes}"
            )
        return serialised


@functools.cache
def _validator(model: type[BaseModel]) -> Callable[[object], BaseModel]:
    """Return what validates, past ``model_validate`` and the like, which a source may override."""
    return TypeAdapter(model).validator.validate_python


def _origin(model: type[BaseModel]) -> type[BaseModel]:
    """Return the generic model that ``Page[Item]`` was made of: ``Page(...)`` is one, too."""
    origin: type[BaseModel] | None = model.__pydantic_generic_metadata__["origin"]
    return origin or model


def _as_json(result: BaseModel) -> bytes:
    # The frozen module delivers model_dump(), which sources override (to leave out what is None).
    if type(result).model_dump is BaseModel.model_dump:
        return result.model_dump_json().encode()
    return to_json(result.model_dump(), inf_nan_mode="null")


def _read_input(handler: Handler, given: bytes | BaseModel) -> BaseModel:
    """Validate again: the front, which did so already, may have been one of an older source."""
    if not isinstance(given, bytes):
        return given
    model = handler.input_model
    try:
        # As FastAPI does it for the frozen module: parsed first. Then `bytes | str` makes a str of
        # a string, of which JSON validation would make bytes (the same with UUID, datetime, …).
        return _validator(model)(from_json(given))
    except ValidationError:
        pass  # a strict model takes a date from JSON, and not from a string
    try:
        return model.model_validate_json(given)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        what = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        raise _InvalidInputError(
            f"the input does not fit the input model of `{handler.name}` any more: {what}"
        ) from None


def _items_of(handler: Handler, results: object, wanted: int) -> Sequence[object]:
    """Check that a batch has given one result for each of its inputs."""
    if not isinstance(results, (list, tuple)):
        raise _InvalidOutputError(
            f"`{handler.name}` has a batch_size and returned {_told(results)}; "
            f"a list of {handler.output_model.__name__} was declared"
        )
    if len(results) != wanted:
        raise _InvalidOutputError(
            f"`{handler.name}` returned {len(results)} results for a batch of {wanted} inputs"
        )
    return results


def _answer(order: wire.Run, end: _End, has_output: bool) -> Answer:
    if isinstance(end, bytes):
        return wire.Done(order.run, has_output, wire.checksum(end)), end
    return end, b""


def _failed(order: wire.Run, error: BaseException) -> wire.Failed:
    """Return the answer for an exception, and let go of that."""
    match error:
        case _InvalidInputError():
            answer = wire.Failed(
                order.run, FailureReason.EXCEPTION.value, str(error), "ValidationError", None
            )
        case _InvalidOutputError():
            answer = failed(order, FailureReason.INVALID_OUTPUT, error, with_traceback=False)
        case _:
            answer = failed(order, FailureReason.EXCEPTION, error)
    let_go(error)
    return answer


def _told(result: object) -> str:
    return "None" if result is None else f"a {type(result).__name__}"


async def _awaited(result: Awaitable[object]) -> object:
    return await result
