"""The registry of what the source exposes. Filled while the source is imported, read afterwards.

Runs in every process that imports the source: the front, spawned workers, and a handler's own
children. ``get_handlers`` and its three siblings keep the names and shapes of the frozen module.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from .logger import logger

HandlerFunction = Callable[[Any], Any]
InitFunction = Callable[[], Any]
PrepareFunction = Callable[[], Any]


@dataclass(frozen=True)
class Batching:
    """How many tasks a handler takes at once, at most, and for how long the first one waits."""

    size: int
    window_s: float


@dataclass(frozen=True)
class Handler:
    """A function of the source that runs tasks: one pydantic model in, one out.

    With ``batching`` it takes a list of the one, and returns a list of the other, as long.
    """

    function: HandlerFunction
    input_model: type[BaseModel]
    output_model: type[BaseModel]
    timeout_s: float | None = None
    grace_s: float | None = None
    batching: Batching | None = None
    warmup: BaseModel | None = None  # what it is run with, once, in each new worker
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))

    @property
    def name(self) -> str:
        """The function's name, which is the task's ``function``."""
        return self.function.__name__


_handlers: dict[str, Handler] = {}
_init_function: InitFunction | None = None
_prepare_function: PrepareFunction | None = None


def register(handler: Handler) -> None:
    """Add a handler.

    Raises:
        ValueError: a handler of that name is registered already.
    """
    if handler.name in _handlers:
        raise ValueError(f"A handler named `{handler.name}` is already registered.")
    _handlers[handler.name] = handler


def registered() -> dict[str, Handler]:
    """Return the handlers by name, in the order of their registration."""
    return dict(_handlers)


def add_handler(
    fn: HandlerFunction, input_model: type[BaseModel], output_model: type[BaseModel]
) -> None:
    """Register a handler without a timeout, unchecked (a name of the frozen module)."""
    register(Handler(fn, input_model, output_model))


def get_handlers() -> list[tuple[HandlerFunction, type[BaseModel], type[BaseModel]]]:
    """Return ``(function, input model, output model)`` of each handler.

    For sources that build their own server of them. No pool ends what runs too long there, so a
    function with a timeout is one that gives up waiting, as in the frozen module.
    """
    return [(giving_up(h), h.input_model, h.output_model) for h in _handlers.values()]


def giving_up(handler: Handler) -> HandlerFunction:
    """Return a function that returns None at the handler's timeout, or when the handler raises.

    The handler goes on in its thread: nothing in one process can stop it.
    """
    function, timeout_s = handler.function, handler.timeout_s
    if timeout_s is None or handler.is_async:
        return function

    @functools.wraps(function)
    def call(data: BaseModel) -> object:
        results: list[object] = []

        def run() -> None:
            try:
                results.append(function(data))
            except Exception as error:  # noqa: BLE001 - logged, as the frozen module does
                logger.task_fail("Exception in `%s`: %s", handler.name, error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            logger.task_timeout("`%s` timed out after %g seconds", handler.name, timeout_s)
            return None
        return results[0] if results else None

    return call


def add_init_handler(fn: InitFunction) -> None:
    """Register the init function.

    Raises:
        ValueError: there is one already.
    """
    global _init_function  # noqa: PLW0603 - the registry is the module, as in the frozen one
    if _init_function is not None:
        raise ValueError(
            f"An init handler `{_init_function.__name__}` is already registered. "
            "Only one init function is allowed."
        )
    _init_function = fn


def get_init_handler() -> InitFunction | None:
    """Return the init function, or None when the source has none."""
    return _init_function


def add_prepare_handler(fn: PrepareFunction) -> None:
    """Register the prepare function.

    Raises:
        ValueError: there is one already.
    """
    global _prepare_function  # noqa: PLW0603 - as above
    if _prepare_function is not None:
        raise ValueError(
            f"A prepare handler `{_prepare_function.__name__}` is already registered. "
            "Only one prepare function is allowed."
        )
    _prepare_function = fn


def get_prepare_handler() -> PrepareFunction | None:
    """Return the prepare function, or None when the source has none."""
    return _prepare_function
