"""``@init()`` and ``@expose()``: check a function of the source and register it.

Runs wherever the source is imported. The function itself is returned unchanged, so that the source
can go on calling it directly. The checks and their errors are those of the frozen module.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, get_type_hints

from pydantic import BaseModel

from .config import MAX_TIMEOUT_S
from .handler import Handler, add_init_handler, register, registered
from .logger import logger

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def expose(
    timeout: float | None = None, *, grace: float | None = None
) -> Callable[[AnyFunction], AnyFunction]:
    """Mark a function as a handler: its name becomes the ``function`` of tasks.

    Args:
        timeout: seconds from the start of the run to the kill of the worker, with everything it
            started. None: ``OGPU_TASK_TIMEOUT``, or no limit where that is not set either.
        grace: seconds between the deadline, at which ``TaskTimeout`` is raised in the handler so
            that it can clean up, and the kill. None: ``OGPU_KILL_GRACE``, which is 0 (the handler
            is not asked).

    Raises:
        TypeError: the function does not take exactly one pydantic model and return one.
        ValueError: the name is taken, the timeout is not a positive number, or the grace is
            negative.

    Example:
        >>> @ogpu.service.expose(timeout=30)
        ... def predict(data: Input) -> Output:
        ...     return Output(label=model(data.text))
    """

    def decorator(function: AnyFunction) -> AnyFunction:
        name = function.__name__
        if name in registered():
            raise ValueError(f"A handler named `{name}` is already registered.")
        input_model, output_model = _models_of(function)
        timeout_s, grace_s = _checked_timeout(name, timeout), _checked_grace(name, grace)
        register(Handler(function, input_model, output_model, timeout_s, grace_s))
        return function

    if inspect.isroutine(timeout):
        raise ValueError(
            f"`{timeout.__name__}`: write `@expose()` with parentheses, or `@expose(timeout=30)`."
        )
    return decorator


def init() -> Callable[[AnyFunction], AnyFunction]:
    """Mark the function that prepares a worker, for example by loading a model.

    It takes no arguments, returns None and runs once in each worker before its first task.

    Raises:
        TypeError: the function takes arguments.
        ValueError: there is an init function already.

    Example:
        >>> @ogpu.service.init()
        ... def load() -> None:
        ...     global model
        ...     model = load_model().to("cuda")
    """

    def decorator(function: AnyFunction) -> AnyFunction:
        name = function.__name__
        parameters = inspect.signature(function).parameters
        if parameters:
            raise TypeError(
                f"Init function `{name}` must take no arguments (got {len(parameters)})"
            )
        add_init_handler(function)
        logger.debug("Registered init function: `%s`", name)
        return function

    return decorator


def _models_of(function: Callable[..., Any]) -> tuple[type[BaseModel], type[BaseModel]]:
    """Read the input and the output model off a handler's annotations."""
    name = function.__name__
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 1:
        raise TypeError(
            f"Function `{name}` must take exactly ONE input argument (got {len(parameters)})"
        )
    hints = get_type_hints(function)
    if "return" not in hints:
        raise TypeError(f"Function `{name}` must have a return type.")
    input_model = hints.get(parameters[0].name)
    output_model = hints["return"]
    if not _is_model(input_model):
        raise TypeError(f"Input to `{name}` must be a subclass of pydantic.BaseModel")
    if not _is_model(output_model):
        raise TypeError(f"Return type of `{name}` must be a subclass of pydantic.BaseModel")
    return input_model, output_model


def _is_model(candidate: object) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(candidate) and issubclass(candidate, BaseModel)


def _checked_timeout(name: str, timeout: object) -> float | None:
    if timeout is None:
        return None
    seconds = _seconds(timeout)
    if seconds is None or seconds == 0:
        raise ValueError(
            f"Function `{name}`: timeout must be a positive number of seconds, ten years at most "
            f"(got {timeout!r}); leave it out, or pass None, for no limit."
        )
    return seconds


def _checked_grace(name: str, grace: object) -> float | None:
    if grace is None:
        return None
    seconds = _seconds(grace)
    if seconds is None:
        raise ValueError(
            f"Function `{name}`: grace must be a number of seconds, 0 or more, ten years at most "
            f"(got {grace!r}); leave it out, or pass None, for OGPU_KILL_GRACE."
        )
    return seconds


def _seconds(value: object) -> float | None:
    """Return a time that is not negative as a float; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= MAX_TIMEOUT_S else None
