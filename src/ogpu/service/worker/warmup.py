"""Warm-up: each handler that has one is run once, before its worker takes tasks.

Runs in a worker, after @init. The handler is called as for a task, or as for a full batch, and its
result checked and serialised likewise, but nobody hears of it: there is no deadline, no record, no
callback. A failure is one of @init, which says whose warm-up it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from .. import wire
from ..context import ADDRESS_VARIABLE, CurrentTask, set_current_tasks
from ..handler import Handler
from ..logger import logger
from .handling import Handling

_ADDRESS = "warmup"
_FIRST_ATTEMPT = 1


def warm_up(handling: Handling, handlers: Mapping[str, Handler]) -> wire.InitFailed | None:
    """Run the warm-ups, in the order of registration; return why one failed, or None."""
    for handler in handlers.values():
        if handler.warmup is None:
            continue
        started, pid = time.perf_counter(), os.getpid()
        failures = _run(handling, handler)
        if os.getpid() != pid:
            os._exit(1 if failures else 0)  # a child that the handler forked
        if failures:
            return _failure(handler, failures[0])
        took_s = time.perf_counter() - started
        logger.info("The warm-up of `%s` took %.2f s", handler.name, took_s)
    return None


def _run(handling: Handling, handler: Handler) -> list[wire.Failed]:
    """Run the handler; return what failed of it."""
    data, batching = handler.warmup, handler.batching
    assert data is not None
    runs = [
        wire.Run(number, handler.name, _ADDRESS, _FIRST_ATTEMPT, None, None, may_be_asked=False)
        for number in range(1 if batching is None else batching.size)
    ]
    tasks = [
        CurrentTask(_ADDRESS, handler.name, _FIRST_ATTEMPT, None, None, _tell_nobody) for _ in runs
    ]
    set_current_tasks(tasks, is_batch=batching is not None)
    if batching is None:
        os.environ[ADDRESS_VARIABLE] = _ADDRESS
    try:
        # Copies, since a handler may change its input, and the source keep this one.
        answers = handling.run(handler, [(run, data.model_copy(deep=True)) for run in runs])
    finally:
        set_current_tasks([])
        os.environ.pop(ADDRESS_VARIABLE, None)
    return [answer for answer, _ in answers if isinstance(answer, wire.Failed)]


def _failure(handler: Handler, failed: wire.Failed) -> wire.InitFailed:
    what = f"the warm-up of `{handler.name}` failed"
    return wire.InitFailed(
        failed.exception or failed.reason,
        f"{what}: {failed.message}",
        f"{what}:\n{failed.traceback or failed.message}",
    )


def _tell_nobody(_: float, __: str | None) -> None:
    """Take a report of progress: nobody watches."""
