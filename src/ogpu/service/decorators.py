"""``@init()``, ``@prepare()`` and ``@expose()``: check a function of the source and register it.

Runs wherever the source is imported. The function itself is returned unchanged, so that the source
can go on calling it directly. The checks and their errors are those of the frozen module.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from .config import MAX_TIMEOUT_S
from .handler import (
    Batching,
    Handler,
    add_init_handler,
    add_prepare_handler,
    register,
    registered,
)
from .logger import logger

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
MAX_BATCH_SIZE = 1024
DEFAULT_BATCH_WINDOW_S = 0.01


def expose(
    timeout: float | None = None,
    *,
    grace: float | None = None,
    batch_size: int | None = None,
    batch_window: float | None = None,
    warmup: BaseModel | None = None,
) -> Callable[[AnyFunction], AnyFunction]:
    """Mark a function as a handler: its name becomes the ``function`` of tasks.

    Args:
        timeout: seconds from the start of the run to the kill of the worker, with everything it
            started. None: ``OGPU_TASK_TIMEOUT``, or no limit where that is not set either.
        grace: seconds between the deadline, at which ``TaskTimeout`` is raised in the handler so
            that it can clean up, and the kill. None: ``OGPU_KILL_GRACE``, which is 0 (the handler
            is not asked).
        batch_size: the function takes a list of inputs, so many at most, and returns a list of
            outputs in their order. Tasks that wait are run together; each keeps its own address,
            state and result. An output that is an exception instance fails its own task. What the
            function raises, and a list of another length, fail the batch; the timeout is the
            batch's. When a batch kills its worker, its tasks are run again one at a time.
        batch_window: seconds that a task waits for others while a worker is free, until there are
            ``batch_size``; half of ``OGPU_QUEUE_TIMEOUT`` at most. None: 0.01.
        warmup: an input that the handler is run with (``batch_size`` times, in one batch), once, in
            each new worker, after ``@init`` and before its first task: what a first call costs (GPU
            kernels, compilation, autotuning) is then no task's. It is no task itself: nothing is
            recorded or sent. A failure of it is one of ``@init``.

    Raises:
        TypeError: the function does not take exactly one pydantic model and return one (with
            ``batch_size``: a list of one, and a list of the other), or the warm-up is not an
            instance of the first.
        ValueError: the name is taken, or a number is out of its range.

    Example:
        >>> @ogpu.service.expose(timeout=30)
        ... def predict(data: Input) -> Output:
        ...     return Output(label=model(data.text))

        >>> @ogpu.service.expose(timeout=30, batch_size=8)
        ... def embed(items: list[Input]) -> list[Output]:
        ...     vectors = model.encode([item.text for item in items])
        ...     return [Output(vector=vector) for vector in vectors]
    """

    def decorator(function: AnyFunction) -> AnyFunction:
        name = function.__name__
        if name in registered():
            raise ValueError(f"A handler named `{name}` is already registered.")
        batching = _checked_batching(name, batch_size, batch_window)
        input_model, output_model = _models_of(function, are_lists=batching is not None)
        timeout_s, grace_s = _checked_timeout(name, timeout), _checked_grace(name, grace)
        if warmup is not None and not isinstance(warmup, input_model):
            raise TypeError(
                f"Function `{name}`: warmup must be an instance of {input_model.__name__} "
                f"(got {warmup!r})"
            )
        register(Handler(function, input_model, output_model, timeout_s, grace_s, batching, warmup))
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
        _check_takes_nothing("Init", function)
        add_init_handler(function)
        logger.debug("Registered init function: `%s`", function.__name__)
        return function

    return decorator


def prepare() -> Callable[[AnyFunction], AnyFunction]:
    """Mark the function that loads, once, what all workers share: files, weights in host memory.

    It takes no arguments, returns None and runs before there is a worker, in the process that they
    are forked from: what it leaves in globals is in each of them, and in each replacement, without
    a copy. It must not touch a GPU, which cannot be shared like that: copy the weights there in
    ``@init``. Numeric libraries have one thread meanwhile. Where it starts threads that stay, or
    opens a GPU, the workers are fresh interpreters instead, and each runs it before its ``@init``.

    Raises:
        TypeError: the function takes arguments.
        ValueError: there is a prepare function already.

    Example:
        >>> @ogpu.service.prepare()
        ... def fetch() -> None:
        ...     global weights
        ...     weights = torch.load(download("model.pt"), mmap=True)
    """

    def decorator(function: AnyFunction) -> AnyFunction:
        _check_takes_nothing("Prepare", function)
        add_prepare_handler(function)
        logger.debug("Registered prepare function: `%s`", function.__name__)
        return function

    return decorator


def _check_takes_nothing(what: str, function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    if parameters:
        raise TypeError(
            f"{what} function `{function.__name__}` must take no arguments (got {len(parameters)})"
        )


def _models_of(
    function: Callable[..., Any], *, are_lists: bool
) -> tuple[type[BaseModel], type[BaseModel]]:
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
    if are_lists:
        input_model, output_model = _item_of(input_model), _item_of(output_model)
        if not (_is_model(input_model) and _is_model(output_model)):
            raise TypeError(
                f"Function `{name}` has a batch_size: it must take a list[...] of a subclass of "
                "pydantic.BaseModel and return a list[...] of one"
            )
    if not _is_model(input_model):
        raise TypeError(f"Input to `{name}` must be a subclass of pydantic.BaseModel")
    if not _is_model(output_model):
        raise TypeError(f"Return type of `{name}` must be a subclass of pydantic.BaseModel")
    return input_model, output_model


def _item_of(annotation: object) -> object:
    return get_args(annotation)[0] if get_origin(annotation) is list else None


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


def _checked_batching(name: str, size: object, window: object) -> Batching | None:
    if size is None:
        if window is not None:
            raise ValueError(f"Function `{name}`: batch_window is of no use without batch_size.")
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_BATCH_SIZE:
        raise ValueError(
            f"Function `{name}`: batch_size must be a whole number from 1 to {MAX_BATCH_SIZE} "
            f"(got {size!r})."
        )
    window_s = DEFAULT_BATCH_WINDOW_S if window is None else _seconds(window)
    if window_s is None:
        raise ValueError(
            f"Function `{name}`: batch_window must be a number of seconds, 0 or more, ten years at "
            f"most (got {window!r})."
        )
    return Batching(size, window_s)


def _seconds(value: object) -> float | None:
    """Return a time that is not negative as a float; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= MAX_TIMEOUT_S else None
